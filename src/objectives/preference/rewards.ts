// The implicit reward of a response, as metrics report it: plain numbers on the host.
import type { PreferenceLossName } from './facts.js';
import type { PreferenceParameters } from './inputs.js';

/** Of one response: log π, that of the reference or null, scored tokens. */
export type Reward = (policy: number, reference: number | null, tokens: number) => number;

type RewardOf = (q: PreferenceParameters) => Reward;

/** β(log π - log π_ref), whatever the loss: TRL's. */
const ratio: RewardOf =
  ({ beta }) =>
  (policy, reference) =>
    beta * (policy - (reference ?? 0));

/** Losses whose reward is another: those without a reference, as TRL's trainers of them log it. */
const rewards: { readonly [N in PreferenceLossName]?: RewardOf } = {
  ipo:
    ({ beta }) =>
    (policy, reference, tokens) =>
      beta * (reference === null ? policy / tokens : policy - reference),
  simpo:
    ({ beta }) =>
    (policy, _, tokens) =>
      beta * (policy / tokens),
  alphapo:
    ({ beta, alphapoAlpha: a }) =>
    (policy, _, tokens) =>
      beta * (a === 0 ? policy / tokens : -Math.expm1(-a * (policy / tokens)) / a),
  cpo:
    ({ beta }) =>
    (policy) =>
      beta * policy,
  orpo:
    ({ orpoLambda }) =>
    (policy, _, tokens) =>
      orpoLambda * (policy / tokens),
  slic:
    ({ slicLengthNormalize }) =>
    (policy, _, tokens) =>
      slicLengthNormalize ? policy / tokens : policy,
};

/** The reward that goes with a loss; with several, with the first. */
export const rewardOf = (names: readonly PreferenceLossName[], parameters: PreferenceParameters): Reward =>
  (rewards[names[0]] ?? ratio)(parameters);
