// Scopes: what they free, what they pass on, what they refuse.
import { afterEach, beforeEach, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { detachFromScope, owned, scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';

let before = 0;
beforeEach(() => {
  before = memory().storages;
});
afterEach(() => expect(memory().storages).toBe(before));

const one = (): Tensor => Tensor.from([1]);

test('frees what is created inside, except the result', () => {
  let inner: Tensor | undefined;
  const result = scope(() => {
    inner = one();
    return inner.add(1);
  });
  expect(inner?.disposed).toBe(true);
  expect(result.item()).toBe(2);
  result.dispose();
});

test('looks for results in arrays, maps and plain objects', () => {
  const result = scope(() => ({ a: one(), list: [one(), [one(), null]], map: new Map([['k', one()]]), n: 3 }));
  expect(memory().storages).toBe(before + 4);
  for (const t of [result.a, result.list[0] as Tensor, (result.list[1] as Tensor[])[0], result.map.get('k')!]) {
    expect(t.item()).toBe(1);
    t.dispose();
  }
});

test('what an inner scope returns belongs to the outer one', () => {
  let passed: Tensor | undefined;
  scope(() => {
    passed = scope(() => one().mul(3));
    expect(passed.item()).toBe(3);
  });
  expect(passed?.disposed).toBe(true);
});

test('tensors of outside are left alone', () => {
  const outside = one();
  const same = scope(() => outside);
  expect(same).toBe(outside);
  expect(outside.disposed).toBe(false);
  outside.dispose();
});

test('an exception frees everything and passes through', () => {
  expect(() =>
    scope(() => {
      scope(() => one());
      one();
      throw new Error('mine');
    }),
  ).toThrow('mine');
  // The scope before is current again.
  const t = one();
  expect(t.disposed).toBe(false);
  t.dispose();
});

test('a promise is refused, and what was created is freed', () => {
  expect(() => scope(async () => one())).toThrow(
    '[scope] expected a synchronous function, found one that returns a promise',
  );
});

test('a detached tensor outlives its scope', () => {
  const kept = scope(() => {
    const t = detachFromScope(one());
    return { value: () => t };
  });
  expect(kept.value().item()).toBe(1);
  kept.value().dispose();
});

test('owned results belong to the caller and to no scope; older tensors are aliased', () => {
  const outside = one();
  let results: Tensor[] = [];
  scope(() => {
    const [fresh, again, old, none] = owned(() => {
      const t = one();
      one();
      return [t, t, outside, null];
    });
    expect(none).toBeNull();
    expect(again).not.toBe(fresh);
    expect(old).not.toBe(outside);
    results = [fresh!, again!, old!];
  });
  for (const t of results) {
    expect(t.disposed).toBe(false);
    t.dispose();
  }
  expect(outside.item()).toBe(1);
  outside.dispose();
});

test('owned frees what was made before an exception', () => {
  expect(() =>
    owned(() => {
      one();
      throw new Error('mine');
    }),
  ).toThrow('mine');
});
