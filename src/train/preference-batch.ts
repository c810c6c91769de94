// What DPO and SPO share: the policy's log-probabilities of a packed batch of pairs beside the reference's.
import { type BatchTensors, type PackedBatch, packPairs, uploadBatch } from '../data/packing.js';
import type { PreferenceExample } from '../data/tokenize.js';
import type { CausalLM } from '../models/causal-lm.js';
import type { ModelParameters } from '../models/parameters.js';
import { sequenceLogProbs } from '../objectives/logprobs.js';
import type { PairLogProbs } from '../objectives/preference.js';
import type { HeadStatistics } from '../ops/head.js';
import { slice } from '../ops/movement.js';
import { accumulationDType } from '../tensor/dtype.js';
import { Tensor } from '../tensor/tensor.js';
import { type PairValues, pairMetrics, quiet, readStatistics } from './batch-metrics.js';
import type { ReferenceLogProbs } from './reference.js';

/** A micro-batch of pairs on the device. Made inside a scope. */
export interface PreferenceBatch {
  packed: PackedBatch;
  tensors: BatchTensors;
  pairs: number;
  reference: { chosen: Tensor; rejected: Tensor; host: { chosen: Float64Array; rejected: Float64Array } } | null;
}

export function preferenceBatch(
  model: CausalLM,
  examples: readonly PreferenceExample[],
  indices: readonly number[],
  reference: ReferenceLogProbs | null,
): PreferenceBatch {
  const packed = packPairs(indices.map((i) => examples[i]));
  const dtype = accumulationDType(model.dtype);
  const upload = (values: Float64Array): Tensor => Tensor.from(values, { dtype, device: model.device });
  const pick = (table: Float64Array): Float64Array => Float64Array.from(indices, (i) => table[i]);
  const host = reference && { chosen: pick(reference.chosen), rejected: pick(reference.rejected) };
  return {
    packed,
    tensors: uploadBatch(packed, model.device, dtype),
    pairs: indices.length,
    reference: host && { chosen: upload(host.chosen), rejected: upload(host.rejected), host },
  };
}

/** log π of both responses of every pair, beside the reference's, with the head's statistics. */
export function pairLogProbs(
  model: CausalLM,
  p: ModelParameters,
  batch: PreferenceBatch,
): { pairs: PairLogProbs; statistics: HeadStatistics } {
  const { packed, tensors, pairs: count, reference } = batch;
  const out = model.logProbs(p, tensors.ids, packed.layout, tensors.targets, { statistics: true });
  const sums = sequenceLogProbs(out.logProbs, tensors.sequences, 2 * count);
  return {
    pairs: {
      chosen: slice(sums, 0, 0, count),
      rejected: slice(sums, 0, count, 2 * count),
      refChosen: reference?.chosen ?? null,
      refRejected: reference?.rejected ?? null,
      chosenLengths: slice(tensors.lengths, 0, 0, count),
      rejectedLengths: slice(tensors.lengths, 0, count, 2 * count),
    },
    statistics: out.statistics!,
  };
}

/** Starts reading what the metrics of a micro-batch need; the tensors may be disposed of at once. */
export function readPairMetrics(
  batch: PreferenceBatch,
  pairs: PairLogProbs,
  statistics: HeadStatistics,
  beta: number,
): Promise<Record<string, number>> {
  const { packed, reference } = batch;
  const reads = Promise.all([readStatistics(statistics), pairs.chosen.data(), pairs.rejected.data()]);
  const metrics = reads.then(([s, chosen, rejected]) => {
    const values: PairValues = {
      chosen,
      rejected,
      refChosen: reference?.host.chosen ?? null,
      refRejected: reference?.host.rejected ?? null,
    };
    return pairMetrics(packed, s, values, beta);
  });
  return quiet(metrics);
}
