// The squared norm of each sequence's gradient of an embedding matrix, as a differentiable function: looked up (rows of
// cotangents G at ids), used as the head (Dᵀ h over its targets), or both. With L the scattered rows,
//   |L + Dᵀh|² = <[id_r = id_s], G Gᵀ> + 2 <D at the ids of the rows, h Gᵀ> + <D Dᵀ, h hᵀ>:
// nothing of the vocabulary's size but what the head's kernels pass over.
import { accumulationDType } from '../tensor/dtype.js';
import type { Tensor } from '../tensor/tensor.js';
import { rowsOf } from './backward.js';
import { add, equal, mul } from './elementwise.js';
import { type HeadContribution, squareOf } from './head-backward.js';
import { cast, type LookupContribution, slice, stack, transpose, unsqueeze } from './movement.js';
import { matmul } from './product.js';
import { sum } from './reduce.js';
import type { HeadGroup, SequenceStreams, Span } from './streams.js';

export interface EmbeddingGradient {
  readonly head: HeadContribution | null;
  readonly lookup: LookupContribution | null;
}

export interface EmbeddingProducts {
  /** `[S]` in the accumulation dtype. */
  readonly squares: Tensor;
  /** The inner products of the two sequences of each group, `[groups]`, where groups are pairs; else null. */
  readonly inner: Tensor | null;
}

/** Squares and inner products of the sequences' gradients of an embedding matrix. */
export function embeddingProducts({ head, lookup }: EmbeddingGradient, streams: SequenceStreams): EmbeddingProducts {
  const dtype = accumulationDType((head?.hidden ?? lookup!.g).dtype);
  const hidden = head && cast(head.hidden, dtype);
  const rows = lookup && cast(lookup.g, dtype);
  const squares: Tensor[] = [];
  const inner: Tensor[] = [];
  streams.headGroups.forEach((group, i) => {
    const products = groupProducts({ head, lookup }, { hidden, rows }, group, i);
    const between = (a: number, b: number): Tensor =>
      blockSum(products, group, streams.sequences[a], streams.sequences[b]);
    for (const s of group.sequences) squares[s] = between(s, s);
    const [first, second] = group.sequences;
    if (second !== undefined) inner.push(between(first, second));
  });
  return { squares: stack(squares), inner: inner.length > 0 ? stack(inner) : null };
}

interface GroupProducts {
  /** `[rows, rows]`, `[targets, targets]`, `[targets, rows]`. */
  readonly lookups: Tensor | null;
  readonly heads: Tensor | null;
  readonly mixed: Tensor | null;
}

/** Elementwise products whose sums over two sequences' blocks are the inner products of their gradients. */
function groupProducts(
  { head, lookup }: EmbeddingGradient,
  { hidden, rows }: { hidden: Tensor | null; rows: Tensor | null },
  { rows: r, targets: t }: HeadGroup,
  index: number,
): GroupProducts {
  const g = rows && slice(rows, 0, r.start, r.start + r.length);
  const h = hidden && slice(hidden, 0, t.start, t.start + t.length);
  const same = (): Tensor => {
    const ids = rowsOf(lookup!.ids, r.start, r.length);
    return cast(equal(unsqueeze(ids, 0), unsqueeze(ids, 1)), g!.dtype);
  };
  const atRows = (): Tensor => slice(slice(head!.probes!, 0, t.start, t.start + t.length), 1, 0, r.length);
  return {
    lookups: g && mul(matmul(g, transpose(g)), same()),
    heads: h && mul(matmul(h, transpose(h)), squareOf(head!.gram!, index, t.length)),
    mixed: g && h && mul(matmul(h, transpose(g)), atRows()),
  };
}

type Place = { readonly rows: Span; readonly targets: Span };

/** <gradient of a, gradient of b> from the blocks of their rows and targets. */
function blockSum({ lookups, heads, mixed }: GroupProducts, group: HeadGroup, a: Place, b: Place): Tensor {
  const block = (x: Tensor, first: Span, second: Span, from: Place, to: Place): Tensor => {
    const [i, j] = [first.start - from.rows.start, second.start - to.rows.start];
    return sum(slice(slice(x, 0, i, i + first.length), 1, j, j + second.length));
  };
  const byTarget: Place = { rows: group.targets, targets: group.targets };
  const terms: Tensor[] = [];
  if (lookups) terms.push(block(lookups, a.rows, b.rows, group, group));
  if (heads) terms.push(block(heads, a.targets, b.targets, byTarget, byTarget));
  if (mixed)
    terms.push(add(block(mixed, a.targets, b.rows, byTarget, group), block(mixed, b.targets, a.rows, byTarget, group)));
  return terms.reduce((x, y) => add(x, y));
}
