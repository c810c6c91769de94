// The whole case list on one instruction set of the processor, values and gradients. A test file calls this and nothing
// else: the native layer chooses once per process, and each file has a process of its own.
import { beforeAll, describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { runtimeInfo } from '../../src/native/info.js';
import { families } from './cases.js';
import { checkGradients, checkValues } from './checks.js';

/** Why this machine cannot run `isa`; undefined where it can. Loads the addon, which settles the choice. */
function missing(isa: string): string | undefined {
  process.env.KEELGRAD_ISA = isa;
  try {
    return runtimeInfo().isa === isa ? undefined : `the addon was loaded before, for ${runtimeInfo().isa}`;
  } catch (error) {
    return (error as Error).message;
  }
}

export function testInstructionSet(isa: string): void {
  const reason = missing(isa);
  if (reason) {
    console.warn(`skipped: op cases on ${isa}: ${reason}`);
    test.skip(`op cases on ${isa}: ${reason}`, () => {});
    return;
  }
  beforeAll(() => expect(runtimeInfo().isa).toBe(isa));
  for (const [family, cases] of Object.entries(families))
    describe(`${family} on ${isa}`, () => {
      for (const c of cases().filter((c) => c.size === 'small' || c.size === 'large'))
        test(c.name, () => {
          for (const dtype of c.dtypes) {
            checkValues(c, { device: 'cpu', dtype });
            if (c.differentiable) checkGradients(c, { device: 'cpu', dtype });
          }
        });
    });
}
