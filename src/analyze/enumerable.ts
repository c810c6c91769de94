// The exact flow of probability over an output space that can be enumerated: who gains what one step of DPO takes away
// (Theorem 2, arXiv 2507.07723; spo.md §3). For toy models only: every output gets a gradient of its own.
import { KeelgradError } from '../errors.js';
import type { CausalLM } from '../models/causal-lm.js';
import { displaced, logProbsOf, type Sequence, SequenceGradient, variableGroups } from './sequences.js';

const largestSpace = 20_000;

/** All sequences of `length` tokens, in lexicographic order: output k has the digits of k in base `vocabSize`. */
export function enumerateOutputs(vocabSize: number, length: number): Int32Array[] {
  const count = vocabSize ** length;
  if (!(count <= largestSpace))
    throw new KeelgradError(
      `[enumerable] expected at most ${largestSpace} outputs, found ${vocabSize}^${length}; use a smaller vocabulary or length`,
    );
  return Array.from({ length: count }, (_, k) =>
    Int32Array.from({ length }, (_, at) => Math.floor(k / vocabSize ** (length - 1 - at)) % vocabSize),
  );
}

/** log π of every output of a space, given a prompt. They sum to one in probability. */
export function outputLogProbs(
  model: CausalLM,
  promptIds: Int32Array,
  outputs: readonly Int32Array[],
): Promise<number[]> {
  return logProbsOf(model, model.parameters, sequencesOf(promptIds, outputs));
}

const sequencesOf = (promptIds: Int32Array, outputs: readonly Int32Array[]): Sequence[] =>
  outputs.map((responseIds) => ({ promptIds, responseIds }));

/** The most likely output other than two: y* of Theorem 2. */
export function mostLikelyOther(logProbs: readonly number[], chosen: number, rejected: number): number {
  let best = -1;
  logProbs.forEach((value, k) => {
    if (k !== chosen && k !== rejected && (best < 0 || value > logProbs[best])) best = k;
  });
  return best;
}

/** `case 1`: y_w falls (and so does y_l). `case 2`: y_w rises, y_l falls. `both rise`: not treated by the theorem. */
export type FlowCase = 'case 1' | 'case 2' | 'both rise';
const flowCases: readonly FlowCase[] = ['case 1', 'case 2', 'both rise'];

export interface MassFlow {
  readonly case: FlowCase;
  /** Index of y*, the most likely output other than y_w and y_l. */
  readonly star: number;
  /** Δπ of every output. They sum to zero. */
  readonly change: readonly number[];
  /** The mass that changed hands: the sum of the positive changes. */
  readonly moved: number;
  /** Shares of the gained mass. */
  readonly shareToStar: number;
  readonly shareToChosen: number;
  readonly shareToRejected: number;
  /** The output that gained most. */
  readonly largestGainer: number;
}

/** Who gained and who lost, from the probabilities before and the changes of all outputs. */
export function massFlow(
  logProbs: readonly number[],
  change: readonly number[],
  chosen: number,
  rejected: number,
): MassFlow {
  const star = mostLikelyOther(logProbs, chosen, rejected);
  const moved = change.reduce((total, c) => total + Math.max(0, c), 0);
  const share = (k: number): number => (moved > 0 ? Math.max(0, change[k]) / moved : 0);
  return {
    case: change[chosen] < 0 ? 'case 1' : change[rejected] < 0 ? 'case 2' : 'both rise',
    star,
    change,
    moved,
    shareToStar: share(star),
    shareToChosen: share(chosen),
    shareToRejected: share(rejected),
    largestGainer: change.reduce((best, c, k) => (c > change[best] ? k : best), 0),
  };
}

/** One plain gradient step of size η on L_DPO of the pair, measured on the whole space. */
export async function dpoStepFlow(
  model: CausalLM,
  promptIds: Int32Array,
  outputs: readonly Int32Array[],
  pair: { chosen: number; rejected: number; refChosenLogp?: number; refRejectedLogp?: number },
  { beta, stepSize }: { beta: number; stepSize: number },
): Promise<MassFlow> {
  const groups = variableGroups(model);
  const sequences = sequencesOf(promptIds, outputs);
  const before = await logProbsOf(model, model.parameters, sequences);
  const { chosen: w, rejected: l } = pair;
  const h = before[w] - (pair.refChosenLogp ?? before[w]) - (before[l] - (pair.refRejectedLogp ?? before[l]));
  const step = (stepSize * beta) / (1 + Math.exp(beta * h));
  using chosen = SequenceGradient.of(model, sequences[w], groups);
  using rejected = SequenceGradient.of(model, sequences[l], groups);
  const moves = [
    { step, along: chosen },
    { step: -step, along: rejected },
  ];
  const after = await displaced(model, groups, moves, (moved) => logProbsOf(model, moved, sequences));
  return massFlow(
    before,
    after.map((value, k) => Math.exp(value) - Math.exp(before[k])),
    w,
    l,
  );
}

