// Packed batches of the examples a step names, and log-probabilities of whole data sets without gradients.
import {
  type PackedBatch,
  type PairIds,
  packPairs,
  packSequences,
  type SequenceIds,
  uploadBatch,
} from '../data/packing.js';
import type { CausalLM } from '../models/causal-lm.js';
import type { ModelParameters } from '../models/parameters.js';
import { sequenceLogProbs } from '../objectives/logprobs.js';
import { mul } from '../ops/elementwise.js';
import { accumulationDType } from '../tensor/dtype.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import { Tensor } from '../tensor/tensor.js';

export interface PairScores {
  chosen: Float64Array;
  rejected: Float64Array;
}

/**
 * Sums of scored log-probabilities by sequence, `[S]`, owned by the caller; nothing is recorded.
 * @param weights of the scored tokens, `[N]`; null for 1 each
 */
export function scoreBatch(
  model: CausalLM,
  parameters: ModelParameters,
  batch: PackedBatch,
  weights: Float64Array | null = null,
): Tensor {
  return detachFromScope(
    scope(() => {
      const dtype = accumulationDType(model.dtype);
      const tensors = uploadBatch(batch, model.device, dtype);
      const { logProbs } = model.logProbs(parameters, tensors.ids, batch.layout, tensors.targets);
      const weighed = weights ? mul(logProbs, Tensor.from(weights, { dtype, device: model.device })) : logProbs;
      return sequenceLogProbs(weighed, tensors.sequences, batch.lengths.length);
    }),
  );
}

export interface ScoreOptions {
  batchSize: number;
  /** Weights of the scored tokens of a batch; 1 each by default. */
  weigh?: (batch: PackedBatch) => Float64Array | null;
  signal?: AbortSignal;
  onBatch?: (done: number) => void;
}

/** Scores `items` in batches; hands each batch's sums to `take`. Yields to the event loop between batches. */
async function scoreAll<T>(
  model: CausalLM,
  parameters: ModelParameters,
  items: readonly T[],
  options: ScoreOptions & { pack: (part: readonly T[]) => PackedBatch },
  take: (sums: ArrayLike<number>, start: number, count: number) => void,
): Promise<void> {
  for (let start = 0; start < items.length && !options.signal?.aborted; start += options.batchSize) {
    const part = items.slice(start, start + options.batchSize);
    const batch = options.pack(part);
    using _ = batch.layout;
    using values = scoreBatch(model, parameters, batch, options.weigh?.(batch));
    take(await values.data(), start, part.length);
    options.onBatch?.(start + part.length);
  }
}

/** log π of chosen and rejected responses of `pairs`. */
export async function scorePairs(
  model: CausalLM,
  parameters: ModelParameters,
  pairs: readonly PairIds[],
  options: ScoreOptions,
): Promise<PairScores> {
  const scores = { chosen: new Float64Array(pairs.length), rejected: new Float64Array(pairs.length) };
  await scoreAll(model, parameters, pairs, { ...options, pack: packPairs }, (sums, start, count) => {
    for (let i = 0; i < count; i++) {
      scores.chosen[start + i] = sums[i];
      scores.rejected[start + i] = sums[count + i];
    }
  });
  return scores;
}

/** log π of the scored tokens of each sequence. */
export async function scoreSequences(
  model: CausalLM,
  parameters: ModelParameters,
  sequences: readonly SequenceIds[],
  options: ScoreOptions,
): Promise<Float64Array> {
  const scores = new Float64Array(sequences.length);
  await scoreAll(model, parameters, sequences, { ...options, pack: packSequences }, (sums, start, count) => {
    for (let i = 0; i < count; i++) scores[start + i] = sums[i];
  });
  return scores;
}
