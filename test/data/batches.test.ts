// The plan of optimizer steps: what a window holds, where passes end, what a seed decides.

import { describe, expect, it } from 'vitest';
import { planSteps } from '../../src/data/batches.js';
import { randomUint32, shuffledOrder } from '../../src/data/random.js';

const plan = (count: number, options: Parameters<typeof planSteps>[1]) =>
  planSteps(count, { shuffle: false, ...options });
const batches = (count: number, options: Parameters<typeof planSteps>[1]) =>
  [...plan(count, options)].map(({ microBatches }) => microBatches);

describe('planSteps', () => {
  it('keeps the last, smaller batch', () => {
    expect(batches(5, { batchSize: 2 })).toEqual([[[0, 1]], [[2, 3]], [[4]]]);
  });

  it('ends an accumulation window with the pass', () => {
    const options = { batchSize: 2, gradientAccumulationSteps: 2, epochs: 2 };
    const pass = [
      [
        [0, 1],
        [2, 3],
      ],
      [[4]],
    ];
    expect(batches(5, options)).toEqual([...pass, ...pass]);
    expect([...plan(5, options)].map(({ epoch }) => epoch)).toEqual([2 / 3, 1, 1 + 2 / 3, 2]);
  });

  it('makes exactly maxSteps steps, cycling or stopping early', () => {
    expect(batches(3, { batchSize: 2, maxSteps: 5, epochs: 1 })).toEqual([[[0, 1]], [[2]], [[0, 1]], [[2]], [[0, 1]]]);
    expect(plan(3, { batchSize: 2, maxSteps: 5 })).toMatchObject({ totalSteps: 5, stepsPerEpoch: 2 });
    expect(plan(100, { batchSize: 2, maxSteps: 3 }).visited()).toEqual([0, 1, 2, 3, 4, 5]);
    expect(plan(3, { batchSize: 2, maxSteps: 2 }).visited()).toEqual([0, 1, 2]);
    expect(plan(10, { batchSize: 2, epochs: 1.5 }).totalSteps).toBe(8);
  });

  it('shuffles each pass on its own, the same way for the same seed, from any step on', () => {
    const options = { batchSize: 3, epochs: 3, shuffle: true, seed: 7 };
    const all = [...planSteps(20, options)];
    expect([...planSteps(20, options)]).toEqual(all);
    expect(planSteps(20, options).at(16)).toEqual(all[16]);
    const passes = [0, 1, 2].map((pass) =>
      all.slice(pass * 7, pass * 7 + 7).flatMap((step) => step.microBatches.flat()),
    );
    for (const pass of passes) expect([...pass].sort((a, b) => a - b)).toEqual(Array.from({ length: 20 }, (_, i) => i));
    expect(passes[0]).not.toEqual(passes[1]);
    expect([...planSteps(20, { ...options, seed: 8 })]).not.toEqual(all);
    const few = planSteps(20, { ...options, maxSteps: 2 });
    expect(few.visited()).toEqual([...few].flatMap((step) => step.microBatches.flat()).sort((a, b) => a - b));
  });

  it('refuses what makes no step', () => {
    expect(() => plan(0, { batchSize: 1 })).toThrow(/number of examples/);
    expect(() => plan(1, { batchSize: 1.5 })).toThrow(/batch size: expected a positive integer, found 1.5/);
    expect(() => plan(1, { batchSize: 1, epochs: 0 })).toThrow(/epochs: expected a positive number/);
    expect(() => plan(1, { batchSize: 1, maxSteps: -1 })).toThrow(/max steps/);
  });
});

describe('the order of examples', () => {
  it('never changes between versions', () => {
    // Runs resumed by a later version must find the order they left.
    expect(shuffledOrder(10, 42, 0)).toEqual([1, 0, 7, 8, 5, 2, 6, 4, 3, 9]);
    expect(shuffledOrder(10, 42, 1)).toEqual([1, 3, 8, 6, 2, 9, 5, 0, 4, 7]);
    const next = randomUint32(2 ** 40 + 1, 3);
    expect([next(), next(), next()]).toEqual([2308261259, 2897215837, 3453698945]);
  });

  it('is uniform', () => {
    const counts = new Map<string, number>();
    for (let pass = 0; pass < 6000; pass++) {
      const key = shuffledOrder(3, 1, pass).join('');
      counts.set(key, (counts.get(key) ?? 0) + 1);
    }
    expect(counts.size).toBe(6);
    for (const count of counts.values()) expect(Math.abs(count - 1000)).toBeLessThan(150);
  });
});
