// Preference losses of the Bradley-Terry family: pure functions of per-sequence log-probabilities, in one table.
//
// Notation: h_w = log π(y_w|x) - log π_ref(y_w|x), h_l likewise; n_w, n_l scored tokens; β beta; ε label smoothing.
import { didYouMean, KeelgradError } from '../errors.js';
import { add, div, logSigmoid, mul, neg, square, sub } from '../ops/elementwise.js';
import { mean, sum } from '../ops/reduce.js';
import type { Tensor } from '../tensor/tensor.js';

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
}

export interface PreferenceParameters {
  beta: number;
  labelSmoothing: number;
}

interface LossDefinition {
  /** `[B]`, or a scalar that holds for the whole batch. */
  value: (pairs: PairLogProbs, parameters: PreferenceParameters) => Tensor;
  usesLabelSmoothing: boolean;
}

const ratio = (policy: Tensor, reference: Tensor | null): Tensor => (reference ? sub(policy, reference) : policy);
const chosenRatio = (p: PairLogProbs): Tensor => ratio(p.chosen, p.refChosen);
const rejectedRatio = (p: PairLogProbs): Tensor => ratio(p.rejected, p.refRejected);

/** β(h_w - h_l): the s of Eq. 1. */
export const margin = (p: PairLogProbs, beta: number): Tensor => mul(sub(chosenRatio(p), rejectedRatio(p)), beta);

/** name → loss. `ipo` averages over tokens as TRL does, `ipo_sum` is the paper's form. */
export const preferenceLosses = {
  /** -log σ(β(h_w - h_l)). DPO: Rafailov et al. 2023; Eq. 1 of the SPO paper. */
  sigmoid: {
    value: (p, { beta }) => neg(logSigmoid(margin(p, beta))),
    usesLabelSmoothing: false,
  },
  /** (h_w/n_w - h_l/n_l - 1/(2β))². Azar et al. 2023, on token means. */
  ipo: {
    value: (p, { beta }) =>
      square(add(sub(div(chosenRatio(p), p.chosenLengths), div(rejectedRatio(p), p.rejectedLengths)), -1 / (2 * beta))),
    usesLabelSmoothing: false,
  },
  /** (h_w - h_l - 1/(2β))². Azar et al. 2023, Eq. 17. */
  ipo_sum: {
    value: (p, { beta }) => square(add(sub(chosenRatio(p), rejectedRatio(p)), -1 / (2 * beta))),
    usesLabelSmoothing: false,
  },
  /** (-(1-ε) log σ(z) + ε log σ(-z)) / (1 - 2ε), z = β(h_w - h_l). Robust DPO: Chowdhury et al. 2024, Eq. 7. */
  robust: {
    value: (p, { beta, labelSmoothing }) => {
      const z = margin(p, beta);
      const kept = mul(logSigmoid(z), -(1 - labelSmoothing));
      return mul(add(kept, mul(logSigmoid(neg(z)), labelSmoothing)), 1 / (1 - 2 * labelSmoothing));
    },
    usesLabelSmoothing: true,
  },
  /** Minus the mean log-probability of all chosen tokens of the batch: one number, no reference. */
  sft: {
    value: (p) => neg(div(sum(p.chosen), sum(p.chosenLengths))),
    usesLabelSmoothing: false,
  },
} satisfies Record<string, LossDefinition>;

export type PreferenceLossName = keyof typeof preferenceLosses;

export interface PreferenceLossOptions {
  /** Inverse temperature of the implicit reward; > 0. */
  beta: number;
  /** One loss, or several that are added with `lossWeights`. */
  lossType?: PreferenceLossName | readonly PreferenceLossName[];
  lossWeights?: readonly number[];
  /** ε; only with losses that define it. */
  labelSmoothing?: number;
}

function requireSane(names: readonly PreferenceLossName[], weights: readonly number[], o: PreferenceLossOptions): void {
  const smoothing = o.labelSmoothing ?? 0;
  const unknown = names.find((name) => !Object.hasOwn(preferenceLosses, name));
  if (unknown !== undefined)
    throw new KeelgradError(
      `loss type: expected one of ${Object.keys(preferenceLosses).join(', ')}, found ${unknown}${didYouMean(unknown, Object.keys(preferenceLosses))}`,
    );
  if (!(o.beta > 0)) throw new KeelgradError(`beta: expected a number above 0, found ${o.beta}`);
  if (weights.length !== names.length)
    throw new KeelgradError(`loss weights: expected ${names.length}, one per loss type, found ${weights.length}`);
  if (!(smoothing >= 0 && smoothing < 0.5))
    throw new KeelgradError(`label smoothing: expected a number from 0 to below 0.5, found ${smoothing}`);
  if (smoothing > 0 && !names.some((n) => preferenceLosses[n].usesLabelSmoothing))
    throw new KeelgradError(`label smoothing ${smoothing} has no meaning for ${names.join(', ')}; robust defines it`);
}

/**
 * The preference loss of a batch: the weighted sum over loss types of the mean over pairs. A scalar.
 *
 * @throws KeelgradError where parameters are out of range or would do nothing
 */
export function preferenceLoss(pairs: PairLogProbs, options: PreferenceLossOptions): Tensor {
  const names = [options.lossType ?? 'sigmoid'].flat() as PreferenceLossName[];
  const weights = options.lossWeights ?? names.map(() => 1);
  requireSane(names, weights, options);
  const parameters = { beta: options.beta, labelSmoothing: options.labelSmoothing ?? 0 };
  return names
    .map((name, k) => mul(mean(preferenceLosses[name].value(pairs, parameters)), weights[k]))
    .reduce((total, term) => add(total, term));
}

/** L_DPO (Eq. 1): preferenceLoss with the sigmoid loss. */
export const dpoLoss = (pairs: PairLogProbs, options: { beta: number }): Tensor =>
  preferenceLoss(pairs, { ...options, lossType: 'sigmoid' });
