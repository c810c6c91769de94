// The table of preference losses: from name to a pure function of per-sequence log-probabilities, with the reward that goes
// with it. What is known of a loss without computing is in facts.ts; nothing else branches on names. Notation: see inputs.ts.

import { KeelgradError } from '../../errors.js';
import {
  add,
  div,
  exp,
  expm1,
  log,
  logSigmoid,
  maximum,
  minimum,
  mul,
  neg,
  relu,
  rsub,
  sigmoid,
  square,
  sub,
} from '../../ops/elementwise.js';
import { mean } from '../../ops/reduce.js';
import type { Tensor } from '../../tensor/tensor.js';
import type { PreferenceLossName } from './facts.js';
import {
  chosenRatio,
  margin,
  meanLogProbs,
  type PairLogProbs,
  type PreferenceParameters,
  type Reward,
  ratioMargin,
  rejectedRatio,
  scoreMargin,
  scores,
  tokenMeanNll,
} from './inputs.js';
import { type LabelledLogProbs, pairProspects, prospects, requireKl } from './kto.js';
import { sortAscending } from './sort.js';

interface LossDefinition {
  /** `[B]`, or a scalar that holds for the whole batch. */
  readonly value: (pairs: PairLogProbs, parameters: PreferenceParameters) => Tensor;
  /** `[B]` of labelled responses without pairs, of losses that are sums over single responses. */
  readonly response?: (responses: LabelledLogProbs, parameters: PreferenceParameters) => Tensor;
  /** As TRL's trainers log it; β(log π - log π_ref) unless given. */
  readonly reward?: (parameters: PreferenceParameters) => Reward;
}

const ratioReward = ({ beta }: PreferenceParameters): Reward => {
  return (policy, reference) => beta * (policy - (reference ?? 0));
};

/** -log σ(z). */
const logistic = (z: Tensor): Tensor => neg(logSigmoid(z));

/** -(1-ε) log σ(z) - ε log σ(-z). */
const smoothed = (z: Tensor, epsilon: number): Tensor =>
  sub(mul(logSigmoid(z), epsilon - 1), mul(logSigmoid(neg(z)), epsilon));

/** (1 - exp(-αx))/α: AlphaPO's reward of a mean log-probability x; x itself at α = 0. */
const alphaReward = (x: Tensor, alpha: number): Tensor => (alpha === 0 ? x : mul(expm1(mul(x, -alpha)), -1 / alpha));

// A probability that rounds to 1 has no finite odds: the logarithm stops here, its gradient with it.
const nearestToZero = -1e-30;

/** log(p/(1-p)) of a = log p. */
const logOdds = (a: Tensor): Tensor => {
  const bounded = minimum(a, nearestToZero);
  return sub(bounded, log(neg(expm1(bounded))));
};

