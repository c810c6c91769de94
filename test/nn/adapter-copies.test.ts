// Copies of adapters: made once, again after a write and only then; for a model's own adapters alone.
import { describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { vjp } from '../../src/autograd/transforms.js';
import { AdapterCopies } from '../../src/nn/adapter-copies.js';
import { type Adapter, adaptedLinears } from '../../src/ops/lora.js';
import { copyInto } from '../../src/ops/movement.js';
import type { DType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { recordLaunches } from '../support/launches.js';

const launched = recordLaunches();

const of = (dtype: DType, salt: number, ...shape: number[]): Tensor =>
  Tensor.from(
    Float64Array.from({ length: shape.reduce((a, b) => a * b) }, (_, i) => Math.sin(7 * i + salt)),
    { shape, dtype },
  );
const adapter = (salt: number, out: number): Adapter => ({
  a: of('float32', salt, 2, 6),
  b: of('float32', salt + 1, out, 2),
});
const values = (t: Tensor): number[] => [...t.cast('float64').dataSync()];

const copiesOf = <T>(f: () => T): number => {
  launched.length = 0;
  f();
  return launched.filter((name) => name === 'copy').length;
};

describe.each(['bfloat16', 'float32'] as const)('copies for %s', (dtype) => {
  test('hold the stacked and rounded values, also after a write', () => {
    scope(() => {
      const group = [adapter(1, 4), adapter(5, 3)];
      const copies = new AdapterCopies([group], dtype);
      const check = (): void => {
        const low = copies.of(group)!;
        expect(values(low.a)).toEqual(group.flatMap(({ a }) => values(a.cast(dtype))));
        expect(low.b.map(values)).toEqual(group.map(({ b }) => values(b.cast(dtype))));
      };
      check();
      for (const t of [group[1].a, group[0].b]) {
        copyInto(t, t.mul(3));
        check();
      }
      copies.dispose();
    });
  });

  test('are made once, not at every call, forward or backward', () => {
    scope(() => {
      const group = [adapter(1, 4), adapter(5, 3)];
      const copies = new AdapterCopies([group], dtype);
      expect(copiesOf(() => copies.of(group))).toBeGreaterThan(0);
      const x = of(dtype, 2, 5, 6);
      const weights = [of(dtype, 3, 4, 6), of(dtype, 4, 3, 6)];
      const cotangents = [of(dtype, 6, 5, 4), of(dtype, 7, 5, 3)];
      const f = (t: Tensor): Tensor[] => {
        const linears = group.map((g, i) => ({ weight: weights[i], bias: null, adapter: g }));
        return [...adaptedLinears(t, linears, 0.5, copies.of(group))];
      };
      expect(copiesOf(() => vjp(f, [x], () => cotangents))).toBe(0);
      expect(copiesOf(() => copies.of(group))).toBe(0);
      copies.dispose();
    });
  });

  test('are not those of other tensors', () => {
    scope(() => {
      const group = [adapter(1, 4), adapter(5, 3)];
      const copies = new AdapterCopies([group], dtype);
      expect(copies.of([adapter(1, 4), group[1]])).toBeNull();
      expect(copies.of([group[0], adapter(5, 3)])).toBeNull();
      expect(copies.of([])).toBeNull();
      copies.dispose();
    });
  });

  test('leave nothing behind', () => {
    scope(() => {
      const group = [adapter(1, 4)];
      const before = memory();
      const copies = new AdapterCopies([group], dtype);
      scope(() => void copies.of(group));
      expect(memory().storages - before.storages).toBe(dtype === 'bfloat16' ? 2 : 0);
      copies.dispose();
      expect(memory().allocated).toBe(before.allocated);
    });
  });
});
