// Products: matmul and linear, over one kernel that takes any strides.
import { type Backward, type Contribution, type Cotangent, record } from '../autograd/tape.js';
import { launch } from '../native/launch.js';
import { isFloating, policyOf, promote } from '../tensor/dtype.js';
import { broadcastShapes, broadcastStrides } from '../tensor/shape.js';
import type { Tensor } from '../tensor/tensor.js';
import { bySequence, linearBackward, spread } from './backward.js';
import { mul } from './elementwise.js';
import { cast, emptyLike, reshape, transpose, unsqueeze } from './movement.js';
import { sum } from './reduce.js';
import type { SequenceStreams } from './streams.js';

function requireMatrices(op: string, a: Tensor, b: Tensor): void {
  if (a.ndim < 2 || b.ndim < 2 || a.shape[a.ndim - 1] !== b.shape[b.ndim - 2])
    throw new RangeError(
      `[${op}] expected [..., M, K] and [..., K, N], found ${a.describe()} and ${b.describe()}; try transpose or reshape`,
    );
  if (!isFloating(a.dtype) || !isFloating(b.dtype))
    throw new TypeError(`[${op}] expected floating tensors, found ${a.describe()} and ${b.describe()}; cast first`);
}

/** A view with the batch axes broadcast to `batch`. */
function withBatch(t: Tensor, batch: readonly number[]): Tensor {
  const shape = [...batch, ...t.shape.slice(-2)];
  return t.view(shape, broadcastStrides(t.shape, t.strides, shape));
}

/** out (+)= alpha * a @ b (+ bias), in place on `out`; see kernels.def. Shapes must agree exactly. Not differentiable. */
export function matmulInto(
  out: Tensor,
  a: Tensor,
  b: Tensor,
  options: { alpha?: number; accumulate?: boolean; bias?: Tensor | null } = {},
): void {
  out.storage.version++;
  if (out.size === 0) return;
  launch('matmul', [out, a, b, options.bias ?? null], [options.alpha ?? 1, options.accumulate ? 1 : 0]);
}

/** `[..., M, N]` from `[..., M, K]` and `[..., K, N]`; batch axes broadcast, vectors count as one row or column. */
export function matmul(a: Tensor, b: Tensor): Tensor {
  if (a.ndim === 1)
    return reshape(matmul(unsqueeze(a, 0), b), b.ndim === 1 ? [] : [...b.shape.slice(0, -2), b.shape[b.ndim - 1]]);
  if (b.ndim === 1) return reshape(matmul(a, unsqueeze(b, 1)), a.shape.slice(0, -1));
  requireMatrices('matmul', a, b);
  const dtype = promote(a.dtype, b.dtype);
  if (a.dtype !== dtype || b.dtype !== dtype) return matmul(cast(a, dtype), cast(b, dtype));
  const batch = broadcastShapes('matmul', a.shape.slice(0, -2), b.shape.slice(0, -2));
  const out = emptyLike(a, [...batch, a.shape[a.ndim - 2], b.shape[b.ndim - 1]]);
  if (out.size > 0) {
    const views = [withBatch(a, batch), withBatch(b, batch)];
    matmulInto(out, views[0], views[1]);
    for (const v of views) v.dispose();
  }
  return record('matmul', [a, b], [out], [a, b], ({ g, saved: [x, y], needs }) => [
    needs[0] ? matmul(g, transpose(y)) : null,
    needs[1] ? matmul(transpose(x), g) : null,
  ])[0];
}

