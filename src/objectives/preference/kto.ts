// What losses of single responses are functions of: responses labelled desirable or not, for data without pairs.
import { KeelgradError } from '../../errors.js';
import { add, mul, neg, relu, rsub, sigmoid, sub } from '../../ops/elementwise.js';
import { mean } from '../../ops/reduce.js';
import type { Tensor } from '../../tensor/tensor.js';
import type { PreferenceParameters } from './inputs.js';

/** Log-probabilities of B labelled responses, each `[B]`, summed over scored tokens. */
export interface LabelledLogProbs {
  policy: Tensor;
  reference: Tensor;
  /** 1 where desirable, 0 where not; of the dtype of `policy`. */
  desirable: Tensor;
  /** The KL estimate of `kto`, a scalar: see ktoKl. */
  kl?: Tensor;
}

/** max(0, mean(s - r)) over mismatched pairs of prompt and response, both `[B]`; no gradient. Ethayarajh et al. 2024. */
export const ktoKl = (policy: Tensor, reference: Tensor): Tensor =>
  relu(mean(sub(policy.detach(), reference.detach())));

/** The KL estimate that `kto` compares with. */
export function requireKl({ kl }: { kl?: Tensor }): Tensor {
  if (kl) return kl;
  throw new KeelgradError('[kto] expected the KL estimate, found none; pass kl: ktoKl(...), or use apo_zero_unpaired');
}

/** w_d (1 - σ(a)) of desirable responses and w_u σ(a) of undesirable ones, a = β(h - threshold). */
export function prospects(r: LabelledLogProbs, q: PreferenceParameters, threshold: Tensor | number): Tensor {
  const above = mul(sub(sub(r.policy, r.reference), threshold), q.beta);
  const gained = mul(mul(r.desirable, sigmoid(neg(above))), q.ktoDesirableWeight);
  const lost = mul(mul(rsub(r.desirable, 1), sigmoid(above)), q.ktoUndesirableWeight);
  return add(gained, lost);
}

/** The mean of the two responses of each pair, from how far β h_w and β h_l are above the threshold. */
export const pairProspects = (chosen: Tensor, rejected: Tensor, q: PreferenceParameters): Tensor =>
  mul(add(mul(sigmoid(neg(chosen)), q.ktoDesirableWeight), mul(sigmoid(rejected), q.ktoUndesirableWeight)), 0.5);
