// What `vitest` means in the packed GPU tests: the same test functions, matchers and spies, from vitest's own packages,
// without its server. Holds no assertion of its own.
import {
  ASYMMETRIC_MATCHERS_OBJECT,
  type ExpectStatic,
  getState,
  JestAsymmetricMatchers,
  JestChaiExpect,
  JestExtend,
  setState,
} from '@vitest/expect';
import { getCurrentTest } from '@vitest/runner';
import { fn, restoreAllMocks, spyOn } from '@vitest/spy';
import * as chai from 'chai';

export { afterAll, afterEach, beforeAll, beforeEach, describe, it, suite, test } from '@vitest/runner';

chai.use(JestExtend);
chai.use(JestChaiExpect);
chai.use(JestAsymmetricMatchers);

function create(): ExpectStatic {
  const expect = ((value: unknown, message?: string) => {
    const assertion = chai.expect(value, message);
    const test = getCurrentTest();
    // biome-ignore lint/suspicious/noExplicitAny: a method that vitest adds to chai's assertions
    return test ? (assertion as any).withTest(test) : assertion;
  }) as unknown as ExpectStatic;
  Object.assign(expect, chai.expect);
  Object.assign(expect, (globalThis as Record<symbol, unknown>)[ASYMMETRIC_MATCHERS_OBJECT]);
  expect.getState = () => getState(expect);
  expect.setState = (state) => setState(state, expect);
  return expect;
}

export const expect = create();

export const vi = { fn, spyOn, restoreAllMocks };
