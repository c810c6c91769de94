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
import type { SequenceStreams } from './streams.js';

export interface EmbeddingGradient {
  readonly head: HeadContribution | null;
  readonly lookup: LookupContribution | null;
}

/** `[S]` in the accumulation dtype. */
export function embeddingSquares({ head, lookup }: EmbeddingGradient, streams: SequenceStreams): Tensor {
  const dtype = accumulationDType((head?.hidden ?? lookup!.g).dtype);
  const hidden = head && cast(head.hidden, dtype);
  const rows = lookup && cast(lookup.g, dtype);
  return stack(
    streams.sequences.map((sequence, s) => {
      const { rows: r, targets: t } = sequence;
      const g = rows && slice(rows, 0, r.start, r.start + r.length);
      const h = hidden && slice(hidden, 0, t.start, t.start + t.length);
      const terms: Tensor[] = [];
      if (g) {
        const ids = rowsOf(lookup.ids, r.start, r.length);
        const same = cast(equal(unsqueeze(ids, 0), unsqueeze(ids, 1)), dtype);
        terms.push(sum(mul(matmul(g, transpose(g)), same)));
      }
      if (h) terms.push(sum(mul(matmul(h, transpose(h)), squareOf(head.gram!, s, t.length))));
      if (g && h) {
        const atRows = slice(slice(head.probes!, 0, t.start, t.start + t.length), 1, 0, r.length);
        terms.push(mul(sum(mul(matmul(h, transpose(g)), atRows)), 2));
      }
      return terms.reduce((a, b) => add(a, b));
    }),
  );
}
