// Losses of single responses labelled desirable or not: pure functions, for data without pairs.
import { KeelgradError } from '../../errors.js';
import { add, mul, neg, relu, rsub, sigmoid, sub } from '../../ops/elementwise.js';
import { mean } from '../../ops/reduce.js';
import type { Tensor } from '../../tensor/tensor.js';

/** Log-probabilities of B labelled responses, each `[B]`, summed over scored tokens. */
export interface LabelledLogProbs {
  policy: Tensor;
  reference: Tensor;
  /** 1 where desirable, 0 where not; of the dtype of `policy`. */
  desirable: Tensor;
  /** The KL estimate of `kto`, a scalar: see ktoKl. */
  kl?: Tensor;
}

export interface KtoOptions {
  /** > 0. */
  beta: number;
  lossType?: KtoLossName;
  /** Weights of the two kinds; 1 by default. */
  desirableWeight?: number;
  undesirableWeight?: number;
}

/** max(0, mean(s - r)) over mismatched pairs of prompt and response, both `[B]`; no gradient. Ethayarajh et al. 2024. */
export const ktoKl = (policy: Tensor, reference: Tensor): Tensor =>
  relu(mean(sub(policy.detach(), reference.detach())));

/** name → the point that a desirable response is to exceed, and an undesirable one to stay below. */
const ktoThresholds = {
  /** w_d (1 - σ(β(h - kl))) and w_u (1 - σ(β(kl - h))). KTO: Ethayarajh et al. 2024, arXiv 2402.01306. */
  kto: ({ kl }: LabelledLogProbs): Tensor => {
    if (kl) return kl;
    throw new KeelgradError(
      '[kto] expected the KL estimate, found none; pass kl: ktoKl(...), or use apo_zero_unpaired',
    );
  },
  /** w_d (1 - σ(βh)) and w_u σ(βh). APO-zero without pairs: D'Oosterlinck et al. 2024, arXiv 2408.06266. */
  apo_zero_unpaired: (): number => 0,
};

export type KtoLossName = keyof typeof ktoThresholds;

/**
 * The loss of each labelled response, `[B]`; the batch's is their mean, both kinds together.
 *
 * @throws KeelgradError where beta or a weight is out of range, or `kto` lacks its KL estimate
 */
export function ktoLosses(responses: LabelledLogProbs, options: KtoOptions): Tensor {
  const { beta, lossType = 'kto', desirableWeight = 1, undesirableWeight = 1 } = options;
  if (!(beta > 0)) throw new KeelgradError(`beta: expected a number above 0, found ${beta}`);
  for (const [name, weight] of Object.entries({ desirableWeight, undesirableWeight }))
    if (!(weight >= 0)) throw new KeelgradError(`${name}: expected a number of at least 0, found ${weight}`);
  const ratio = sub(responses.policy, responses.reference);
  const above = mul(sub(ratio, ktoThresholds[lossType](responses)), beta);
  const gained = mul(mul(responses.desirable, sigmoid(neg(above))), desirableWeight);
  const lost = mul(mul(rsub(responses.desirable, 1), sigmoid(above)), undesirableWeight);
  return add(gained, lost);
}

/** The mean of ktoLosses: a scalar. */
export const ktoLoss = (responses: LabelledLogProbs, options: KtoOptions): Tensor =>
  mean(ktoLosses(responses, options));