/** The gradients of log π of all outputs, one row each, over all variables in the model's order. */
export async function outputGradients(
  model: CausalLM,
  promptIds: Int32Array,
  outputs: readonly Int32Array[],
): Promise<Float64Array[]> {
  const rows: Float64Array[] = [];
  for (const sequence of sequencesOf(promptIds, outputs)) {
    using g = SequenceGradient.of(model, sequence, variableGroups(model));
    const parts = await Promise.all(g.tensors.map((t) => t.data()));
    rows.push(Float64Array.from(parts.flatMap((part) => Array.from(part as ArrayLike<number>))));
  }
  return rows;
}

/** ⟨g_i, g_j⟩ of all rows: the first-order flow of every pair follows from it. */
export function gramOf(rows: readonly Float64Array[]): Float64Array[] {
  const dot = (a: Float64Array, b: Float64Array): number => a.reduce((total, value, i) => total + value * b[i], 0);
  return rows.map((a) => Float64Array.from(rows, (b) => dot(a, b)));
}

/** Δπ of all outputs to first order, in units of ηβ(1 - σ(s)), for one pair: π_y (⟨g_y, g_w⟩ - ⟨g_y, g_l⟩) (Eq. 57). */
export const firstOrderFlow = (
  logProbs: readonly number[],
  gram: readonly Float64Array[],
  chosen: number,
  rejected: number,
): MassFlow =>
  massFlow(
    logProbs,
    logProbs.map((value, k) => Math.exp(value) * (gram[k][chosen] - gram[k][rejected])),
    chosen,
    rejected,
  );

/** The likeliest ordered pair of each case, which is told to first order; none for a case without pairs. */
export function likeliestPairs(
  logProbs: readonly number[],
  gram: readonly Float64Array[],
): { readonly case: FlowCase; readonly chosen: number; readonly rejected: number }[] {
  const best = new Map<FlowCase, { case: FlowCase; chosen: number; rejected: number; logProb: number }>();
  for (let chosen = 0; chosen < logProbs.length; chosen++)
    for (let rejected = 0; rejected < logProbs.length; rejected++) {
      if (chosen === rejected) continue;
      const { case: name } = firstOrderFlow(logProbs, gram, chosen, rejected);
      const logProb = logProbs[chosen] + logProbs[rejected];
      if (!(logProb <= (best.get(name)?.logProb ?? Number.NEGATIVE_INFINITY)))
        best.set(name, { case: name, chosen, rejected, logProb });
    }
  return flowCases.flatMap((name) => best.get(name) ?? []).map(({ logProb: _, ...pair }) => pair);
}

/** What the flows of many pairs have in common, by case. */
export interface FlowStatistics {
  readonly pairs: number;
  readonly starGains: number;
  readonly starGainsMost: number;
  readonly chosenGainsMost: number;
  readonly meanShareToStar: number;
  readonly meanShareToChosen: number;
  readonly meanShareToRejected: number;
}

/** First-order flows of all ordered pairs, counted by case. The signs do not depend on β or s. */
export function flowStatistics(
  logProbs: readonly number[],
  gram: readonly Float64Array[],
): Record<FlowCase, FlowStatistics> {
  const sums: Record<FlowCase, number[]> = { 'case 1': [], 'case 2': [], 'both rise': [] };
  for (const name of Object.keys(sums) as FlowCase[]) sums[name] = [0, 0, 0, 0, 0, 0, 0];
  for (let w = 0; w < logProbs.length; w++)
    for (let l = 0; l < logProbs.length; l++) {
      if (w === l) continue;
      const flow = firstOrderFlow(logProbs, gram, w, l);
      const row = sums[flow.case];
      row[0]++;
      row[1] += Number(flow.change[flow.star] > 0);
      row[2] += Number(flow.largestGainer === flow.star);
      row[3] += Number(flow.largestGainer === w);
      row[4] += flow.shareToStar;
      row[5] += flow.shareToChosen;
      row[6] += flow.shareToRejected;
    }
  const finish = ([
    pairs,
    starGains,
    starGainsMost,
    chosenGainsMost,
    toStar,
    toChosen,
    toRejected,
  ]: number[]): FlowStatistics => ({
    pairs,
    starGains,
    starGainsMost,
    chosenGainsMost,
    meanShareToStar: pairs ? toStar / pairs : 0,
    meanShareToChosen: pairs ? toChosen / pairs : 0,
    meanShareToRejected: pairs ? toRejected / pairs : 0,
  });
  return {
    'case 1': finish(sums['case 1']),
    'case 2': finish(sums['case 2']),
    'both rise': finish(sums['both rise']),
  };
}
