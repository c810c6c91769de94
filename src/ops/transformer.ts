// The fused ops of a transformer block: RMSNorm, alone and of a residual sum, rotary embedding, SwiGLU, attention over packed
// segments. Its linears: lora.ts.
import { type Backward, type BackwardContext, type Cotangent, record, trackedMask } from '../autograd/tape.js';
import { launch } from '../native/launch.js';
import { accumulationDType } from '../tensor/dtype.js';
import { sameShape } from '../tensor/shape.js';
import { Tensor } from '../tensor/tensor.js';
import { attentionByBlocks, maskedAttention } from './attention-blocks.js';
import { attentionBackward, rmsNormBackward, swigluBackward } from './backward.js';
import { add, mul, neg, rsqrt, silu, square, sub } from './elementwise.js';
import { fused } from './fused.js';
import { cast, concat, contiguous, emptyLike, gatherRows, reshape, slice, unsqueeze } from './movement.js';
import { asRows, VectorContribution } from './product.js';
import { mean } from './reduce.js';
import type { SegmentLayout } from './segments.js';

const statsLike = (x: Tensor, shape: readonly number[]): Tensor => emptyLike(x, shape, accumulationDType(x.dtype));

/** A contiguous tensor off the tape, for kernels; dispose of it. */
const bare = (x: Tensor): Tensor => (x.contiguous ? x.detach() : contiguous(x.detach()));

/** Zeroed buffer for a gradient that a kernel accumulates into, in the accumulation dtype. */
function accumulator(like: Tensor): Tensor {
  const t = statsLike(like, like.shape);
  launch('fill', [t], [0]);
  return t;
}

/** rmsNorm from primitive ops. */
export function rmsNormDefinition(x: Tensor, weight: Tensor, eps: number): Tensor {
  const rstd = rsqrt(add(mean(square(x), { axes: -1, keepDims: true }), eps));
  return mul(mul(x, rstd), weight);
}

function requireNormWeight(op: string, x: Tensor, weight: Tensor): void {
  if (weight.ndim !== 1 || weight.shape[0] !== x.shape[x.ndim - 1] || weight.dtype !== x.dtype)
    throw new RangeError(
      `[${op}] expected x [..., H] and weight [H] of one dtype, found ${x.describe()} and ${weight.describe()}`,
    );
}

/** What a norm sends back: to x, with `sum` added to it (what x is sent from elsewhere), and to its weight. */
function normCotangents(
  { saved, buffer, differentiable, streams }: BackwardContext,
  g: Tensor,
  sum: Tensor | null,
  eps: number,
  wanted: { x: boolean; weight: number | null },
): { dx: Tensor | null; dweight: Cotangent } {
  const [x, w, rstd] = saved;
  if (differentiable || streams) {
    const [dx, dweight] = rmsNormBackward(g, x, w, rstd, sum, eps, streams);
    return { dx, dweight: streams ? new VectorContribution(dweight) : reshape(dweight, w.shape) };
  }
  const [input, dy, more] = [bare(x), bare(g), sum && bare(sum)];
  const dx = wanted.x ? emptyLike(input) : null;
  const sink = wanted.weight === null ? null : buffer(wanted.weight);
  const dw = wanted.weight === null ? null : (sink ?? accumulator(w));
  if (input.size > 0) launch('rmsNormBackward', [dx, dw, dy, input, bare(w), rstd, null, dx && more]);
  return { dx, dweight: sink ? null : dw };
}

/** x / sqrt(mean(x²) + eps) * weight over the last axis: x `[..., H]`, weight `[H]` (Zhang and Sennrich 2019). */
export function rmsNorm(x: Tensor, weight: Tensor, eps: number): Tensor {
  requireNormWeight('rmsNorm', x, weight);
  const rows = asRows(x);
  const y = fused({
    name: 'rmsNorm',
    inputs: [rows, weight],
    forward: () => {
      const output = emptyLike(rows);
      const rstd = statsLike(rows, [rows.shape[0]]);
      const [flat, scales] = [bare(rows), bare(weight)];
      if (output.size > 0) launch('rmsNorm', [output, rstd, flat, scales], [eps]);
      flat.dispose();
      scales.dispose();
      return { output, saved: [rstd] };
    },
    definition: (a, w) => rmsNormDefinition(a, w, eps),
    differentiable: true,
    streamed: x.ndim === 2,
    backward: (context) => {
      const { g, needs } = context;
      const { dx, dweight } = normCotangents(context, g, null, eps, { x: needs[0], weight: needs[1] ? 1 : null });
      return [dx, dweight];
    },
  });
  return x.ndim === 2 ? y : reshape(y, x.shape);
}

