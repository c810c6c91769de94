// The preference loss of a batch: losses of the table, weighted and added, with the NLL of the chosen responses beside them.
// Owns the checks of library calls; the formulas are in preference/losses.ts.
import { didYouMean, KeelgradError } from '../errors.js';
import { add, div, mul, neg } from '../ops/elementwise.js';
import { mean } from '../ops/reduce.js';
import type { Tensor } from '../tensor/tensor.js';
import {
  defaultDivergenceCoefficient,
  defaultNllWeight,
  type FDivergence,
  fDivergences,
  type LossParameter,
  lossParameterNames,
  lossParameters,
  type NllReduction,
  type PreferenceLossName,
  usersOf,
} from './preference/facts.js';
import { type PairLogProbs, type PreferenceParameters, type Reward, tokenMeanNll } from './preference/inputs.js';
import type { LabelledLogProbs } from './preference/kto.js';
import { preferenceLosses, rewardOf } from './preference/losses.js';
import { type LossContext, lossConflict, unpairedConflict } from './preference/rules.js';

export type { FDivergence, NllReduction, PreferenceLossName } from './preference/facts.js';
export { margin, type PairLogProbs, type PreferenceParameters, type Reward } from './preference/inputs.js';
export { ktoKl, type LabelledLogProbs } from './preference/kto.js';
export { nextBetaDpoMean, preferenceLosses } from './preference/losses.js';
export { lengthDesensitizedWeights, wpoWeights } from './preference/tokens.js';

/** Parameters carry their loss's name (see `lossParameters` for defaults); one that no named loss uses is refused. */
export interface PreferenceLossOptions extends Partial<Record<LossParameter, number>> {
  /** Inverse temperature of the implicit reward; > 0. */
  beta: number;
  /** One loss, or several that are added with `lossWeights`. */
  lossType?: PreferenceLossName | readonly PreferenceLossName[];
  lossWeights?: readonly number[];
  /** The score of a response; reverse_kl, DPO's, by default. */
  fDivergenceType?: FDivergence;
  /** a of alpha_divergence; 0.5 by default. */
  fAlphaDivergenceCoef?: number;
  /** SLiC on token means in place of sums. */
  slicLengthNormalize?: boolean;
  /** Weight of the NLL of the chosen responses; 0 by default, 1 with cpo and orpo. */
  nllWeight?: number;
  /** token-mean by default. */
  nllReduction?: NllReduction;
  /** M_0 of beta_dpo; 0 by default. */
  betaDpoMean?: number | Tensor;
}

/** -log π(y_w|x) of a batch, one number. DPO with sequence-mean: Pang et al. 2024, arXiv 2404.19733; token-mean: TRL. */
const nllTerms: Readonly<Record<NllReduction, (p: PairLogProbs) => Tensor>> = {
  'token-mean': tokenMeanNll,
  'sequence-mean': (p) => neg(mean(div(p.chosenUnweighted ?? p.chosen, p.chosenLengths))),
  'sequence-sum': (p) => neg(mean(p.chosenUnweighted ?? p.chosen)),
};

/** The NLL of the chosen responses of a batch, a scalar. */
export const chosenNll = (pairs: PairLogProbs, reduction: NllReduction = 'token-mean'): Tensor =>
  nllTerms[reduction](pairs);

const namesOf = (o: PreferenceLossOptions): readonly PreferenceLossName[] => [o.lossType ?? 'sigmoid'].flat();

/** Every parameter with its value: given, or its default. */
export function completeParameters(o: PreferenceLossOptions): PreferenceParameters {
  const numbers = lossParameterNames.map((name) => [name, o[name] ?? lossParameters[name].default]);
  return {
    ...(Object.fromEntries(numbers) as Record<LossParameter, number>),
    beta: o.beta,
    fDivergenceType: o.fDivergenceType ?? 'reverse_kl',
    fAlphaDivergenceCoef: o.fAlphaDivergenceCoef ?? defaultDivergenceCoefficient,
    slicLengthNormalize: o.slicLengthNormalize ?? false,
    betaDpoMean: o.betaDpoMean ?? 0,
  };
}

