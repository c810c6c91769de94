// What a preference loss is a function of, and the scores and margins that most of them start from.
// Must stay free of the losses' names.
//
// Notation of this folder: s_w = log π(y_w|x), r_w that of the reference, h_w = s_w - r_w, n_w scored tokens; l likewise;
// β beta; ε label smoothing; σ the logistic function.
import { add, div, exp, logSigmoid, minimum, mul, neg, rsub, sub } from '../../ops/elementwise.js';
import { sum } from '../../ops/reduce.js';
import type { Tensor } from '../../tensor/tensor.js';
import type { FDivergence, LossParameter } from './facts.js';

/** Per-sequence log-probabilities of B pairs, each `[B]`, summed over scored tokens. */
export interface PairLogProbs {
  chosen: Tensor;
  rejected: Tensor;
  /** Those of the reference; null without one. */
  refChosen: Tensor | null;
  refRejected: Tensor | null;
  /** Scored tokens, floating `[B]`. */
  chosenLengths: Tensor;
  rejectedLengths: Tensor;
  /** Offsets `[B]` of `odpo`. */
  offsets?: Tensor;
  /** Weights `[B]` of the pairs' losses (WPO: `wpoWeights`), constants. */
  weights?: Tensor;
  /** The KL estimate of `kto`, a scalar: see ktoKl. */
  kl?: Tensor;
  /** s_w before the weights of LD-DPO, `[B]`: what the NLL is of. `chosen` by default. */
  chosenUnweighted?: Tensor;
  /** Tokens that a token-mean NLL divides by, where the batch is part of a larger one; those of `chosen` by default. */
  nllTokens?: number;
}

/** Every parameter of every loss, completed. */
export type PreferenceParameters = { readonly [P in LossParameter]: number } & {
  readonly beta: number;
  readonly fDivergenceType: FDivergence;
  readonly fAlphaDivergenceCoef: number;
  readonly slicLengthNormalize: boolean;
  /** The mean margin of the batches before, of `beta_dpo`: a number, or a scalar on the device. */
  readonly betaDpoMean: number | Tensor;
};

/** The implicit reward of a response, on the host: of its log π, that of the reference or null, and its scored tokens. */
export type Reward = (policy: number, reference: number | null, tokens: number) => number;

const ratio = (policy: Tensor, reference: Tensor | null): Tensor => (reference ? sub(policy, reference) : policy);
/** h_w. */
export const chosenRatio = (p: PairLogProbs): Tensor => ratio(p.chosen, p.refChosen);
/** h_l. */
export const rejectedRatio = (p: PairLogProbs): Tensor => ratio(p.rejected, p.refRejected);
/** h_w - h_l. */
export const ratioMargin = (p: PairLogProbs): Tensor => sub(chosenRatio(p), rejectedRatio(p));

/** β(h_w - h_l): the s of Eq. 1. */
export const margin = (p: PairLogProbs, beta: number): Tensor => mul(ratioMargin(p), beta);

// exp stops here, as in TRL: beyond it a score of float32 would be infinite.
const largestExponent = 80;

/** Scores f(h) that replace h = log π/π_ref. f-DPO: Wang et al. 2024, arXiv 2309.16240, up to constants. */
const divergences: Readonly<Record<FDivergence, (h: Tensor, coefficient: number) => Tensor>> = {
  /** h: DPO itself. */
  reverse_kl: (h) => h,
  /** 1 - exp(-h). */
  forward_kl: (h) => rsub(exp(neg(h)), 1),
  /** ln 2 + log σ(h). */
  js_divergence: (h) => add(logSigmoid(h), Math.LN2),
  /** (exp((a-1) h) - 1)/(a-1), and h at a = 1. */
  alpha_divergence: (h, a) =>
    Math.abs(a - 1) < 1e-6 ? h : mul(add(exp(minimum(mul(h, a - 1), largestExponent)), -1), 1 / (a - 1)),
};

/** S_w and S_l: h_w and h_l, or their f-divergence scores. */
export function scores(p: PairLogProbs, q: PreferenceParameters): [chosen: Tensor, rejected: Tensor] {
  const score = (h: Tensor): Tensor => divergences[q.fDivergenceType](h, q.fAlphaDivergenceCoef);
  return [score(chosenRatio(p)), score(rejectedRatio(p))];
}

/** z = β(S_w - S_l). */
export function scoreMargin(p: PairLogProbs, q: PreferenceParameters): Tensor {
  const [chosen, rejected] = scores(p, q);
  return mul(sub(chosen, rejected), q.beta);
}

/** -Σ s_w / Σ n_w: minus the mean log-probability of all chosen tokens, a scalar. */
export const tokenMeanNll = (p: PairLogProbs): Tensor => {
  const total = sum(p.chosenUnweighted ?? p.chosen);
  return p.nllTokens === undefined ? neg(div(total, sum(p.chosenLengths))) : mul(total, -1 / p.nllTokens);
};

/** s_w/n_w and s_l/n_l. */
export const meanLogProbs = (p: PairLogProbs): [chosen: Tensor, rejected: Tensor] => [
  div(p.chosen, p.chosenLengths),
  div(p.rejected, p.rejectedLengths),
];
