// The recordings of preference losses in our words: their cases as options, their batches as inputs, values and gradients of both.
import { expect } from 'vitest';
import { valueAndGrad } from '../../src/autograd/transforms.js';
import {
  completeParameters,
  lengthDesensitizedWeights,
  type NllReduction,
  type PairLogProbs,
  type PreferenceLossName,
  type PreferenceLossOptions,
  preferenceLoss,
  preferenceLosses,
  sftLoss,
  wpoWeights,
} from '../../src/objectives/index.js';
import { add, mul } from '../../src/ops/elementwise.js';
import type { DType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { Tensor } from '../../src/tensor/tensor.js';

export const FILE = 'golden/losses/losses.json';

export type Ragged = readonly (readonly number[])[];
export interface Batch {
  readonly name: string;
  readonly policy_chosen_token_logps: Ragged;
  readonly policy_rejected_token_logps: Ragged;
  readonly ref_chosen_token_logps: Ragged;
  readonly ref_rejected_token_logps: Ragged;
  readonly policy_chosen_token_log_sum_sq_probs: Ragged;
  readonly policy_rejected_token_log_sum_sq_probs: Ragged;
  readonly policy_prompt_token_logps: Ragged;
  readonly policy_chosen_logps: readonly number[];
  readonly policy_rejected_logps: readonly number[];
  readonly ref_chosen_logps: readonly number[];
  readonly ref_rejected_logps: readonly number[];
  readonly chosen_lengths: readonly number[];
  readonly rejected_lengths: readonly number[];
}

/** A response of KTO's batches. */
export interface Labelled {
  readonly label: boolean;
  readonly policy_token_logps: readonly number[];
  readonly ref_token_logps: readonly number[];
  readonly kl_policy_token_logps: readonly number[];
  readonly kl_ref_token_logps: readonly number[];
}

export interface Result {
  readonly batch: string;
  readonly loss: number;
  readonly loss_float32?: number | string;
  readonly per_example_loss?: readonly number[] | null;
  readonly per_example_preference_loss?: readonly number[];
  readonly rewards_chosen?: readonly number[];
  readonly rewards_rejected?: readonly number[];
  readonly rewards?: readonly number[];
  readonly grad_policy_logps?: { readonly chosen: readonly number[]; readonly rejected: readonly number[] };
  readonly grad_policy_token_logps?: { readonly chosen: Ragged; readonly rejected: Ragged };
  readonly grad_policy_prompt_token_logps?: Ragged;
  readonly pair_weights?: readonly number[];
  readonly logps_used?: Readonly<Record<string, readonly number[]>>;
  readonly m0_next?: number;
  readonly beta_used?: number;
  readonly batch_term?: number;
  readonly metrics?: Readonly<Record<string, number>>;
  readonly kl?: number;
}

// biome-ignore lint/suspicious/noExplicitAny: a recorded configuration
export type Config = any;
export interface Entry {
  readonly id: string;
  readonly trainer?: string;
  readonly loss?: string;
  readonly config: Config;
  readonly results: readonly Result[];
}

/** A recorded case in our words. */
export interface Case {
  readonly id: string;
  readonly options: PreferenceLossOptions;
  readonly results: readonly Result[];
  readonly reference: boolean;
  readonly ldAlpha?: number;
  readonly weighted?: boolean;
  readonly offset?: number;
  /** ORPO's NLL over prompt and response, which is not preferenceLoss's. */
  readonly promptNll?: boolean;
}

export const defined = <T extends object>(given: T): T =>
  Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined)) as T;

function dpoTrainer({ id, config: c, results }: Entry): Case {
  const options = defined({
    lossType: c.loss_type,
    beta: c.beta,
    lossWeights: c.loss_weights,
    labelSmoothing: c.label_smoothing,
    discopopTau: c.discopop_tau,
    fDivergenceType: c.f_divergence_type,
    fAlphaDivergenceCoef: c.f_alpha_divergence_coef,
  });
  return { id, options, results, reference: true, ldAlpha: c.ld_alpha, weighted: c.use_weighting };
}

function cpoTrainer({ id, config: c, results }: Entry): Case {
  const names: Record<string, PreferenceLossName> = { sigmoid: 'cpo', simpo: 'simpo', alphapo: 'alphapo' };
  const options = defined({
    lossType: names[c.loss_type] ?? c.loss_type,
    beta: c.beta,
    nllWeight: c.loss_type === 'alphapo' ? undefined : c.cpo_alpha,
    labelSmoothing: c.label_smoothing,
    simpoGamma: c.simpo_gamma,
    alphapoAlpha: c.alpha,
  });
  return { id, options, results, reference: false };
}

