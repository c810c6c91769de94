// Gradient checks by finite differences in float64: of first derivatives, and of derivatives of derivatives.

import { mul } from '../ops/elementwise.js';
import { sum } from '../ops/reduce.js';
import { scope } from '../tensor/scope.js';
import { Tensor } from '../tensor/tensor.js';
import { leavesOf, vjp } from './transforms.js';

export interface GradcheckOptions {
  /** Step of the central difference, relative to max(1, |x|). */
  epsilon?: number;
  /** Allowed |analytic - numeric| beyond relative * |numeric|. */
  absolute?: number;
  relative?: number;
  /** Fails with an error instead of returning ok = false. */
  throws?: boolean;
}

export interface GradcheckReport {
  ok: boolean;
  /** The element with the largest excess over its tolerance. */
  worst: { input: number; index: number[]; analytic: number; numeric: number; error: number } | null;
  checked: number;
}

const defaults = { epsilon: 1e-5, absolute: 1e-7, relative: 1e-6, throws: true };

/** A fixed, irregular weighting of f's outputs, so that every output matters and none cancels. */
function weightsFor(y: Tensor, salt: number): Tensor {
  const values = Float64Array.from(
    { length: y.size },
    (_, i) => Math.sin(1.7 * i + salt) + 0.5 * Math.cos(0.3 * i * salt + 1),
  );
  return Tensor.from(values, { shape: y.shape, device: y.device });
}

function unravel(index: number, shape: readonly number[]): number[] {
  const out: number[] = [];
  for (let i = shape.length - 1; i >= 0; i--) {
    out.unshift(index % shape[i]);
    index = Math.floor(index / shape[i]);
  }
  return out;
}

/**
 * Compares the gradient of `f` for every float64 input with central differences, element by element. Other inputs (ids,
 * masks) are passed through.
 *
 * @param f a function of tensors to a tensor, or an array of tensors
 * @throws when `throws` is set (default) and an element is off, naming the worst one; when an input is float32 or bfloat16
 */
export function gradcheck(
  f: (...inputs: Tensor[]) => Tensor | Tensor[],
  inputs: readonly Tensor[],
  options: GradcheckOptions = {},
): GradcheckReport {
  const { epsilon, absolute, relative, throws } = { ...defaults, ...options };
  inputs.forEach((t, i) => {
    if (t.dtype === 'float32' || t.dtype === 'bfloat16')
      throw new TypeError(
        `[gradcheck] expected float64 inputs (finite differences need them), found input ${i}: ${t.describe()}`,
      );
  });
  const wanted = inputs.map((t, i) => (t.dtype === 'float64' ? i : -1)).filter((i) => i >= 0);
  const call = (values: readonly Tensor[]): Tensor[] => {
    let at = 0;
    return [f(...inputs.map((t) => (t.dtype === 'float64' ? values[at++] : t)))].flat();
  };
  const scalar = (values: readonly Tensor[]): number =>
    scope(() => call(values).reduce((total, y, k) => total + sum(mul(y, weightsFor(y, k + 1))).item(), 0));

  const floats = wanted.map((i) => inputs[i]);
  const analytic = scope(() =>
    vjp(
      (xs: Tensor[]) => call(xs),
      [floats],
      (ys) => ys.map((y, k) => weightsFor(y, k + 1)),
    )[1][0].map((g) => g.dataSync()),
  );
  let worst: GradcheckReport['worst'] = null;
  let excess = Number.NEGATIVE_INFINITY;
  let checked = 0;
  floats.forEach((x, which) => {
    const base = Float64Array.from(x.dataSync());
    for (let i = 0; i < base.length; i++) {
      const step = epsilon * Math.max(1, Math.abs(base[i]));
      const at = (delta: number): number =>
        scope(() => {
          const moved = Float64Array.from(base);
          moved[i] += delta;
          return scalar(
            floats.map((t, k) => (k === which ? Tensor.from(moved, { shape: x.shape, device: x.device }) : t)),
          );
        });
      // Fourth order: the error of the difference stays far below the tolerance.
      const numeric = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step);
      const error = Math.abs(analytic[which][i] - numeric);
      const over = Number.isNaN(error) ? Number.POSITIVE_INFINITY : error - absolute - relative * Math.abs(numeric);
      checked++;
      if (over > excess) {
        excess = over;
        worst = { input: wanted[which], index: unravel(i, x.shape), analytic: analytic[which][i], numeric, error };
      }
    }
  });
  const report: GradcheckReport = { ok: excess <= 0 || checked === 0, worst, checked };
  if (!report.ok && throws) throw new Error(describe('gradcheck', report));
  return report;
}

function describe(name: string, { worst }: GradcheckReport): string {
  const w = worst!;
  return `[${name}] input ${w.input} at [${w.index}]: expected the numeric derivative ${w.numeric}, found ${w.analytic} (off by ${w.error}); check the backward rule`;
}

/**
 * Gradcheck of the gradient: differentiates `f`'s vjp once more, for its inputs and for the cotangent. Exercises the rule of
 * every op that the backward pass uses.
 */
export function gradgradcheck(
  f: (...inputs: Tensor[]) => Tensor,
  inputs: readonly Tensor[],
  options: GradcheckOptions = {},
): GradcheckReport {
  const cotangent = scope(() => weightsFor(f(...inputs), 3));
  const isFloat = inputs.map((t) => t.dtype === 'float64');
  const gradient = (...all: Tensor[]): Tensor[] => {
    const u = all[all.length - 1];
    const given = all.slice(0, -1);
    const floats = given.filter((_, i) => isFloat[i]);
    const [, [cotangents]] = vjp(
      (xs: Tensor[]) => {
        let at = 0;
        return f(...given.map((t, i) => (isFloat[i] ? xs[at++] : t)));
      },
      [floats],
      u,
    );
    return leavesOf(cotangents);
  };
  try {
    return gradcheck(gradient, [...inputs, cotangent], options);
  } catch (error) {
    throw new Error((error as Error).message.replace('[gradcheck]', '[gradgradcheck]'), { cause: error });
  } finally {
    cotangent.dispose();
  }
}
