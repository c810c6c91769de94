// Packing: where every id lies, which row predicts it, which sequence it counts for; and that packed equals alone.
import { describe, expect, it } from 'vitest';
import { chosenSequences, type PackedBatch, packPairs, packSequences, sequenceOf } from '../../src/data/packing.js';
import { loadModel } from '../../src/io/model-folder.js';
import { memory } from '../../src/tensor/storage.js';
import { scorePairs } from '../../src/train/batch-source.js';
import { makeModelFolder } from '../fixtures/make.js';
import { temporaryFolder } from '../train/support.js';

const ids = (...values: number[]): Int32Array => Int32Array.from(values);
const pair = (prompt: number[], chosen: number[], rejected: number[]) => ({
  promptIds: ids(...prompt),
  chosenIds: ids(...chosen),
  rejectedIds: ids(...rejected),
});

/** Every target as [the id it is read off after, its own id, its sequence]. */
const targets = (b: PackedBatch): number[][] =>
  [...b.targetIds].map((id, n) => [b.ids[b.headRows[b.targetRows[n]]], id, b.sequences[n]]);

const segments = (b: PackedBatch): number[][] =>
  b.layout.segments.map(({ start, length, parent, firstPosition }) => [start, length, parent, firstPosition]);

describe('packPairs', () => {
  it('lays prompt, chosen and rejected side by side; last tokens are targets only', () => {
    const b = packPairs([pair([1, 2, 3], [10, 11], [20, 21, 22]), pair([4], [12], [23, 24])]);
    expect([...b.ids]).toEqual([1, 2, 3, 10, 20, 21, 4, 23]);
    expect(segments(b)).toEqual([
      [0, 3, -1, 0],
      [3, 1, 0, 3],
      [4, 2, 0, 3],
      [6, 1, -1, 0],
      [7, 0, 3, 1],
      [7, 1, 3, 1],
    ]);
    // All chosen before all rejected: sequences 0, 1 and 2, 3.
    expect(targets(b)).toEqual([
      [3, 10, 0],
      [10, 11, 0],
      [4, 12, 1],
      [3, 20, 2],
      [20, 21, 2],
      [21, 22, 2],
      [4, 23, 3],
      [23, 24, 3],
    ]);
    expect([...b.lengths]).toEqual([2, 1, 3, 2]);
    expect(b.tokens).toBe(5 + 6 + 2 + 3);
  });

  it('runs the head once on every row that predicts something, in order', () => {
    const b = packPairs(Array.from({ length: 12 }, (_, i) => pair([1, 2], [3, 4, 5 + i], [6, 7])));
    expect([...b.headRows]).toEqual([...new Set(b.headRows)].sort((x, y) => x - y));
    // A row of the prompt, two of the chosen response, one of the rejected; the prompt's first row predicts nothing.
    expect(b.headRows.length).toBe(12 * 4);
    expect([...b.headRows.slice(0, 5)]).toEqual([1, 2, 3, 4, 6]);
  });

  it('without a prompt both responses stand alone and their first token is not scored', () => {
    const b = packPairs([pair([], [10, 11, 12], [20, 21])]);
    expect([...b.ids]).toEqual([10, 11, 20]);
    expect(targets(b)).toEqual([
      [10, 11, 0],
      [11, 12, 0],
      [20, 21, 1],
    ]);
    expect(b.layout.segments.every(({ parent, firstPosition }) => parent === -1 && firstPosition === 0)).toBe(true);
    expect([...b.lengths]).toEqual([2, 1]);
    expect(b.tokens).toBe(5);
  });
});

describe('packSequences', () => {
  it('scores what the mask says, wherever it lies, but no first token', () => {
    const b = packSequences([
      { inputIds: ids(1, 2, 3, 4), completionMask: Uint8Array.of(1, 0, 1, 1) },
      { inputIds: ids(5, 6, 7), completionMask: Uint8Array.of(0, 1, 0) },
      { inputIds: ids(8), completionMask: Uint8Array.of(1) },
    ]);
    expect([...b.ids]).toEqual([1, 2, 3, 5, 6]);
    expect(targets(b)).toEqual([
      [2, 3, 0],
      [3, 4, 0],
      [5, 6, 1],
    ]);
    expect([...b.lengths]).toEqual([2, 1, 0]);
    expect(b.tokens).toBe(8);
  });

  it('sequenceOf scores the response, chosenSequences the chosen halves', () => {
    const { inputIds, completionMask } = sequenceOf(ids(1, 2), ids(3, 4, 5));
    expect([[...inputIds], [...completionMask]]).toEqual([
      [1, 2, 3, 4, 5],
      [0, 0, 1, 1, 1],
    ]);
    const b = packSequences(chosenSequences([pair([1], [2, 3], [9]), pair([4], [5], [9])]));
    expect(targets(b)).toEqual([
      [1, 2, 0],
      [2, 3, 0],
      [4, 5, 1],
    ]);
  });
});

describe('scorePairs', () => {
  const folder = temporaryFolder();

  it('gives a pair the same bits in any batch, beside any neighbours, and leaves nothing behind', async () => {
    const start = memory().storages;
    {
      using model = await loadModel(await makeModelFolder(folder.path('qwen2'), 'qwen2'));
      const pairs = [
        pair([5, 6, 7], [8, 9], [10]),
        pair([11], [12, 13, 14, 15, 16], [17, 18]),
        pair([], [19, 20, 21], [22, 23]),
        pair([24, 25], [26], [27]),
        pair([28, 29, 30, 31], [32, 33], [32, 34, 35]),
      ];
      const done: number[] = [];
      const alone = await scorePairs(model, model.parameters, pairs, { batchSize: 1, onBatch: (n) => done.push(n) });
      expect(done).toEqual([1, 2, 3, 4, 5]);
      for (const batchSize of [2, 3, 99])
        expect(await scorePairs(model, model.parameters, pairs, { batchSize })).toEqual(alone);
      expect(alone.chosen.every((x) => x < 0)).toBe(true);
      const stopped = await scorePairs(model, model.parameters, pairs, { batchSize: 2, signal: AbortSignal.abort() });
      expect([...stopped.chosen]).toEqual([0, 0, 0, 0, 0]);
    }
    expect(memory().storages).toBe(start);
  });
});
