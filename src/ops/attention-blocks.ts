// Attention for head dimensions beyond those of the kernels, from primitive ops: a block of rows at a time against the keys
// that it sees, run again in backward. Slow, but for any dimension, and without a T x T matrix.
import { checkpoint } from '../autograd/checkpoint.js';
import { accumulationDType } from '../tensor/dtype.js';
import { scope } from '../tensor/scope.js';
import { Tensor } from '../tensor/tensor.js';
import { mul, where } from './elementwise.js';
import { fused, vjpOf } from './fused.js';
import { cast, concat, emptyLike, full, permute, reshape, slice, transpose, unsqueeze } from './movement.js';
import { matmul } from './product.js';
import type { Segment, SegmentLayout } from './segments.js';
import { softmax } from './softmax.js';

const BLOCK = 128;

/** See groupedQueryAttention. */
export function attentionByBlocks(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, scale: number): Tensor {
  const definition = (a: Tensor, b: Tensor, c: Tensor): Tensor => blocks([a, b, c], layout, scale);
  return fused({
    name: 'groupedQueryAttention',
    inputs: [q, k, v],
    forward: () => ({ output: scope(() => definition(q.detach(), k.detach(), v.detach())), saved: [] }),
    definition,
    backward: ({ cotangents, saved, needs }) => vjpOf((...t) => [blocks(t, layout, scale)], saved, cotangents, needs),
  });
}

function blocks(inputs: readonly Tensor[], layout: SegmentLayout, scale: number): Tensor {
  const outputs = layout.segments.flatMap((segment) => {
    const parent = segment.parent >= 0 ? layout.segments[segment.parent] : null;
    return Array.from({ length: Math.ceil(segment.length / BLOCK) }, (_, i) => {
      const rows = { first: i * BLOCK, end: Math.min((i + 1) * BLOCK, segment.length) };
      return checkpoint((...t) => attend(t, segment, parent, rows, scale), ...inputs);
    });
  });
  return outputs.length > 0 ? concat(outputs) : emptyLike(inputs[0]);
}

/** Rows [first, end) of a segment: all rows of its parent and its own up to themselves are their keys. */
function attend(
  [q, k, v]: readonly Tensor[],
  { start }: Segment,
  parent: Segment | null,
  { first, end }: { first: number; end: number },
  scale: number,
): Tensor {
  const wide = accumulationDType(q.dtype);
  const seen = (t: Tensor): Tensor => {
    const own = slice(t, 0, start, start + end);
    return cast(parent?.length ? concat([slice(t, 0, parent.start, parent.start + parent.length), own]) : own, wide);
  };
  const rows = cast(slice(q, 0, start + first, start + end), wide);
  const visible = visibleKeys(parent?.length ?? 0, first, end, q.device);
  return cast(maskedAttention(rows, seen(k), seen(v), visible, scale), q.dtype);
}

/** Grouped-query attention of rows q `[R, Hq, D]` to keys and values `[N, Hk, D]` where bool `[R, N]` says so: R x N scores. */
export function maskedAttention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: number): Tensor {
  const [rows, heads, width] = q.shape;
  const groups = k.shape[1];
  const grouped = (t: Tensor): Tensor => unsqueeze(permute(t, [1, 0, 2]), 1);
  const queries = reshape(permute(q, [1, 0, 2]), [groups, heads / groups, rows, width]);
  const scores = mul(matmul(queries, transpose(grouped(k))), scale);
  const masked = where(visible, scores, full([1], Number.NEGATIVE_INFINITY, { dtype: scores.dtype, device: q.device }));
  const mixed = matmul(softmax(masked), grouped(v));
  return permute(reshape(mixed, [heads, rows, width]), [1, 0, 2]);
}

/** bool `[end - first, above + end]`. */
function visibleKeys(above: number, first: number, end: number, device: Tensor['device']): Tensor {
  const keys = above + end;
  const mask = new Uint8Array((end - first) * keys);
  for (let i = first; i < end; i++) mask.fill(1, (i - first) * keys, (i - first) * keys + above + i + 1);
  return cast(Tensor.from(mask, { shape: [end - first, keys], device }), 'bool');
}