/** addRmsNorm from primitive ops. */
export function addRmsNormDefinition(x: Tensor, delta: Tensor, weight: Tensor, eps: number): [Tensor, Tensor] {
  const sum = add(x, delta);
  return [sum, rmsNormDefinition(sum, weight, eps)];
}

/**
 * What a residual branch adds, and the norm of the sum: `[x + delta, rmsNorm(x + delta, weight)]` for x and delta `[R, H]`, the
 * same bits as by the two ops. One pass over memory for both; backward adds what the sum is sent to what the norm sends, in
 * that pass, so that no gradients of the residual stream are added by themselves. Neither x nor delta is kept.
 */
export function addRmsNorm(x: Tensor, delta: Tensor, weight: Tensor, eps: number): [sum: Tensor, normed: Tensor] {
  requireNormWeight('addRmsNorm', x, weight);
  if (x.ndim !== 2 || !sameShape(x.shape, delta.shape) || x.dtype !== delta.dtype)
    throw new RangeError(
      `[addRmsNorm] expected x and delta [R, H] of one dtype, found ${x.describe()} and ${delta.describe()}`,
    );
  const [sum, normed] = [emptyLike(x), emptyLike(x)];
  const rstd = statsLike(x, [x.shape[0]]);
  const inputs = [x, delta, weight].map(bare);
  if (sum.size > 0) launch('addRmsNorm', [sum, normed, rstd, ...inputs], [eps]);
  for (const t of inputs) t.dispose();
  const backward: Backward = (context) => {
    const { cotangents, needs } = context;
    const [forSum, g] = cotangents;
    if (!g) return [forSum, forSum, null];
    const wanted = { x: needs[0] || needs[1], weight: needs[2] ? 2 : null };
    const { dx, dweight } = normCotangents(context, g, forSum, eps, wanted);
    return [dx, dx, dweight];
  };
  const outputs: [Tensor, Tensor] = [sum, normed];
  return record('addRmsNorm', [x, delta, weight], outputs, [sum, weight, rstd], backward, true);
}

/** rotaryEmbedding from primitive ops. */
export function rotaryDefinition(x: Tensor, positions: Tensor, table: Tensor, inverse = false): Tensor {
  const half = x.shape[2] / 2;
  const rows = cast(gatherRows(table, positions), x.dtype);
  const cos = unsqueeze(slice(rows, 1, 0, half), 1);
  const sin = unsqueeze(slice(rows, 1, half, 2 * half), 1);
  const turned = inverse ? neg(sin) : sin;
  const a = slice(x, 2, 0, half);
  const b = slice(x, 2, half, 2 * half);
  return concat([sub(mul(a, cos), mul(b, turned)), add(mul(b, cos), mul(a, turned))], 2);
}

/**
 * Rotary position embedding (Su et al. 2021) in Hugging Face's layout of two halves: x `[T, heads, D]`, int32 `positions [T]`,
 * table `[P, D]` of cosines and sines (ropeTable). Linear in x: its gradient is the inverse rotation, its own kind of op.
 */
export function rotaryEmbedding(x: Tensor, positions: Tensor, table: Tensor, inverse = false): Tensor {
  if (
    x.ndim !== 3 ||
    x.shape[2] % 2 !== 0 ||
    table.ndim !== 2 ||
    table.shape[1] !== x.shape[2] ||
    table.dtype !== accumulationDType(x.dtype) ||
    positions.dtype !== 'int32' ||
    positions.size !== x.shape[0]
  )
    throw new RangeError(
      `[rotaryEmbedding] expected x [T, heads, D] with D even, int32 positions [T], table [P, D] in ${accumulationDType(x.dtype)}, found ${x.describe()}, ${positions.describe()}, ${table.describe()}`,
    );
  if (trackedMask([table]) !== 0)
    throw new Error(
      '[rotaryEmbedding] has no derivative for its table; detach() it, or differentiate rotaryDefinition',
    );
  const out = emptyLike(x);
  const input = x.strides[2] === 1 ? x.detach() : bare(x);
  const [rows, angles] = [bare(positions), bare(table)];
  if (out.size > 0) launch('rotary', [out, input, rows, angles], [inverse ? 1 : 0]);
  for (const t of [input, rows, angles]) t.dispose();
  const backward: Backward = ({ g, saved: [p, t], streams }) => [
    rotaryEmbedding(g, streams ? streams.layout.on(g.device).positions : p, t, !inverse),
  ];
  return record('rotaryEmbedding', [x], [out], [positions, table], backward, true)[0];
}