/** name → loss. Canonical names are TRL's where it has the loss: `ipo` averages over tokens, `ipo_sum` is the paper's. */
export const preferenceLosses: Readonly<Record<PreferenceLossName, LossDefinition>> = {
  /** -log σ(z), z = β(S_w - S_l). DPO: Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; Eq. 1 of the SPO paper. */
  sigmoid: { value: (p, q) => logistic(scoreMargin(p, q)) },

  /** max(0, 1 - z); the derivative at the kink is 0. Zhao et al. 2023, arXiv 2305.10425; Liu et al. 2024, arXiv 2309.06657. */
  hinge: { value: (p, q) => relu(rsub(scoreMargin(p, q), 1)) },

  /** (S_w/n_w - S_l/n_l - 1/(2β))². Azar et al. 2023, arXiv 2310.12036, on token means. */
  ipo: {
    value: (p, q) => {
      const [chosen, rejected] = scores(p, q);
      return square(add(sub(div(chosen, p.chosenLengths), div(rejected, p.rejectedLengths)), -1 / (2 * q.beta)));
    },
    reward:
      ({ beta }) =>
      (policy, reference, tokens) =>
        beta * (reference === null ? policy / tokens : policy - reference),
  },

  /** (h_w - h_l - 1/(2β))². Azar et al. 2023, arXiv 2310.12036, Eq. 17. */
  ipo_sum: { value: (p, { beta }) => square(add(ratioMargin(p), -1 / (2 * beta))) },

  /** (-(1-ε) log σ(z) + ε log σ(-z))/(1-2ε); can be negative. Chowdhury et al. 2024, arXiv 2403.00409, Eq. 7. */
  robust: {
    value: (p, q) => {
      const z = scoreMargin(p, q);
      const kept = mul(logSigmoid(z), -(1 - q.labelSmoothing));
      return mul(add(kept, mul(logSigmoid(neg(z)), q.labelSmoothing)), 1 / (1 - 2 * q.labelSmoothing));
    },
  },

  /** -(1-ε) log σ(z) - ε log σ(-z), z = β(h_w - h_l). Conservative DPO: Mitchell 2023, "A note on DPO with noisy preferences". */
  cdpo: { value: (p, q) => smoothed(margin(p, q.beta), q.labelSmoothing) },

  /** σ(z)(log σ(z) - log(1-ε)) + σ(-z)(log σ(-z) - log ε), ε > 0. EXO: Ji et al. 2024, arXiv 2402.00856. */
  exo_pair: {
    value: (p, q) => {
      const z = scoreMargin(p, q);
      const side = (x: Tensor, share: number): Tensor => mul(sigmoid(x), add(logSigmoid(x), -Math.log(share)));
      return add(side(z, 1 - q.labelSmoothing), side(neg(z), q.labelSmoothing));
    },
  },

  /** -log σ(βh_w) - ½ log σ(-βh_w) - ½ log σ(-βh_l). NCA: Chen et al. 2024, arXiv 2402.05369. */
  nca_pair: {
    value: (p, { beta }) => {
      const [chosen, rejected] = [mul(chosenRatio(p), beta), mul(rejectedRatio(p), beta)];
      const noise = mul(add(logSigmoid(neg(chosen)), logSigmoid(neg(rejected))), 0.5);
      return neg(add(logSigmoid(chosen), noise));
    },
  },

  /** -log σ(βh_w) - log σ(-βh_l), without a running shift of rewards. BCO: Jung et al. 2024, arXiv 2404.04656. */
  bco_pair: {
    value: (p, { beta }) => add(logistic(mul(chosenRatio(p), beta)), logistic(neg(mul(rejectedRatio(p), beta)))),
    response: (r, { beta }) => {
      const sign = add(mul(r.desirable, 2), -1);
      return logistic(mul(mul(sub(r.policy, r.reference), sign), beta));
    },
  },

  /** (h_w - 1/(2β))² + (h_l + 1/(2β))². SPPO with hard labels: Wu et al. 2024, arXiv 2405.00675. */
  sppo_hard: { value: (p, { beta }) => calibration(p, beta) },

  /** 1 - σ(βh_w) + σ(βh_l). APO-zero: D'Oosterlinck et al. 2024, arXiv 2408.06266. */
  apo_zero: {
    value: (p, { beta }) => add(sigmoid(mul(chosenRatio(p), -beta)), sigmoid(mul(rejectedRatio(p), beta))),
  },

  /** σ(βh_w) + 1 - σ(β(h_w - h_l)). APO-down: D'Oosterlinck et al. 2024, arXiv 2408.06266. */
  apo_down: { value: (p, { beta }) => add(sigmoid(mul(chosenRatio(p), beta)), sigmoid(margin(p, -beta))) },

  /**
   * cdpo of z = β d, d = sort(s_w - s_l) - sort(r_w - r_l), sorted over the batch; values in sorted order. AOT, paired:
   * Melnyk et al. 2024, arXiv 2406.05882.
   */
  aot: {
    value: (p, q) => {
      const [policy, reference] = [sub(p.chosen, p.rejected), sub(p.refChosen!, p.refRejected!)];
      return smoothed(mul(sub(sortAscending(policy), sortAscending(reference)), q.beta), q.labelSmoothing);
    },
  },

  /** The same with d = sort(h_w) - sort(h_l). AOT, unpaired: Melnyk et al. 2024, arXiv 2406.05882. */
  aot_unpaired: {
    value: (p, q) => {
      const d = sub(sortAscending(chosenRatio(p)), sortAscending(rejectedRatio(p)));
      return smoothed(mul(d, q.beta), q.labelSmoothing);
    },
  },

  /** -log σ(z) (1-m) + exp(-z) m, m = σ(z/τ). DiscoPOP: Lu et al. 2024, arXiv 2406.08414. */
  discopop: {
    value: (p, q) => {
      const z = scoreMargin(p, q);
      const gate = mul(z, 1 / q.discopopTau);
      // exp(-z) m in one exponent: apart, they are infinity times 0 for large margins.
      return add(mul(logistic(z), sigmoid(neg(gate))), exp(sub(logSigmoid(gate), z)));
    },
  },

  /** -log σ(β(S_w/n_w - S_l/n_l)): DPO on token means, as in TRL and in Tülu 3 (Lambert et al. 2024, arXiv 2411.15124). */
  sigmoid_norm: {
    value: (p, q) => {
      const [chosen, rejected] = scores(p, q);
      return logistic(mul(sub(div(chosen, p.chosenLengths), div(rejected, p.rejectedLengths)), q.beta));
    },
  },

  /** -log σ(β(h_w - h_l - λ max(0, -h_w))). DPO-Positive: Pal et al. 2024, arXiv 2402.13228. */
  dpop: {
    value: (p, { beta, dpopLambda }) => {
      const fallen = mul(relu(neg(chosenRatio(p))), dpopLambda);
      return logistic(mul(sub(ratioMargin(p), fallen), beta));
    },
  },

  /** -log σ(β(h_w - h_l) + α(n_w - n_l)). R-DPO: Park et al. 2024, arXiv 2403.19159. */
  rdpo: {
    value: (p, { beta, rdpoAlpha }) =>
      logistic(add(margin(p, beta), mul(sub(p.chosenLengths, p.rejectedLengths), rdpoAlpha))),
  },

  /** -log σ(h_w - h_l) + (h_w - 1/(2β))² + (h_l + 1/(2β))²; no beta in the first. Xiao et al. 2024, arXiv 2412.14516. */
  cal_dpo: { value: (p, { beta }) => add(logistic(ratioMargin(p)), calibration(p, beta)) },

  /** -log σ(β(s_w/n_w - s_l/n_l) - γ), smoothed by ε as in TRL. SimPO: Meng et al. 2024, arXiv 2405.14734. */
  simpo: {
    value: (p, q) => targeted(meanLogProbs(p), q),
    reward:
      ({ beta }) =>
      (policy, _, tokens) =>
        beta * (policy / tokens),
  },

  /** SimPO with (1 - exp(-αx))/α for each mean log-probability x. AlphaPO: Gupta et al. 2025, arXiv 2501.03884. */
  alphapo: {
    value: (p, q) => {
      const [chosen, rejected] = meanLogProbs(p);
      return targeted([alphaReward(chosen, q.alphapoAlpha), alphaReward(rejected, q.alphapoAlpha)], q);
    },
    reward:
      ({ beta, alphapoAlpha: a }) =>
      (policy, _, tokens) =>
        beta * (a === 0 ? policy / tokens : -Math.expm1(-a * (policy / tokens)) / a),
  },

  /** cdpo of z = β(s_w - s_l); the NLL term is preferenceLoss's. CPO: Xu et al. 2024, arXiv 2401.08417. */
  cpo: {
    value: (p, q) => smoothed(mul(sub(p.chosen, p.rejected), q.beta), q.labelSmoothing),
    reward:
      ({ beta }) =>
      (policy) =>
        beta * policy,
  },

  /**
   * -λ log σ(log odds_w - log odds_l), odds of the mean log-probability; the NLL term is preferenceLoss's. ORPO: Hong et al.
   * 2024, arXiv 2403.07691.
   */
  orpo: {
    value: (p, { orpoLambda }) => {
      const [chosen, rejected] = meanLogProbs(p);
      return mul(logistic(sub(logOdds(chosen), logOdds(rejected))), orpoLambda);
    },
    reward:
      ({ orpoLambda }) =>
      (policy, _, tokens) =>
        orpoLambda * (policy / tokens),
  },

  /**
   * max(0, δ - s_w + s_l) - λ s_w, with the chosen response as target; token means for sums with slicLengthNormalize.
   * SLiC-HF: Zhao et al. 2023, arXiv 2305.10425.
   */
  slic: {
    value: (p, { slicDelta, slicLambda, slicLengthNormalize }) => {
      const [chosen, rejected] = slicLengthNormalize ? meanLogProbs(p) : [p.chosen, p.rejected];
      return sub(relu(add(sub(rejected, chosen), slicDelta)), mul(chosen, slicLambda));
    },
    reward:
      ({ slicLengthNormalize }) =>
      (policy, _, tokens) =>
        slicLengthNormalize ? policy / tokens : policy,
  },

  /** Minus the mean log-probability of all chosen tokens of the batch: one number, no reference. */
  sft: { value: tokenMeanNll },

  /**
   * w_d (1 - σ(β(h - kl))) of desirable responses, w_u (1 - σ(β(kl - h))) of undesirable ones; of a pair, the mean of its two.
   * KTO: Ethayarajh et al. 2024, arXiv 2402.01306.
   */
  kto: {
    value: (p, q) => {
      const above = (h: Tensor): Tensor => mul(sub(h, requireKl(p)), q.beta);
      return pairProspects(above(chosenRatio(p)), above(rejectedRatio(p)), q);
    },
    response: (r, q) => prospects(r, q, requireKl(r)),
  },

  /** w_d (1 - σ(βh)) and w_u σ(βh), as kto with kl = 0: half of apo_zero on pairs. D'Oosterlinck et al. 2024, arXiv 2408.06266. */
  apo_zero_unpaired: {
    value: (p, q) => pairProspects(mul(chosenRatio(p), q.beta), mul(rejectedRatio(p), q.beta), q),
    response: (r, q) => prospects(r, q, 0),
  },

  /** -log σ(β(h_w - h_l) - offset), an offset for each pair. ODPO: Amini et al. 2024, arXiv 2402.10571. */
  odpo: {
    value: (p, { beta }) => {
      if (p.offsets) return logistic(sub(margin(p, beta), p.offsets));
      throw new KeelgradError('[odpo] expected an offset for each pair, found none; pass offsets [B], or use sigmoid');
    },
  },

  /**
   * -log σ(β'(h_w - h_l)), β' = max(1e-3, β(1 + α(M - M_0))), M the batch's mean of h_w - h_l, no gradient through β'. The
   * caller keeps M_0 (see nextBetaDpoMean). β-DPO without its filter: Wu et al. 2024, arXiv 2407.08639.
   */
  beta_dpo: {
    value: (p, q) => {
      const h = ratioMargin(p);
      const surplus = sub(mean(h.detach()), q.betaDpoMean);
      const beta = maximum(mul(add(mul(surplus, q.betaDpoAlpha), 1), q.beta), 1e-3);
      return logistic(mul(h, beta));
    },
  },
};

/** The reward that goes with a loss. */
export const rewardOf = (name: PreferenceLossName, parameters: PreferenceParameters): Reward =>
  (preferenceLosses[name].reward ?? ratioReward)(parameters);

/** (h_w - 1/(2β))² + (h_l + 1/(2β))². */
const calibration = (p: PairLogProbs, beta: number): Tensor =>
  add(square(add(chosenRatio(p), -1 / (2 * beta))), square(add(rejectedRatio(p), 1 / (2 * beta))));

/** The smoothed logistic loss of β(a_w - a_l) - γ. */
const targeted = ([chosen, rejected]: readonly [Tensor, Tensor], q: PreferenceParameters): Tensor =>
  smoothed(add(mul(sub(chosen, rejected), q.beta), -q.simpoGamma), q.labelSmoothing);

/** M_0 for the batch after this one: momentum M_0 + (1 - momentum) M. The authors' momentum is 0.9. */
export const nextBetaDpoMean = (p: PairLogProbs, previous: number | Tensor, momentum: number): Tensor => {
  const batch = mul(mean(ratioMargin(p).detach()), 1 - momentum);
  return typeof previous === 'number' ? add(batch, momentum * previous) : add(batch, mul(previous, momentum));
};
