// Softmax and its kin along the last axis, with the maximum subtracted, in float32 at least.
import { record } from '../autograd/tape.js';
import { launch } from '../native/launch.js';
import type { Tensor } from '../tensor/tensor.js';
import { exp, mul, sub } from './elementwise.js';
import { contiguous, emptyLike, unsqueeze } from './movement.js';
import { sum } from './reduce.js';

function rowKernel(kernel: string, x: Tensor, shape: readonly number[]): Tensor {
  if (x.ndim === 0) throw new RangeError(`[${kernel}] expected at least one axis, found ${x.describe()}`);
  const out = emptyLike(x, shape);
  if (x.size === 0) return out;
  const compact = contiguous(x.detach());
  const width = x.shape[x.ndim - 1];
  const rows = compact.view([x.size / width, width], [width, 1]);
  const flat =
    shape.length === x.ndim ? out.view([x.size / width, width], [width, 1]) : out.view([x.size / width], [1]);
  launch(kernel, [flat, rows]);
  for (const t of [compact, rows, flat]) t.dispose();
  return out;
}

/** exp(x) / sum(exp(x)). */
export function softmax(x: Tensor): Tensor {
  const y = rowKernel('softmax', x, x.shape);
  return record('softmax', [x], [y], [y], ({ g, saved: [p] }) => {
    const inner = sum(mul(g, p), { axes: -1, keepDims: true });
    return [mul(p, sub(g, inner))];
  })[0];
}

/** x - log(sum(exp(x))). */
export function logSoftmax(x: Tensor): Tensor {
  const y = rowKernel('logSoftmax', x, x.shape);
  return record('logSoftmax', [x], [y], [y], ({ g, saved: [l] }) => {
    const total = sum(g, { axes: -1, keepDims: true });
    return [sub(g, mul(exp(l), total))];
  })[0];
}

/** log(sum(exp(x))): the last axis goes. */
export function logSumExp(x: Tensor): Tensor {
  const y = rowKernel('logSumExp', x, x.shape.slice(0, -1));
  return record('logSumExp', [x], [y], [x], ({ g, saved: [input] }) => [mul(softmax(input), unsqueeze(g, g.ndim))])[0];
}