/** The gradient of a weight `[out, in]` behind y = x wᵀ: scale * gᵀ x, from rows x [R, in] and g [R, out]. */
export class LinearContribution implements Contribution {
  readonly kind = 'linear';
  readonly shape: readonly number[];
  readonly x: Tensor;
  readonly g: Tensor;
  readonly scale: number;
  /** Set where the rows of g lie sequence by sequence; those of x are rows of the packed axis. */
  readonly streams: SequenceStreams | null;
  constructor(x: Tensor, g: Tensor, scale = 1, streams: SequenceStreams | null = null) {
    this.x = x;
    this.g = g;
    this.scale = scale;
    this.streams = streams;
    this.shape = [g.shape[1], x.shape[1]];
  }
  materialize(): Tensor {
    const product = matmul(transpose(this.g), spread(this.x, this.streams));
    return this.scale === 1 ? product : mul(product, this.scale);
  }
  /** into[out, in] += scale * the contribution. */
  addTo(into: Tensor, scale: number): void {
    const gt = transpose(this.g.node ? this.g.detach() : this.g);
    const wide = into.dtype === this.x.dtype || (into.dtype === 'float32' && this.x.dtype === 'bfloat16');
    const x = spread(this.x.node ? this.x.detach() : this.x, this.streams);
    matmulInto(into, gt, wide ? x : cast(x, into.dtype), {
      alpha: scale * this.scale,
      accumulate: true,
    });
    gt.dispose();
  }
}

/** x seen as rows `[R, last]`. */
export const asRows = (x: Tensor): Tensor => reshape(x, [-1, x.shape[x.ndim - 1]]);

/** Throws unless x weightᵀ + bias is defined. */
export function requireLinear(op: string, x: Tensor, weight: Tensor, bias: Tensor | null = null): void {
  if (weight.ndim !== 2 || x.ndim < 1 || x.shape[x.ndim - 1] !== weight.shape[1])
    throw new RangeError(
      `[${op}] expected x [..., in] and weight [out, in], found ${x.describe()} and ${weight.describe()}`,
    );
  if (x.dtype !== weight.dtype)
    throw new TypeError(
      `[${op}] expected x and weight of one dtype, found ${x.describe()} and ${weight.describe()}; cast one`,
    );
  if (bias && (bias.ndim !== 1 || bias.shape[0] !== weight.shape[0] || bias.dtype !== weight.dtype))
    throw new RangeError(
      `[${op}] expected a bias [out] like weight ${weight.describe()}, found ${bias.describe()}; reshape or cast it`,
    );
}

/** y = x weightᵀ + bias: `[..., out]` from `x [..., in]`, `weight [out, in]`, `bias [out]`. */
export function linear(x: Tensor, weight: Tensor, bias: Tensor | null = null): Tensor {
  requireLinear('linear', x, weight, bias);
  const rows = asRows(x);
  const out = emptyLike(x, [rows.shape[0], weight.shape[0]]);
  const wt = weight.view([weight.shape[1], weight.shape[0]], [weight.strides[1], weight.strides[0]]);
  matmulInto(out, rows, wt, { bias });
  wt.dispose();
  const inputs = bias ? [rows, weight, bias] : [rows, weight];
  const backward: Backward = ({ g, saved: [r, w], needs, streams }) => [
    needs[0] ? linearBackward(g, w) : null,
    needs[1] ? new LinearContribution(r, g, 1, streams) : null,
    needs[2] ? biasCotangent(g, streams) : null,
  ];
  const y = record('linear', inputs, [out], [rows, weight], backward, x.ndim === 2)[0];
  return x.ndim === 2 ? y : reshape(y, [...x.shape.slice(0, -1), weight.shape[0]]);
}

/** The cotangent of a bias behind rows g `[R, out]`. */
export function biasCotangent(g: Tensor, streams: SequenceStreams | null): Cotangent {
  if (streams) return new VectorContribution(bySequence(g, streams));
  return sum(g.dtype === 'bfloat16' ? cast(g, 'float32') : g, { axes: 0 });
}

/** The gradient of a vector (a bias, a norm's weight) apart for each sequence: `[S, n]` in the accumulation dtype. */
export class VectorContribution implements Contribution {
  readonly kind = 'vector';
  readonly shape: readonly number[];
  readonly bySequence: Tensor;
  constructor(bySequence: Tensor) {
    this.bySequence = bySequence;
    this.shape = [bySequence.shape[1]];
  }
  materialize(): Tensor {
    return sum(this.bySequence, { axes: 0 });
  }
}

/** A zeroed accumulation buffer for the gradient of `like`: float32 for bfloat16, else its dtype. */
export function gradientBuffer(like: Tensor): Tensor {
  const t = emptyLike(like, like.shape, policyOf(like.dtype).gradients);
  launch('fill', [t], [0]);
  return t;
}
