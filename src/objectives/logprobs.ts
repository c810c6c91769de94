// Sequence log-probabilities: log π(y|x) = Σ_t log p(y_t | x, y_<t) over scored tokens (spo.md §1).
import { reshape, scatterRows, unsqueeze } from '../ops/movement.js';
import type { Tensor } from '../tensor/tensor.js';

/**
 * Sums token log-probabilities by sequence, in a fixed order: `[S]` from tokens `[N]` and int32 `sequences [N]`, which says
 * to which of `count` sequences each token belongs.
 */
export function sequenceLogProbs(tokens: Tensor, sequences: Tensor, count: number): Tensor {
  return reshape(scatterRows(unsqueeze(tokens, 1), sequences, count), [count]);
}
