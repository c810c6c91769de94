// A packed micro-batch of pairs, and what preference losses are functions of: the policy's log-probabilities beside the
// reference's. Must stay free of losses.
import { type BatchTensors, type PackedBatch, packPairs, uploadBatch } from '../data/packing.js';
import type { PreferenceExample } from '../data/tokenize.js';
import type { CausalLM } from '../models/causal-lm.js';
import type { ModelParameters } from '../models/parameters.js';
import { sequenceLogProbs } from '../objectives/logprobs.js';
import { lengthDesensitizedWeights, type PairLogProbs, type Reward, wpoWeights } from '../objectives/preference.js';
import { mul } from '../ops/elementwise.js';
import type { HeadStatistics } from '../ops/head.js';
import { contiguous, gatherRows, reshape, slice, unsqueeze } from '../ops/movement.js';
import { accumulationDType } from '../tensor/dtype.js';
import { Tensor } from '../tensor/tensor.js';
import { type PairValues, pairMetrics, quiet, readStatistics } from './batch-metrics.js';
import type { ReferenceLogProbs } from './reference.js';

/** How tokens and pairs are weighed. */
export interface Weighting {
  /** α of LD-DPO: the weight of tokens beyond the length of the shorter response; 1 by default. */
  readonly ldAlpha?: number;
  /** WPO: pairs weighed by how likely the policy is to write them. */
  readonly wpo?: boolean;
}

/** How passes over the model are run, whatever they compute. */
export interface PassSettings {
  /** Blocks run again in backward instead of keeping what they computed. */
  readonly gradientCheckpointing?: boolean;
}

/** A micro-batch of pairs on the device. Made inside a scope. */
export interface PreferenceBatch {
  packed: PackedBatch;
  tensors: BatchTensors;
  pairs: number;
  reference: { chosen: Tensor; rejected: Tensor; host: { chosen: Float64Array; rejected: Float64Array } } | null;
  /** LD-DPO's weights of tokens, `[N]`; null where all are 1. */
  tokenWeights: Tensor | null;
  /** ODPO's offsets, `[B]`; null where a record has none. */
  offsets: Tensor | null;
  wpo: boolean;
  checkpointing: boolean;
}

/** The weights of a packed batch's tokens under LD-DPO, or null. */
export function tokenWeightsOf(packed: PackedBatch, { ldAlpha = 1 }: Weighting): Float64Array | null {
  if (ldAlpha === 1) return null;
  const pairs = packed.lengths.length / 2;
  const lengths = Array.from(packed.lengths);
  return lengthDesensitizedWeights(lengths.slice(0, pairs), lengths.slice(pairs), ldAlpha);
}

export function preferenceBatch(
  model: CausalLM,
  examples: readonly PreferenceExample[],
  indices: readonly number[],
  reference: ReferenceLogProbs | null,
  weighting: Weighting & PassSettings = {},
): PreferenceBatch {
  const packed = packPairs(indices.map((i) => examples[i]));
  const dtype = accumulationDType(model.dtype);
  const upload = (values: Float64Array): Tensor => Tensor.from(values, { dtype, device: model.device });
  const pick = (table: Float64Array): Float64Array => Float64Array.from(indices, (i) => table[i]);
  const host = reference && { chosen: pick(reference.chosen), rejected: pick(reference.rejected) };
  const weights = tokenWeightsOf(packed, weighting);
  const offsets = indices.map((i) => examples[i].offset ?? Number.NaN);
  return {
    packed,
    tensors: uploadBatch(packed, model.device, dtype),
    pairs: indices.length,
    reference: host && { chosen: upload(host.chosen), rejected: upload(host.rejected), host },
    tokenWeights: weights && upload(weights),
    offsets: offsets.some(Number.isNaN) ? null : upload(Float64Array.from(offsets)),
    wpo: weighting.wpo ?? false,
    checkpointing: weighting.gradientCheckpointing ?? false,
  };
}

/** What a micro-batch's losses and metrics need of one forward pass. */
export interface PairOutputs {
  pairs: PairLogProbs;
  statistics: HeadStatistics;
}

/**
 * The inputs of preference losses from log-probabilities of single tokens `[N]`, differentiable in them: sums by sequence,
 * weighed as the batch says, beside the reference's.
 */
export function pairsOfTokens(batch: PreferenceBatch, tokens: Tensor, statistics: HeadStatistics): PairLogProbs {
  const { packed, tensors, pairs: count, reference, tokenWeights, offsets, wpo } = batch;
  const total = (x: Tensor): Tensor => sequenceLogProbs(x, tensors.sequences, packed.lengths.length);
  const chosenOf = (x: Tensor): Tensor => slice(x, 0, 0, count);
  const rejectedOf = (x: Tensor): Tensor => slice(x, 0, count, 2 * count);
  const sums = total(tokenWeights ? mul(tokens, tokenWeights) : tokens);
  return {
    chosen: chosenOf(sums),
    rejected: rejectedOf(sums),
    refChosen: reference?.chosen ?? null,
    refRejected: reference?.rejected ?? null,
    chosenLengths: chosenOf(tensors.lengths),
    rejectedLengths: rejectedOf(tensors.lengths),
    ...(tokenWeights && { chosenUnweighted: chosenOf(total(tokens)) }),
    ...(offsets && { offsets }),
    ...(wpo && {
      weights: wpoWeights(tokens, ofTargets(statistics.logSumSquares, batch), tensors.sequences, tensors.lengths),
    }),
  };
}

/** A statistic of head rows `[R]` at each target, `[N]`. */
function ofTargets(statistic: Tensor, { tensors }: PreferenceBatch): Tensor {
  const { rows } = tensors.targets;
  return reshape(gatherRows(unsqueeze(contiguous(statistic.detach()), 1), rows), [rows.size]);
}

/** log π of both responses of every pair, beside the reference's, with the head's statistics. */
export function pairLogProbs(model: CausalLM, p: ModelParameters, batch: PreferenceBatch): PairOutputs {
  const { packed, tensors, checkpointing } = batch;
  const out = model.logProbs(p, tensors.ids, packed.layout, tensors.targets, { statistics: true, checkpointing });
  const statistics = out.statistics!;
  return { pairs: pairsOfTokens(batch, out.logProbs, statistics), statistics };
}

/** Starts reading what the metrics of a micro-batch need; the tensors may be disposed of at once. */
export function readPairMetrics(
  batch: PreferenceBatch,
  { pairs, statistics }: PairOutputs,
  reward: Reward,
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
    return pairMetrics(packed, s, values, reward);
  });
  return quiet(metrics);
}
