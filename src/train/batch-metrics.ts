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

/** What a part of a micro-batch has of each: what its means are taken over. */
export interface PartSize {
  pairs: number;
  /** Tokens of chosen and of rejected responses. */
  chosen: number;
  rejected: number;
}

/** Metrics that are means over tokens. All others are means over pairs. */
const overTokens: Readonly<Record<string, (size: PartSize) => number>> = {
  'logits/chosen': (size) => size.chosen,
  'logits/rejected': (size) => size.rejected,
  entropy: (size) => size.chosen + size.rejected,
  mean_token_accuracy: (size) => size.chosen,
};

/** The metrics of a micro-batch from those of its parts: what `pairMetrics` would say of them together. */
export function mergePairMetrics(
  parts: readonly Record<string, number>[],
  sizes: readonly PartSize[],
  nllOverTokens: boolean,
): Record<string, number> {
  const merged = (name: string): number => {
    const weigh =
      overTokens[name] ?? ((size: PartSize) => (name === 'nll_loss' && nllOverTokens ? size.chosen : size.pairs));
    const whole = sizes.reduce((n, size) => n + weigh(size), 0);
    return parts.reduce((n, part, i) => n + part[name] * weigh(sizes[i]), 0) / Math.max(whole, 1);
  };
  if (parts.length === 1) return parts[0];
  return Object.fromEntries(Object.keys(parts[0]).map((name) => [name, merged(name)]));
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

/** A micro-batch of labelled responses on the host. */
export interface ResponseValues {
  packed: PackedBatch;
  statistics: TargetStatistics;
  policy: ArrayLike<number>;
  reference: readonly number[];
  desirable: readonly boolean[];
}

/**
 * Rewards, log-probabilities and token statistics of a step of labelled responses: means over all of its desirable and of its
 * undesirable ones, whatever the micro-batches. A kind that the step has none of is left out.
 */
export function labelledMetrics(parts: readonly ResponseValues[], reward: Reward): Record<string, number> {
  const kind = (label: 'chosen' | 'rejected'): Record<string, number> => {
    const wanted = label === 'chosen';
    const responses = parts.flatMap((p) =>
      p.desirable.flatMap((d, i) =>
        d === wanted ? [{ policy: p.policy[i], reference: p.reference[i], tokens: p.packed.lengths[i] }] : [],
      ),
    );
    if (responses.length === 0) return {};
    return {
      [`rewards/${label}`]: mean(responses.map((r) => reward(r.policy, r.reference, r.tokens))),
      [`logps/${label}`]: mean(responses.map((r) => r.policy)),
      [`logps/${label}_delta`]: mean(responses.map((r) => r.policy - r.reference)),
      [`logits/${label}`]: meanOverTargets(parts, (p, n) => p.statistics.meanLogit[p.packed.targetRows[n]], wanted),
    };
  };
  const both: Record<string, number> = { ...kind('chosen'), ...kind('rejected') };
  const margin = both['rewards/chosen'] - both['rewards/rejected'];
  const isRight = (p: ResponseValues, n: number): number =>
    Number(p.statistics.argmax[p.packed.targetRows[n]] === p.packed.targetIds[n]);
  return {
    ...both,
    ...(Number.isNaN(margin) ? {} : { 'rewards/margins': margin }),
    entropy: meanOverTargets(parts, (p, n) => p.statistics.entropy[p.packed.targetRows[n]]),
    ...('logps/chosen' in both && { mean_token_accuracy: meanOverTargets(parts, isRight, true) }),
  };
}

/** The mean of `value` over the targets of all responses, or of one kind. */
function meanOverTargets(
  parts: readonly ResponseValues[],
  value: (part: ResponseValues, target: number) => number,
  desirable?: boolean,
): number {
  const each = parts.flatMap((p) =>
    Array.from(p.packed.sequences, (s, n) =>
      desirable === undefined || p.desirable[s] === desirable ? [value(p, n)] : [],
    ).flat(),
  );
  return mean(each);
}
