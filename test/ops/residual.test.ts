// The residual stream's gradients: addRmsNorm adds them in its own backward kernel, and keeps neither of its terms.
import { expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { vjp } from '../../src/autograd/transforms.js';
import { addRmsNorm } from '../../src/ops/transformer.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { recordLaunches } from '../support/launches.js';

const launched = recordLaunches();

const [rows, width] = [6, 5];
const of = (...shape: number[]): Tensor =>
  Tensor.from(
    Float64Array.from({ length: shape.reduce((a, b) => a * b) }, (_, i) => Math.sin(i + shape.length)),
    { shape },
  );

test('two branches: each backward is one kernel, whose gradient all three terms receive', () => {
  scope(() => {
    const inputs = [of(rows, width), of(rows, width), of(rows, width)];
    const weight = of(width);
    const f = (xs: Tensor[]): Tensor[] => {
      const [middle, first] = addRmsNorm(xs[0], xs[1], weight, 1e-5);
      const [out, second] = addRmsNorm(middle, xs[2], weight, 1e-5);
      return [first, out, second];
    };
    const cotangents = [of(rows, width), of(rows, width), of(rows, width)];
    launched.length = 0;
    const [, [gradients]] = vjp(f, [inputs], () => cotangents);
    expect(launched).toEqual(['addRmsNorm', 'addRmsNorm', 'rmsNormBackward', 'rmsNormBackward']);
    const [x, delta] = (gradients as Tensor[]).map((t) => [...t.dataSync()]);
    expect(x).toEqual(delta);
  });
});

test('without a cotangent of the norm, that of the sum passes through', () => {
  scope(() => {
    const g = of(rows, width);
    const f = (x: Tensor): Tensor => addRmsNorm(x, of(rows, width), of(width), 1e-5)[0];
    const [, [dx]] = vjp(f, [of(rows, width)], g);
    expect([...dx.dataSync()]).toEqual([...g.dataSync()]);
  });
});

test('neither term is kept for backward', () => {
  scope(() => {
    const weight = of(width);
    let held = 0;
    const f = (x: Tensor): Tensor => {
      const before = memory().allocated;
      const [sum, normed] = scope(() => addRmsNorm(x.mul(2), x.mul(3), weight, 1e-5));
      held = memory().allocated - before;
      return sum.mul(normed);
    };
    vjp(f, [of(rows, width)], of(rows, width));
    // Two outputs and 1/rms of each row; a multiple keeps its factor, a number.
    expect(held).toBeLessThan(3 * rows * width * 8);
    expect(held).toBeGreaterThanOrEqual(2 * rows * width * 8);
  });
});