/** silu(gate) * up (Shazeer 2020), any equal shapes. */
export function swiglu(gate: Tensor, up: Tensor): Tensor {
  if (!sameShape(gate.shape, up.shape) || gate.dtype !== up.dtype)
    throw new RangeError(
      `[swiglu] expected gate and up of one shape and dtype, found ${gate.describe()} and ${up.describe()}`,
    );
  const inputs = [asRows(gate), asRows(up)];
  const y = fused({
    name: 'swiglu',
    inputs,
    forward: () => {
      const output = emptyLike(gate, inputs[0].shape);
      const [a, b] = inputs.map((t) => (t.strides[1] === 1 ? t.detach() : bare(t)));
      if (output.size > 0) launch('swiglu', [output, a, b]);
      a.dispose();
      b.dispose();
      return { output, saved: [] };
    },
    definition: (a, b) => mul(silu(a), b),
    differentiable: true,
    streamed: gate.ndim === 2,
    backward: ({ g, saved: [a, b], streams }) => swigluBackward(g, a, b, streams),
  });
  return gate.ndim === 2 ? y : reshape(y, gate.shape);
}

/** Of the kernels of attention, on every device. */
const mostHeadDimension = 256;

/** Attention from primitive ops: dense scores with a mask. For tests and derivatives of higher order: O(T²) memory. */
export function attentionDefinition(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, scale: number): Tensor {
  const rows = layout.total;
  const visible = cast(Tensor.from(layout.visibility(), { shape: [rows, rows], device: q.device }), 'bool');
  return maskedAttention(q, k, v, visible, scale);
}

/**
 * Causal grouped-query attention over packed segments: q `[T, Hq, D]`, k and v `[T, Hk, D]`, Hq a multiple of Hk. Rows of
 * a segment see its parent's rows and their own up to themselves. Memory is linear in T.
 * Beyond a D of 256, which the kernels take, primitive ops do the work: slower, and without a rule for gradients by sequence.
 *
 * @param scale of the scores; 1/sqrt(D) by default
 */
export function groupedQueryAttention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  layout: SegmentLayout,
  scale: number = 1 / Math.sqrt(q.shape[2]),
): Tensor {
  if (
    q.ndim !== 3 ||
    k.ndim !== 3 ||
    v.ndim !== 3 ||
    q.shape[0] !== layout.total ||
    k.shape[0] !== layout.total ||
    q.shape[1] % k.shape[1] !== 0 ||
    q.shape[2] !== k.shape[2] ||
    !sameShape(k.shape, v.shape) ||
    q.dtype !== k.dtype ||
    q.dtype !== v.dtype
  )
    throw new RangeError(
      `[groupedQueryAttention] expected q [T, Hq, D] and k, v [T, Hk, D] of one dtype with T = ${layout.total} and Hq a multiple of Hk, found ${q.describe()}, ${k.describe()}, ${v.describe()}`,
    );
  if (q.shape[2] > mostHeadDimension) return attentionByBlocks(q, k, v, layout, scale);
  const rowMajor = (t: Tensor): Tensor => (t.strides[2] === 1 ? t.detach() : bare(t));
  const { segments } = layout.on(q.device);
  return fused({
    name: 'groupedQueryAttention',
    inputs: [q, k, v],
    forward: () => {
      const output = emptyLike(q, q.shape);
      const lse = statsLike(q, q.shape.slice(0, 2));
      const [a, b, c] = [q, k, v].map(rowMajor);
      if (output.size > 0) launch('attention', [output, lse, a, b, c, segments], [scale]);
      for (const t of [a, b, c]) t.dispose();
      return { output, saved: [output, lse, segments] };
    },
    definition: (a, b, c) => attentionDefinition(a, b, c, layout, scale),
    differentiable: true,
    streamed: true,
    backward: ({ g, saved: [a, b, c, out, lse, packed], streams }) =>
      attentionBackward(g, [a, b, c], { out, lse, segments: packed }, layout, scale, streams),
  });
}
