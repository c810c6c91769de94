// Metrics of micro-batches, computed on the host in float64 from a few small tensors, under TRL's names.
import type { PackedBatch } from '../data/packing.js';
import type { Reward } from '../objectives/preference.js';
import type { HeadStatistics } from '../ops/head.js';
import type { HostArray } from '../tensor/dtype.js';
import type { Tensor } from '../tensor/tensor.js';

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

/** The sum of scalars, read when they are ready. */
export const total = async (scalars: readonly Tensor[]): Promise<number> =>
  (await Promise.all(scalars.map((t) => t.data()))).reduce((sum, value) => sum + value[0], 0);

/** The plain mean of micro-batch values, whatever their sizes, as TRL averages them. */
export function averageMetrics(parts: readonly Record<string, number>[]): Record<string, number> {
  return Object.fromEntries(Object.keys(parts[0]).map((name) => [name, mean(parts.map((p) => p[name]))]));
}

/** Statistics of a batch's targets, on the host. */
export interface TargetStatistics {
  entropy: HostArray;
  argmax: HostArray;
  meanLogit: HostArray;
}

/** Reads head statistics (contiguous copies, since they are columns). */
export function readStatistics(statistics: HeadStatistics): Promise<TargetStatistics> {
  return quiet(readAll(statistics));
}

/** A failure of this promise is its reader's to report, who may come to it late, or fail before. */
export function quiet<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => undefined);
  return promise;
}

async function readAll(statistics: HeadStatistics): Promise<TargetStatistics> {
  const read = (t: Tensor): Promise<HostArray> => t.data();
  const [entropy, argmax, meanLogit] = await Promise.all([
    read(statistics.entropy),
    read(statistics.argmax),
    read(statistics.meanLogit),
  ]);
  return { entropy, argmax, meanLogit };
}

/** Mean over the targets of the given sequences of a per-row statistic. */
function overTargets(batch: PackedBatch, value: (target: number) => number, sequences: (s: number) => boolean): number {
  let total = 0;
  let count = 0;
  for (let n = 0; n < batch.targetIds.length; n++)
    if (sequences(batch.sequences[n])) {
      total += value(n);
      count++;
    }
  return count === 0 ? 0 : total / count;
}

const everySequence = (): boolean => true;

/** entropy and mean_token_accuracy of an SFT micro-batch. */
export function sequenceMetrics(batch: PackedBatch, s: TargetStatistics): Record<string, number> {
  return {
    entropy: overTargets(batch, (n) => s.entropy[batch.targetRows[n]], everySequence),
    mean_token_accuracy: overTargets(
      batch,
      (n) => Number(s.argmax[batch.targetRows[n]] === batch.targetIds[n]),
      everySequence,
    ),
  };
}

export interface PairValues {
  chosen: ArrayLike<number>;
  rejected: ArrayLike<number>;
  refChosen: ArrayLike<number> | null;
  refRejected: ArrayLike<number> | null;
}

/** Rewards, log-probabilities and token statistics of a preference micro-batch. */
export function pairMetrics(
  batch: PackedBatch,
  s: TargetStatistics,
  v: PairValues,
  reward: Reward,
): Record<string, number> {
  const pairs = batch.lengths.length / 2;
  const each = Array.from({ length: pairs }, (_, i) => i);
  const rewards = (policy: ArrayLike<number>, reference: ArrayLike<number> | null, from: number): number[] =>
    each.map((i) => reward(policy[i], reference ? reference[i] : null, batch.lengths[from + i]));
  const chosen = rewards(v.chosen, v.refChosen, 0);
  const rejected = rewards(v.rejected, v.refRejected, pairs);
  const isChosen = (sequence: number): boolean => sequence < pairs;
  const isRejected = (sequence: number): boolean => sequence >= pairs;
  const row = (n: number): number => batch.targetRows[n];
  return {
    'rewards/chosen': mean(chosen),
    'rewards/rejected': mean(rejected),
    'rewards/accuracies': mean(each.map((i) => Number(chosen[i] > rejected[i]))),
    'rewards/margins': mean(each.map((i) => chosen[i] - rejected[i])),
    'logps/chosen': mean(each.map((i) => v.chosen[i])),
    'logps/rejected': mean(each.map((i) => v.rejected[i])),
    ...(v.refChosen && v.refRejected
      ? {
          'logps/chosen_delta': mean(each.map((i) => v.chosen[i] - v.refChosen![i])),
          'logps/rejected_delta': mean(each.map((i) => v.rejected[i] - v.refRejected![i])),
        }
      : {}),
    'logits/chosen': overTargets(batch, (n) => s.meanLogit[row(n)], isChosen),
    'logits/rejected': overTargets(batch, (n) => s.meanLogit[row(n)], isRejected),
    entropy: overTargets(batch, (n) => s.entropy[row(n)], everySequence),
    mean_token_accuracy: overTargets(batch, (n) => Number(s.argmax[row(n)] === batch.targetIds[n]), isChosen),
  };
}
