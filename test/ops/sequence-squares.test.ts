// Squares of the gradients of the linears that read one input, by sequence: their derivatives against those of the gradients
// written out, for sequences that share a prompt.
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { vjp } from '../../src/autograd/transforms.js';
import { add, mul, square } from '../../src/ops/elementwise.js';
import { gatherRows, slice, stack, transpose } from '../../src/ops/movement.js';
import { LinearContribution, matmul } from '../../src/ops/product.js';
import { sum } from '../../src/ops/reduce.js';
import { SegmentLayout } from '../../src/ops/segments.js';
import { SequenceFactors } from '../../src/ops/sequence-products.js';
import { InputSquares } from '../../src/ops/sequence-squares.js';
import { SequenceStreams } from '../../src/ops/streams.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { randomSource } from '../support/host.js';

let before = 0;
beforeEach(() => {
  before = memory().storages;
});
afterEach(() => expect(memory().storages).toBe(before));

const random = randomSource('sequence squares');
const f64 = (...shape: number[]): Tensor =>
  Tensor.from(
    Float64Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => 2 * random() - 1),
    { shape },
  );

/** A prompt with two responses, then a sequence alone and an empty one. */
function streamsOf(prompt: number, responses: number[], alone: number): SequenceStreams {
  const lengths = [prompt, ...responses, alone, 0];
  const total = lengths.reduce((a, b) => a + b);
  const layout = new SegmentLayout(lengths.map((length, i) => ({ length, parent: i === 1 || i === 2 ? 0 : -1 })));
  const ints = Int32Array.from({ length: total }, (_, i) => i);
  const t = (): Tensor => Tensor.from(ints);
  const targets = { start: 0, length: 0 };
  return new SequenceStreams(
    layout,
    [[0, 1], [0, 2], [3], [4]].map((segments) => ({ segments, targets })),
    { tokens: ints, targetRows: Int32Array.of(), targetIds: Int32Array.of() },
    { ids: t(), targetRows: t(), targetOrder: t() },
  );
}

/** What each linear of the test is: its input and cotangents among the tensors, its group and scale. */
const uses = [
  { x: 0, g: 1, group: 'backbone', scale: 1 },
  { x: 0, g: 2, group: 'adapters', scale: 1 },
  { x: 5, g: 1, group: 'adapters', scale: 0.5 },
  { x: 0, g: 3, group: 'backbone', scale: 1 },
  { x: 0, g: 4, group: 'adapters', scale: 1 },
  { x: 6, g: 3, group: 'adapters', scale: 0.5 },
];

/** Squares by use, `[S]`, without the scale. */
function written(tensors: readonly Tensor[], streams: SequenceStreams): Tensor[] {
  return uses.map(({ x, g }) => {
    const rows = gatherRows(tensors[x], streams.rowMap!);
    const each = streams.sequences.map(({ rows: { start, length } }) => {
      const piece = (t: Tensor): Tensor => slice(t, 0, start, start + length);
      return sum(square(matmul(transpose(piece(tensors[g])), piece(rows))));
    });
    return stack(each);
  });
}

const groups = ['backbone', 'adapters'];

function writtenByGroup(tensors: readonly Tensor[], streams: SequenceStreams): Tensor[] {
  const squares = written(tensors, streams).map((t, i) => mul(t, uses[i].scale ** 2));
  return groups.map((group) => squares.filter((_, i) => uses[i].group === group).reduce((a, b) => add(a, b)));
}

function together(tensors: readonly Tensor[], streams: SequenceStreams, factors: SequenceFactors): Tensor[] {
  const values = written(
    tensors.map((t) => t.detach()),
    streams,
  );
  const squares = new InputSquares(factors, tensors[0]);
  uses.forEach(({ x, g, group, scale }, i) => {
    const taken = squares.take(new LinearContribution(tensors[x], tensors[g], scale, streams), group, values[i]);
    expect(taken).toBe(true);
  });
  expect(squares.take(new LinearContribution(tensors[5], tensors[6], 1, streams), 'backbone', values[0])).toBe(false);
  const found = new Map(squares.squares().map(({ group, tensor }) => [group, tensor]));
  return groups.map((group) => found.get(group)!);
}

const shapes = [
  { name: 'through inner products: few rows', rows: [3, [2, 4], 5], width: 40, outs: [30, 6, 50, 7], low: 5 },
  { name: 'through inner products: thin cotangents', rows: [9, [8, 7], 20], width: 90, outs: [80, 4, 90, 3], low: 3 },
  { name: 'through gradients: many rows', rows: [40, [30, 25], 60], width: 3, outs: [2, 1, 4, 2], low: 2 },
] as const;

describe.each(shapes)('$name', ({ rows: [prompt, responses, alone], width, outs, low }) => {
  test.each([
    ['both groups', [1, 1]],
    ['the backbone', [1, 0]],
    ['the adapters', [0, 1]],
  ] as const)('%s', (_, weights) => {
    scope(() => {
      using streams = streamsOf(prompt, [...responses], alone);
      const factors = new SequenceFactors(streams);
      const rows = streams.primalRows;
      const inputs = [f64(rows, width), ...outs.map((out) => f64(streams.rows, out)), f64(rows, low), f64(rows, low)];
      const cotangents = weights.map((w) => mul(f64(streams.sequences.length), w));
      // A group that nobody asks for has no cotangent at all.
      const pick = (all: readonly Tensor[]): Tensor[] => all.filter((_, i) => weights[i]);
      const derivative = (f: (t: readonly Tensor[]) => Tensor[]): { values: number[][]; gradients: number[][] } => {
        const [outputs, gradients] = vjp((...t: Tensor[]) => pick(f(t)), inputs, pick(cotangents));
        return { values: outputs.map((t) => [...t.dataSync()]), gradients: gradients.map((t) => [...t.dataSync()]) };
      };
      const expected = derivative((t) => writtenByGroup(t, streams));
      const found = derivative((t) => together(t, streams, factors));
      factors.release();
      expect(found.values).toEqual(expected.values);
      found.gradients.forEach((g, i) => {
        const scale = Math.max(1e-300, ...expected.gradients[i].map(Math.abs));
        expect(Math.max(...g.map((v, j) => Math.abs(v - expected.gradients[i][j]))) / scale).toBeLessThan(1e-12);
      });
    });
  });
});