const orpoTrainer = ({ id, config, results }: Entry): Case => ({
  id,
  options: { lossType: 'orpo', beta: 1, orpoLambda: config.beta, nllWeight: 0 },
  results,
  reference: false,
  promptNll: true,
});

const reductions: Readonly<Record<string, NllReduction>> = {
  sequence_mean: 'sequence-mean',
  token_mean: 'token-mean',
  sequence_sum: 'sequence-sum',
  completion_sequence_mean: 'sequence-mean',
  completion_token_mean: 'token-mean',
};

const formulas: Readonly<Record<string, (c: Config) => PreferenceLossOptions>> = {
  cdpo: (c) => ({ lossType: 'cdpo', beta: c.beta, labelSmoothing: c.label_smoothing }),
  dpo_nll: (c) => ({ beta: c.beta, nllWeight: c.rpo_alpha, nllReduction: reductions[c.reduction] }),
  dpop: (c) => ({ lossType: 'dpop', beta: c.beta, dpopLambda: c.dpop_lambda }),
  rdpo: (c) => ({ lossType: 'rdpo', beta: c.beta, rdpoAlpha: c.alpha }),
  cal_dpo: (c) => ({ lossType: 'cal_dpo', beta: c.beta }),
  beta_dpo: (c) => ({ lossType: 'beta_dpo', beta: c.beta, betaDpoAlpha: c.alpha, betaDpoMean: c.m0 }),
  ipo_sum: (c) => ({ lossType: 'ipo_sum', beta: c.tau }),
  odpo: (c) => ({ lossType: 'odpo', beta: c.beta }),
  cpo: (c) => ({ lossType: 'cpo', beta: c.beta, nllWeight: c.cpo_alpha, nllReduction: reductions[c.nll] }),
  orpo: (c) =>
    defined({
      lossType: 'orpo',
      beta: 1,
      orpoLambda: c.orpo_lambda,
      nllReduction: reductions[c.nll],
      nllWeight: reductions[c.nll] ? undefined : 0,
    }),
  simpo: (c) => ({ lossType: 'simpo', beta: c.beta, simpoGamma: c.gamma }),
  slic: (c) => ({
    lossType: 'slic',
    beta: 1,
    slicDelta: c.delta,
    slicLambda: c.slic_lambda,
    slicLengthNormalize: c.length_normalize,
  }),
};

const formula = ({ id, loss, config, results }: Entry): Case => ({
  id,
  options: formulas[loss!](config),
  results,
  reference: true,
  offset: config.offset,
  promptNll: config.nll === 'prompt_and_completion_token_mean',
});

const trainers: Readonly<Record<string, (entry: Entry) => Case>> = {
  DPOTrainer: dpoTrainer,
  CPOTrainer: cpoTrainer,
  ORPOTrainer: orpoTrainer,
};

/** Recorded cases of pairs, but TRL's sigmoid with a label smoothing that it ignores: refused here. */
export const casesOf = (golden: { trl: Entry[]; reference: Entry[] }): Case[] => [
  ...golden.trl.filter(({ id, trainer }) => trainers[trainer!] && id !== 'trl-037').map((e) => trainers[e.trainer!](e)),
  ...golden.reference.map(formula),
];

export const total = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);
export const sums = (rows: Ragged): number[] => rows.map(total);
export const upload = (values: readonly number[], dtype: DType = 'float64'): Tensor =>
  Tensor.from(Float64Array.from(values), { dtype });
export const places = (rows: Ragged, from = 0): number[] => rows.flatMap((row, i) => row.map(() => from + i));

