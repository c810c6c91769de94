// Joint norms, clipping and the test for what is not finite, as torch has them.
import { describe, expect, it } from 'vitest';
import '../../src/ops/methods.js';
import { sqrt } from '../../src/ops/elementwise.js';
import { clipFactor, nonFinite, sumOfSquares } from '../../src/optim/clip.js';
import { scope } from '../../src/tensor/scope.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { maxDifference } from '../models/support.js';
import { describeWithShared, readSharedJson } from '../shared.js';

interface RecordedClip {
  readonly max_norm: number;
  readonly norm_type: number | string;
  readonly dtype: 'float64' | 'float32';
  readonly gradients_of_step?: number;
  readonly total_norm: number;
  readonly clipped?: Record<string, never>;
}

describeWithShared('recorded clipping', 'golden/training/optimizers.json', () => {
  const golden = readSharedJson('golden/training/optimizers.json');
  const cases: RecordedClip[] = golden.clipping.filter((c: RecordedClip) => c.norm_type === 2 && c.gradients_of_step);

  it.each(cases)('to $max_norm in $dtype', ({ max_norm, dtype, gradients_of_step, total_norm, clipped }) => {
    scope(() => {
      const gradients = Object.entries(golden.gradients[gradients_of_step!]);
      const tensors = gradients.map(([, values]) => Tensor.from(values as never, { dtype }));
      const norm = sqrt(sumOfSquares(tensors));
      const tolerance = dtype === 'float64' ? 1e-14 : 1e-6;
      expect(Math.abs(norm.item() / total_norm - 1)).toBeLessThan(tolerance);
      const factor = clipFactor(norm, max_norm).item();
      if (!clipped) return;
      gradients.forEach(([name, values]) => {
        const found = [values].flat(9).map((v) => (v as number) * factor);
        expect(maxDifference(found, [clipped[name]].flat(9))).toBeLessThan(tolerance * total_norm);
      });
    });
  });
});

describe('clipFactor', () => {
  const factor = (norm: number, max: number): number =>
    scope(() => clipFactor(Tensor.from(Float64Array.of(norm)), max).item());

  it('is max / (norm + 1e-6), never above 1; 0 is off', () => {
    expect(factor(2, 1)).toBe(1 / (2 + 1e-6));
    expect(factor(0.5, 1)).toBe(1);
    expect(factor(0, 1)).toBe(1);
    expect(factor(1e9, 0)).toBe(1);
  });
});

describe('sumOfSquares', () => {
  it('adds float32 in float64: a large tensor keeps its small entries', () => {
    scope(() => {
      const values = new Float32Array(1 << 20).fill(1e-3);
      values[0] = 1e3;
      const expected = 1e6 + (values.length - 1) * Math.fround(1e-3) ** 2;
      expect(Math.abs(sumOfSquares([Tensor.from(values)]).item() / expected - 1)).toBeLessThan(1e-13);
    });
  });

  it('takes any number of tensors of any dtype, none included', () => {
    scope(() => {
      expect(sumOfSquares([]).item()).toBe(0);
      const mixed = [
        Tensor.from(Float32Array.of(1, 2)),
        Tensor.from(Float64Array.of(3)),
        Tensor.from(Float32Array.of(2), { dtype: 'bfloat16' }),
      ];
      expect(sumOfSquares(mixed.slice(0, 2)).item()).toBe(14);
      expect(sumOfSquares([mixed[2]]).item()).toBe(4);
    });
  });
});

describe('nonFinite', () => {
  it('is 1 where any value is infinite or NaN', () => {
    scope(() => {
      const of = (...values: number[]): number =>
        nonFinite(values.map((v, i) => Tensor.from(i % 2 ? Float64Array.of(v) : Float32Array.of(v)))).item();
      expect(of(0, 1e30, -5)).toBe(0);
      expect(of(1, Number.POSITIVE_INFINITY)).toBe(1);
      expect(of(Number.NaN, 1)).toBe(1);
      expect(of(Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY)).toBe(1);
    });
  });
});
