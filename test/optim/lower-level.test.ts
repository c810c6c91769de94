// The lower level: plain gradient steps on a copy, θ untouched whatever happens, nothing left behind.
import { describe, expect, it } from 'vitest';
import { mul } from '../../src/ops/elementwise.js';
import '../../src/ops/methods.js';
import { descend } from '../../src/optim/bilevel/lower-level.js';
import { WarmStart } from '../../src/optim/bilevel/warm-start.js';
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

describe('a warm start', () => {
  it('goes on from the masters, not from what they round to, and holds one copy of each', () => {
    const start = memory().storages;
    {
      using w = Tensor.from(Float32Array.of(1), { dtype: 'bfloat16' });
      using master = Tensor.from(Float32Array.of(1));
      using g = Tensor.from(Float32Array.of(1));
      const warm = new WarmStart();
      expect(warm.point).toBeNull();
      const gradient = (): Map<string, Tensor> => new Map([['w', g]]);
      const before = memory().storages;
      // A single step of 1e-4 from 1 is lost in bfloat16; fifty runs of one step each are one run of fifty.
      for (let run = 0; run < 50; run++) {
        const { theta, masters } = warm.point ?? { theta: new Map([['w', w]]), masters: new Map([['w', master]]) };
        const solution = descend(theta, masters, gradient, { steps: 1, learningRate: 1e-4 });
        warm.keep(solution);
        solution.release();
        expect(memory().storages).toBe(before + 2);
      }
      expect(values(warm.point!.masters.get('w')!)[0]).toBeCloseTo(1 - 50e-4, 5);
      expect(values(warm.point!.theta.get('w')!)).toEqual([1 - 2 ** -8]);
      expect(values(w)).toEqual([1]);
      warm.dispose();
      expect(warm.point).toBeNull();
    }
    expect(memory().storages).toBe(start);
  });

  it('is one map where the dtypes are the same', () => {
    using w = Tensor.from(Float64Array.of(1));
    const warm = new WarmStart();
    const map = new Map([['w', w]]);
    warm.keep({ theta: map, masters: map });
    expect(warm.point!.theta).toBe(warm.point!.masters);
    expect(warm.point!.theta.get('w')).not.toBe(w);
    warm.dispose();
    expect(w.disposed).toBe(false);
  });
});