function requireNames(names: readonly PreferenceLossName[], weights: readonly number[]): void {
  const known = Object.keys(preferenceLosses);
  if (names.length === 0)
    throw new KeelgradError(`loss type: expected at least one of ${known.join(', ')}, found none`);
  const unknown = names.find((name) => !known.includes(name));
  if (unknown !== undefined)
    throw new KeelgradError(
      `loss type: expected one of ${known.join(', ')}, found ${unknown}${didYouMean(unknown, known)}`,
    );
  const twice = names.find((name, i) => names.indexOf(name) < i);
  if (twice !== undefined)
    throw new KeelgradError(`loss type: expected every loss once, found ${twice} twice; add up its weights`);
  if (weights.length !== names.length)
    throw new KeelgradError(`loss weights: expected ${names.length}, one per loss type, found ${weights.length}`);
  const bad = weights.find((w) => !(w >= 0 && Number.isFinite(w)));
  if (bad !== undefined) throw new KeelgradError(`loss weights: expected numbers of at least 0, found ${bad}`);
  if (weights.every((w) => w === 0))
    throw new KeelgradError('loss weights: expected one above 0, found 0 for every loss');
}

/** `labelSmoothing` → `label smoothing`. */
const inWords = (name: string): string => name.replace(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`);

function describeRange(p: { min?: number; above?: number; below?: number }): string {
  if (p.below !== undefined) return `a number from ${p.min} to below ${p.below}`;
  if (p.above !== undefined) return `a number above ${p.above}`;
  return p.min === undefined ? 'a number' : `a number of at least ${p.min}`;
}

function requireParameter(name: LossParameter, value: number, names: readonly PreferenceLossName[]): void {
  const range: { default: number; min?: number; above?: number; below?: number } = lossParameters[name];
  const inRange =
    Number.isFinite(value) &&
    value >= (range.min ?? Number.NEGATIVE_INFINITY) &&
    value > (range.above ?? Number.NEGATIVE_INFINITY) &&
    value < (range.below ?? Number.POSITIVE_INFINITY);
  if (!inRange) throw new KeelgradError(`${inWords(name)}: expected ${describeRange(range)}, found ${value}`);
  if (value === range.default || usersOf(name, names).length > 0) return;
  const [first, ...others] = usersOf(name);
  const also = others.length > 0 ? `, and so do ${others.join(', ')}` : '';
  throw new KeelgradError(
    `${inWords(name)} ${value} has no meaning for ${names.join(', ')}; ${first} defines it${also}`,
  );
}

const libraryNaming = {
  option: (key: string): string => key,
  setting: (key: string, value: string | number): string => `${key}: ${JSON.stringify(value)}`,
};

/** Settings that are no plain numbers of one loss. */
function requireSettings(o: PreferenceLossOptions, q: PreferenceParameters, nllWeight: number): void {
  if (!(nllWeight >= 0 && Number.isFinite(nllWeight)))
    throw new KeelgradError(`nll weight: expected a number of at least 0, found ${nllWeight}`);
  requireOneOf('nll reduction', o.nllReduction ?? 'token-mean', Object.keys(nllTerms));
  requireOneOf('f-divergence', q.fDivergenceType, fDivergences);
  const coefficient = q.fAlphaDivergenceCoef;
  if (!Number.isFinite(coefficient))
    throw new KeelgradError(`f-divergence coefficient: expected a number, found ${coefficient}`);
  if (coefficient !== defaultDivergenceCoefficient && q.fDivergenceType !== 'alpha_divergence')
    throw new KeelgradError(`f-divergence coefficient ${coefficient} has no meaning for ${q.fDivergenceType}`);
  if (q.slicLengthNormalize && usersOf('slicLengthNormalize', namesOf(o)).length === 0)
    throw new KeelgradError(`slic length normalize has no meaning for ${namesOf(o).join(', ')}; slic defines it`);
}

function requireOneOf(what: string, found: string, known: readonly string[]): void {
  if (known.includes(found)) return;
  throw new KeelgradError(`${what}: expected one of ${known.join(', ')}, found ${found}${didYouMean(found, known)}`);
}

/** Checks what holds for pairs and for labelled responses alike. */
function requireOptions(o: PreferenceLossOptions, q: PreferenceParameters, nllWeight: number): void {
  if (!(o.beta > 0 && Number.isFinite(o.beta)))
    throw new KeelgradError(`beta: expected a number above 0, found ${o.beta}`);
  for (const name of lossParameterNames) requireParameter(name, q[name], namesOf(o));
  requireSettings(o, q, nllWeight);
}

const contextOf = (o: PreferenceLossOptions, q: PreferenceParameters, nllWeight: number): LossContext => ({
  names: namesOf(o),
  labelSmoothing: q.labelSmoothing,
  fDivergenceType: q.fDivergenceType,
  nllWeight,
  hasReference: true,
  referenceRemedy: 'pass refChosen and refRejected',
});

function refuse(where: string, conflict: string | undefined): void {
  if (conflict) throw new KeelgradError(`[${where}] ${conflict}`);
}

/** The losses of a call with their weights, names checked. */
function weightedNames(options: PreferenceLossOptions): { name: PreferenceLossName; weight: number }[] {
  const names = namesOf(options);
  const weights = options.lossWeights ?? names.map(() => 1);
  requireNames(names, weights);
  return names.map((name, k) => ({ name, weight: weights[k] }));
}

/**
 * The preference loss of a batch: the weighted sum over loss types of the mean over pairs, plus the weighted NLL of the chosen
 * responses. A scalar.
 *
 * @throws KeelgradError where parameters are out of range or would do nothing, or a loss lacks an input
 */
export function preferenceLoss(pairs: PairLogProbs, options: PreferenceLossOptions): Tensor {
  const losses = weightedNames(options);
  const parameters = completeParameters(options);
  const nllWeight = options.nllWeight ?? defaultNllWeight(namesOf(options));
  requireOptions(options, parameters, nllWeight);
  const context = {
    ...contextOf(options, parameters, nllWeight),
    hasReference: pairs.refChosen !== null && pairs.refRejected !== null,
    weighted: pairs.weights !== undefined,
  };
  refuse('preferenceLoss', lossConflict(context, libraryNaming));
  const weighted = (each: Tensor): Tensor => (pairs.weights ? mul(each, pairs.weights) : each);
  const terms = losses.map(({ name, weight }) =>
    mul(mean(weighted(preferenceLosses[name].value(pairs, parameters))), weight),
  );
  if (nllWeight > 0) terms.push(mul(chosenNll(pairs, options.nllReduction), nllWeight));
  return terms.reduce((total, term) => add(total, term));
}

/**
 * The loss of labelled responses without pairs: the weighted sum over loss types of the mean over all responses, both kinds
 * together. A scalar.
 *
 * @throws KeelgradError where parameters are out of range or would do nothing, or a loss needs pairs
 */
export function responseLoss(responses: LabelledLogProbs, options: PreferenceLossOptions): Tensor {
  const losses = weightedNames(options);
  const parameters = completeParameters(options);
  const nllWeight = options.nllWeight ?? defaultNllWeight(namesOf(options));
  requireOptions(options, parameters, nllWeight);
  refuse('responseLoss', unpairedConflict(contextOf(options, parameters, nllWeight), libraryNaming));
  return losses
    .map(({ name, weight }) => mul(mean(preferenceLosses[name].response!(responses, parameters)), weight))
    .reduce((total, term) => add(total, term));
}

/** The reward of a response that goes with the loss; with several losses, with the first. */
export const implicitReward = (options: PreferenceLossOptions): Reward =>
  rewardOf(namesOf(options)[0], completeParameters(options));

/** L_DPO (Eq. 1): preferenceLoss with the sigmoid loss. */
export const dpoLoss = (pairs: PairLogProbs, options: { beta: number }): Tensor =>
  preferenceLoss(pairs, { ...options, lossType: 'sigmoid' });
