// Rows do not depend on their neighbours, bit for bit: in attention whether a prompt is shared or repeated, alone or packed;
// in the vocabulary head whichever rows and targets are asked for; with and without gradients. And a residual sum with its
// norm is what the two are by themselves.
import { describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { vjp } from '../../src/autograd/transforms.js';
import { add } from '../../src/ops/elementwise.js';
import { vocabHead } from '../../src/ops/head.js';
import { concat, slice } from '../../src/ops/movement.js';
import { SegmentLayout } from '../../src/ops/segments.js';
import { addRmsNorm, groupedQueryAttention, rmsNorm } from '../../src/ops/transformer.js';
import type { DType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { testDevices } from '../support/devices.js';
import { randomSource } from '../support/host.js';

const dtypes: DType[] = ['float32', 'bfloat16', 'float64'];

function maker(seed: string, device: Tensor['device'], dtype: DType) {
  const random = randomSource(seed);
  return (...shape: number[]): Tensor =>
    Tensor.from(
      Float64Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => 2 * random() - 1),
      { shape, dtype, device },
    );
}

const bits = (t: Tensor): string => Buffer.from(Float64Array.from(t.dataSync()).buffer).toString('base64');
const rows = (t: Tensor, start: number, count: number): Tensor => slice(t, 0, start, start + count);

interface Shape {
  prompt: number;
  branches: number[];
  heads: [number, number];
  width: number;
}

const shapes: Shape[] = [
  { prompt: 3, branches: [2, 5], heads: [2, 1], width: 4 },
  { prompt: 130, branches: [70, 33, 1], heads: [4, 2], width: 64 },
  { prompt: 65, branches: [200, 64], heads: [3, 3], width: 20 },
  { prompt: 31, branches: [97, 129], heads: [6, 2], width: 128 },
];

for (const device of testDevices())
  for (const dtype of dtypes) {
    describe(`attention in ${dtype} on ${device}`, () => {
      for (const { prompt, branches, heads, width } of shapes)
        test(`prompt ${prompt}, responses ${branches}, heads ${heads}, width ${width}`, () => {
          const make = maker(`${prompt} ${width}`, device, dtype);
          scope(() => {
            const total = prompt + branches.reduce((a, b) => a + b);
            const packed = [make(total, heads[0], width), make(total, heads[1], width), make(total, heads[1], width)];
            const dout = make(total, heads[0], width);
            using shared = new SegmentLayout([
              { length: prompt },
              ...branches.map((length) => ({ length, parent: 0 })),
            ]);
            const run = (layout: SegmentLayout) => (inputs: Tensor[]) =>
              groupedQueryAttention(inputs[0], inputs[1], inputs[2], layout);
            const together = run(shared)(packed);
            const [recorded] = vjp(run(shared), [packed], dout);
            expect(bits(recorded as Tensor)).toBe(bits(together));
            let start = prompt;
            for (const length of branches) {
              const own = (t: Tensor): Tensor => concat([rows(t, 0, prompt), rows(t, start, length)]);
              using repeated = SegmentLayout.sequences([prompt + length]);
              const alone = run(repeated)(packed.map(own));
              expect(bits(rows(alone, 0, prompt))).toBe(bits(rows(together, 0, prompt)));
              expect(bits(rows(alone, prompt, length))).toBe(bits(rows(together, start, length)));
              start += length;
            }
          });
        });

      test('independent sequences, forward and backward', () => {
        const make = maker('sequences', device, dtype);
        const lengths = [7, 70, 1, 130];
        const [heads, width] = [[4, 2], 64];
        scope(() => {
          const total = lengths.reduce((a, b) => a + b);
          const packed = [make(total, heads[0], width), make(total, heads[1], width), make(total, heads[1], width)];
          const dout = make(total, heads[0], width);
          using layout = SegmentLayout.sequences(lengths);
          const run = (l: SegmentLayout) => (q: Tensor, k: Tensor, v: Tensor) => groupedQueryAttention(q, k, v, l);
          const [y, gradients] = vjp(run(layout), packed as [Tensor, Tensor, Tensor], dout);
          let start = 0;
          for (const length of lengths) {
            using one = SegmentLayout.sequences([length]);
            const own = packed.map((t) => rows(t, start, length)) as [Tensor, Tensor, Tensor];
            const [alone, ownGradients] = vjp(run(one), own, rows(dout, start, length));
            expect(bits(alone as Tensor)).toBe(bits(rows(y as Tensor, start, length)));
            ownGradients.forEach((g, i) => {
              expect(bits(g)).toBe(bits(rows(gradients[i], start, length)));
            });
            start += length;
          }
        });
      });
    });

    test.each([5, 64, 576])(`a residual sum of %i and its norm in ${dtype} on ${device}`, (width) => {
      const make = maker(`residual ${width}`, device, dtype);
      scope(() => {
        const [x, delta, weight] = [make(9, width), make(9, width), make(width)];
        const [sum, normed] = addRmsNorm(x, delta, weight, 1e-5);
        const expected = add(x, delta);
        expect(bits(sum)).toBe(bits(expected));
        expect(bits(normed)).toBe(bits(rmsNorm(expected, weight, 1e-5)));
        const [recorded] = vjp(
          (t: Tensor) => addRmsNorm(t, delta, weight, 1e-5),
          [x],
          (ys) => ys,
        );
        expect((recorded as Tensor[]).map(bits)).toEqual([sum, normed].map(bits));
      });
    });

    describe(`vocabulary head in ${dtype} on ${device}`, () => {
      test('values and hidden gradients of a row, whatever else is asked', () => {
        const make = maker('head', device, dtype);
        const ids = (...v: number[]): Tensor => Tensor.from(Int32Array.from(v), { device });
        const [count, width, words] = [37, 96, 4203];
        scope(() => {
          const [hidden, weight] = [make(count, width), make(words, width)];
          const every = Array.from({ length: count }, (_, i) => i);
          const targets = every.map((i) => (i * 977) % words);
          const logProbs = (h: Tensor, r: number[], t: number[]): Tensor =>
            vocabHead(h, weight, ids(...r), ids(...t)).logProbs;
          const all = logProbs(hidden, every, targets);
          const { logProbs: measured } = vocabHead(hidden, weight, ids(...every), ids(...targets), {
            statistics: true,
          });
          expect(bits(measured)).toBe(bits(all));
          const [recorded, [gradient]] = vjp((h: Tensor) => logProbs(h, every, targets), [hidden], all.mul(0).add(1));
          expect(bits(recorded as Tensor)).toBe(bits(all));
          for (const i of [0, 5, 36]) {
            const one = rows(hidden, i, 1);
            const [alone, [own]] = vjp(
              (h: Tensor) => logProbs(h, [0], [targets[i]]),
              [one],
              rows(all, i, 1).mul(0).add(1),
            );
            expect(bits(alone as Tensor)).toBe(bits(rows(all, i, 1)));
            expect(bits(own)).toBe(bits(rows(gradient, i, 1)));
            // Two targets of one row.
            expect(bits(rows(logProbs(hidden, [i, i], [3, targets[i]]), 1, 1))).toBe(bits(rows(all, i, 1)));
          }
        });
      });
    });
  }
