// The lower level: plain gradient steps on a copy, θ untouched whatever happens, nothing left behind.
import { describe, expect, it } from 'vitest';
import { mul } from '../../src/ops/elementwise.js';
import '../../src/ops/methods.js';
import { descend } from '../../src/optim/bilevel/lower-level.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';

const values = (t: Tensor): number[] => scope(() => [...t.cast('float64').dataSync()]);

/** L = ½ c θ² of one tensor: the gradient c θ in a buffer. */
function quadratic(c: number, buffer: Tensor) {
  return (theta: Map<string, Tensor>): Map<string, Tensor> => {
    scope(() => buffer.write([...mul(theta.get('w')!.cast('float64'), c).dataSync()]));
    return new Map([['w', buffer]]);
  };
}

describe('descend', () => {
  it.each([1, 2, 5])('takes %i steps, and leaves the start as it is', (steps) => {
    const start = memory().storages;
    {
      using w = Tensor.from(Float64Array.of(1, -2));
      using g = Tensor.from(Float64Array.of(0, 0));
      const map = new Map([['w', w]]);
      const solution = descend(map, map, quadratic(0.5, g), { steps, learningRate: 0.1 });
      const expected = [1, -2].map((x) => x * 0.95 ** steps);
      for (const [i, x] of values(solution.theta.get('w')!).entries())
        expect(Math.abs(x - expected[i])).toBeLessThan(1e-15);
      expect(values(w)).toEqual([1, -2]);
      solution.release();
      solution.release();
      expect(w.disposed).toBe(false);
    }
    expect(memory().storages).toBe(start);
  });

  it('without steps is the start itself, which release leaves alone', () => {
    using w = Tensor.from(Float64Array.of(1));
    const map = new Map([['w', w]]);
    const never = (): never => {
      throw new Error('no gradient is needed');
    };
    const solution = descend(map, map, never, { steps: 0, learningRate: 0.1 });
    expect(solution.theta.get('w')).toBe(w);
    solution.release();
    expect(w.disposed).toBe(false);
  });

  it('steps in the masters beside bfloat16, and evaluates at what they round to', () => {
    const start = memory().storages;
    {
      using w = Tensor.from(Float32Array.of(1), { dtype: 'bfloat16' });
      using master = Tensor.from(Float32Array.of(1.0005));
      using g = Tensor.from(Float32Array.of(1));
      const seen: number[] = [];
      const gradient = (theta: Map<string, Tensor>): Map<string, Tensor> => {
        expect(theta.get('w')!.dtype).toBe('bfloat16');
        seen.push(...values(theta.get('w')!));
        return new Map([['w', g]]);
      };
      const solution = descend(new Map([['w', w]]), new Map([['w', master]]), gradient, {
        steps: 100,
        learningRate: 1e-4,
      });
      // Neighbours of bfloat16 below 1 are 2⁻⁸ apart: a single step of 1e-4 would be lost, a hundred are not.
      expect(values(solution.theta.get('w')!)).toEqual([1 - 2 ** -7]);
      expect(seen.slice(0, 2)).toEqual([1, 1]);
      expect([...new Set(seen)]).toEqual([1, 1 - 2 ** -8, 1 - 2 ** -7]);
      expect(values(w)).toEqual([1]);
      expect(values(master)).toEqual([Math.fround(1.0005)]);
      solution.release();
    }
    expect(memory().storages).toBe(start);
  });

  it.each([0, 1, 2])('gives everything back when the gradient of step %i throws', (at) => {
    const start = memory().storages;
    {
      using w = Tensor.from(Float32Array.of(1, 2), { dtype: 'bfloat16' });
      using master = Tensor.from(Float32Array.of(1, 2));
      using g = Tensor.from(Float32Array.of(1, 1));
      const gradient = (_: Map<string, Tensor>, step: number): Map<string, Tensor> => {
        if (step === at) throw new Error('injected');
        return new Map([['w', g]]);
      };
      const run = () =>
        descend(new Map([['w', w]]), new Map([['w', master]]), gradient, { steps: 3, learningRate: 0.1 });
      expect(run).toThrow('injected');
      expect(values(w)).toEqual([1, 2]);
      expect(values(master)).toEqual([1, 2]);
    }
    expect(memory().storages).toBe(start);
  });
});
