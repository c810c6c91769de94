// Global gradient norms and clipping, on the device.
import { launch } from '../native/launch.js';
import { add, minimum, mul, notEqual, rdiv } from '../ops/elementwise.js';
import { cast, reshape, zeros } from '../ops/movement.js';
import type { Tensor } from '../tensor/tensor.js';

/** Sum of squares over all tensors: float64 `[1]`, accumulated in float64 in a fixed order. */
export function sumOfSquares(tensors: Iterable<Tensor>): Tensor {
  const list = [...tensors];
  const total = zeros([1], { dtype: 'float64', device: list[0]?.device });
  if (list.length > 0) launch('sumSquares', [total, ...list], [0]);
  return total;
}

/** min(1, maxNorm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_; 1 where maxNorm is 0. `norm` is float64 `[1]`. */
export function clipFactor(norm: Tensor, maxNorm: number): Tensor {
  if (maxNorm === 0) return add(mul(norm, 0), 1);
  return minimum(rdiv(add(norm, 1e-6), maxNorm), 1);
}

/** float64 `[1]`: 1 where some value is infinite or NaN, else 0. */
export function nonFinite(values: readonly Tensor[]): Tensor {
  const probe = values.map((v) => mul(reshape(cast(v, 'float64'), [1]), 0)).reduce((a, b) => add(a, b));
  return cast(notEqual(probe, 0), 'float64');
}