/** The inputs of a case: sums over tokens, weighted by ld_alpha where the case has it. */
export function pairsOf(batch: Batch, c: Case, dtype: DType = 'float64'): PairLogProbs {
  const put = (values: readonly number[]): Tensor => upload(values, dtype);
  const weights = lengthDesensitizedWeights(batch.chosen_lengths, batch.rejected_lengths, c.ldAlpha ?? 1);
  const count = total(batch.chosen_lengths);
  const weigh = (rows: Ragged, start: number): number[] => {
    let at = start;
    return sums(rows.map((row) => row.map((x) => x * weights[at++])));
  };
  const score = (rows: Ragged, plain: readonly number[], start: number): Tensor =>
    put(c.ldAlpha === undefined ? plain : weigh(rows, start));
  return {
    chosen: score(batch.policy_chosen_token_logps, batch.policy_chosen_logps, 0),
    rejected: score(batch.policy_rejected_token_logps, batch.policy_rejected_logps, count),
    refChosen: c.reference ? score(batch.ref_chosen_token_logps, batch.ref_chosen_logps, 0) : null,
    refRejected: c.reference ? score(batch.ref_rejected_token_logps, batch.ref_rejected_logps, count) : null,
    chosenLengths: put(batch.chosen_lengths),
    rejectedLengths: put(batch.rejected_lengths),
    ...(c.weighted && { weights: pairWeights(batch, dtype) }),
    ...(c.offset !== undefined && { offsets: put(batch.chosen_lengths.map(() => c.offset!)) }),
  };
}

export function pairWeights(batch: Batch, dtype: DType = 'float64'): Tensor {
  const pairs = batch.chosen_lengths.length;
  const [chosen, rejected] = [batch.policy_chosen_token_logps, batch.policy_rejected_token_logps];
  const squares = [batch.policy_chosen_token_log_sum_sq_probs, batch.policy_rejected_token_log_sum_sq_probs];
  return wpoWeights(
    upload([...chosen, ...rejected].flat(), dtype),
    upload(squares.flat(2), dtype),
    Tensor.from(Int32Array.from([...places(chosen), ...places(rejected, pairs)])),
    upload([...batch.chosen_lengths, ...batch.rejected_lengths], dtype),
  );
}

/** Loss and gradients for the sums of chosen, rejected and prompts. */
export function evaluate(batch: Batch, c: Case, dtype: DType = 'float64') {
  return scope(() => {
    const pairs = pairsOf(batch, c, dtype);
    const prompts = upload(sums(batch.policy_prompt_token_logps), dtype);
    const tokens = total(batch.chosen_lengths) + batch.policy_prompt_token_logps.flat().length;
    const loss = (chosen: Tensor, rejected: Tensor, prompt: Tensor): Tensor => {
      const preference = preferenceLoss({ ...pairs, chosen, rejected }, c.options);
      // Without the NLL of ORPO's trainer the prompts have no part: zero, so that they have a gradient.
      const nll = sftLoss(add(chosen, prompt), { reduction: 'token-mean', tokens });
      return c.promptNll
        ? add(preference, nll)
        : add(preference, mul(sftLoss(prompt, { reduction: 'sum', tokens }), 0));
    };
    const [value, gradients] = valueAndGrad(loss)(pairs.chosen, pairs.rejected, prompts);
    const [chosen, rejected, prompt] = gradients.map((g) => [...g.dataSync()]);
    return { loss: value.item(), chosen, rejected, prompt };
  });
}

export const relative = (found: number, expected: number): number =>
  Math.abs(found - expected) / Math.max(1, Math.abs(expected));
export const worst = (found: ArrayLike<number>, expected: readonly number[]): number => {
  expect(found.length).toBe(expected.length);
  return Math.max(...expected.map((e, i) => relative(found[i], e)));
};

const nllPerPair: Readonly<Record<NllReduction, (sum: number, tokens: number) => number>> = {
  'token-mean': () => 0, // one number for the batch, not contained in the values by pair
  'sequence-mean': (sum, tokens) => -sum / tokens,
  'sequence-sum': (sum) => -sum,
};

export function valuesByPair(batch: Batch, c: Case): number[] {
  return scope(() => {
    const pairs = pairsOf(batch, c);
    const value = preferenceLosses[[c.options.lossType ?? 'sigmoid'].flat()[0]].value(
      pairs,
      completeParameters(c.options),
    );
    const weights = pairs.weights?.dataSync() ?? batch.chosen_lengths.map(() => 1);
    const nll = nllPerPair[c.options.nllReduction ?? 'token-mean'];
    const weight = c.options.nllWeight ?? (c.options.lossType === 'orpo' ? 1 : 0);
    return [...value.dataSync()].map(
      (x, i) => x * weights[i] + weight * nll(batch.policy_chosen_logps[i], batch.chosen_lengths[i]),
    );
  });
}

/** The gradient for the sums of a sequence, from that for its tokens under LD-DPO: that of its first token, whose weight is 1. */
export const firstTokens = (rows: Ragged): number[] => rows.map((row) => row[0]);
