// Packed batches of the examples a step names, and log-probabilities of whole data sets without gradients.
import type { PackedBatch, PairIds } from '../data/packing.js';
import { packPairs, uploadBatch } from '../data/packing.js';
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

/** log π of chosen and rejected responses of `pairs`, in batches. Yields to the event loop between batches. */
export async function scorePairs(
  model: CausalLM,
  parameters: ModelParameters,
  pairs: readonly PairIds[],
  options: {
    batchSize: number;
    /** Weights of the scored tokens of a batch; 1 each by default. */
    weigh?: (batch: PackedBatch) => Float64Array | null;
    signal?: AbortSignal;
    onBatch?: (done: number) => void;
  },
): Promise<PairScores> {
  const scores = { chosen: new Float64Array(pairs.length), rejected: new Float64Array(pairs.length) };
  for (let start = 0; start < pairs.length && !options.signal?.aborted; start += options.batchSize) {
    const part = pairs.slice(start, start + options.batchSize);
    const batch = packPairs(part);
    using _ = batch.layout;
    using values = scoreBatch(model, parameters, batch, options.weigh?.(batch));
    const sums = await values.data();
    for (let i = 0; i < part.length; i++) {
      scores.chosen[start + i] = sums[i];
      scores.rejected[start + i] = sums[part.length + i];
    }
    options.onBatch?.(start + part.length);
  }
  return scores;
}
