// Gradient sinks: a leaf's contributions are handed over unmultiplied, or added in place by kernels; and where backward is
// itself differentiated, sinks are left out.
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { AccumulatingSink, GradientBuffers } from '../../src/autograd/sinks.js';
import type { Contribution, GradientSink } from '../../src/autograd/tape.js';
import { grad, vjp } from '../../src/autograd/transforms.js';
import {
  gatherRows,
  type LinearContribution,
  linear,
  loraLinear,
  rmsNorm,
  vocabHead,
  zeros,
} from '../../src/ops/index.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { randomSource } from '../support/host.js';

let before = 0;
beforeEach(() => {
  before = memory().storages;
});
afterEach(() => expect(memory().storages).toBe(before));

const random = randomSource('sinks');
const f64 = (...shape: number[]): Tensor =>
  Tensor.from(
    Float64Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => 2 * random() - 1),
    { shape },
  );
const values = (t: Tensor): number[] => [...t.dataSync()];
const nearly = (found: number[], expected: number[]): void =>
  found.forEach((v, i) => {
    expect(Math.abs(v - expected[i])).toBeLessThan(1e-12);
  });

/** Keeps what it is given, by kind. */
class Recorder implements GradientSink {
  readonly kinds: string[] = [];
  readonly buffer: Tensor | null = null;
  accept(contribution: Contribution | Tensor): void {
    this.kinds.push('kind' in contribution ? contribution.kind : 'tensor');
  }
}

/** A little model with every kind of parameter. */
const loss = (table: Tensor, norm: Tensor, w: Tensor, a: Tensor, b: Tensor): Tensor => {
  const ids = Tensor.from(Int32Array.of(2, 0, 2));
  const h = rmsNorm(gatherRows(table, ids), norm, 1e-5);
  const y = linear(loraLinear(h, w, null, a, b, 0.5), w).tanh();
  const rows = Tensor.from(Int32Array.of(0, 1, 2));
  return vocabHead(y, table, rows, ids).logProbs.sum();
};
const parameters = (): Tensor[] => [f64(3, 4), f64(4), f64(4, 4), f64(2, 4), f64(4, 2)];

describe('contributions', () => {
  test('come in backward order, and their sum is the gradient', () => {
    scope(() => {
      const given = parameters();
      const sinks = given.map(() => new Recorder());
      const [, gradients] = vjp(loss, given as never, Tensor.from(Float64Array.of(1), { shape: [] }), { sinks });
      expect(sinks.map((s) => s.kinds)).toEqual([
        ['tensor', 'lookup'],
        ['tensor'],
        ['linear', 'linear'],
        ['linear'],
        ['linear'],
      ]);
      // A leaf with a sink has no gradient of its own.
      for (const g of gradients as Tensor[]) expect(values(g).every((v) => v === 0)).toBe(true);
    });
  });

  test('a linear one knows its factors', () => {
    scope(() => {
      const [x, w] = [f64(3, 4), f64(2, 4)];
      const seen: LinearContribution[] = [];
      const sink: GradientSink = { buffer: null, accept: (c) => void seen.push(c as LinearContribution) };
      const product: number[][] = [];
      const collect: GradientSink = {
        buffer: null,
        accept: (c) => {
          sink.accept(c);
          product.push(values((c as LinearContribution).materialize()), values((c as LinearContribution).x));
        },
      };
      vjp((t: Tensor) => linear(x, t).sum(), [w], Tensor.from(Float64Array.of(1), { shape: [] }), { sinks: [collect] });
      expect(seen[0].shape).toEqual([2, 4]);
      expect(product[1]).toEqual(values(x));
      const [g] = grad((t: Tensor) => linear(x, t).sum())(w);
      expect(product[0]).toEqual(values(g));
    });
  });
});

describe('AccumulatingSink', () => {
  test.each([1, -0.25])('adds %d times the gradient to its buffer, twice', (scale) => {
    scope(() => {
      const given = parameters();
      const expected = (grad(loss as never) as (...t: Tensor[]) => Tensor[])(...given).map(values);
      const buffers = new GradientBuffers(new Map(given.map((t, i) => [`p${i}`, t])));
      expect(memory().byTag.gradients).toBeGreaterThan(0);
      for (let i = 0; i < 2; i++)
        vjp(loss, given as never, Tensor.from(Float64Array.of(1), { shape: [] }), { sinks: buffers.sinks(scale) });
      [...buffers.buffers.values()].forEach((total, i) => {
        nearly(
          values(total),
          expected[i].map((v) => 2 * scale * v),
        );
      });
      buffers.zero();
      expect(values(buffers.buffers.get('p2')!).every((v) => v === 0)).toBe(true);
      buffers.dispose();
    });
  });

  test('bfloat16 parameters accumulate in float32', () => {
    scope(() => {
      const w = f64(4, 8).cast('bfloat16');
      const x = f64(3, 8).cast('bfloat16');
      const buffers = new GradientBuffers(new Map([['w', w]]));
      const total = buffers.buffers.get('w')!;
      expect(total.dtype).toBe('float32');
      vjp((t: Tensor) => linear(x, t), [w], zeros([3, 4], { dtype: 'bfloat16' }).add(1), { sinks: buffers.sinks() });
      const sums = [...Array(8).keys()].map((j) => [0, 1, 2].reduce((n, i) => n + x.dataSync()[i * 8 + j], 0));
      expect(values(total).slice(0, 8)).toEqual(sums.map(Math.fround));
      buffers.dispose();
    });
  });

  test('a sink is passed over where its backward is differentiated', () => {
    scope(() => {
      const [x, w] = [f64(3, 4), f64(2, 4)];
      const sink = new AccumulatingSink(zeros([2, 4], { dtype: 'float64' }));
      const norm = (t: Tensor): Tensor => {
        const [, [g]] = vjp(
          (u: Tensor) => linear(x, u).square().sum(),
          [t],
          Tensor.from(Float64Array.of(1), { shape: [] }),
          {
            sinks: [sink],
          },
        );
        return g.square().sum();
      };
      const [second] = grad(norm)(w);
      const plain = (t: Tensor): Tensor =>
        grad((u: Tensor) => linear(x, u).square().sum())(t)[0]
          .square()
          .sum();
      expect(values(second)).toEqual(values(grad(plain)(w)[0]));
      expect(values(sink.total).every((v) => v === 0)).toBe(true);
    });
  });

  test('a sink that throws leaves nothing behind', () => {
    const [x, w] = [f64(3, 4), f64(4)];
    const sink: GradientSink = {
      buffer: null,
      accept: () => {
        throw new Error('mine');
      },
    };
    const run = (): unknown =>
      vjp((t: Tensor) => x.mul(t).exp().sum(), [w], Tensor.from(Float64Array.of(1), { shape: [] }), { sinks: [sink] });
    expect(() => scope(run)).toThrow('mine');
    x.dispose();
    w.dispose();
  });
});
