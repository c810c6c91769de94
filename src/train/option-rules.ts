// Rules between options: combinations in which one of them would silently do nothing, or that contradict each other.
// Must never change a value: a rule accepts or refuses, with the reason and the way out.

import { didYouMean, KeelgradError, show } from '../errors.js';
import {
  factsOf,
  type LossSetting,
  lossParameterNames,
  type PreferenceLossName,
  referenceFree,
  takesDivergence,
  usersOf,
} from '../objectives/preference/facts.js';
import { type LossContext, lossConflict } from '../objectives/preference/rules.js';
import { lossOptions } from './option-losses.js';
import { type Chosen, type Method, spoMethods, type Value } from './option-spec.js';
import type { OptionKey } from './option-table.js';
import { linearNames } from './option-training.js';
import { type PenaltyForm, spoConflict } from './spo-rules.js';

/** How messages spell options: as flags for the command line, as camelCase keys for library calls. */
export interface Naming {
  /** `--max-length` or `maxLength`. */
  option(key: string): string;
  /** `--loss-type robust` or `lossType: "robust"`. */
  setting(key: string, value: Value): string;
  /** A name as the user wrote it, known or not. */
  written(name: string): string;
}

/** One reason for an option to do nothing. */
interface DeadSwitch {
  readonly keys: readonly OptionKey[];
  readonly dead: (chosen: Chosen, method: Method) => boolean;
  /** Completes "--x has no effect ...". */
  readonly because: (naming: Naming, chosen: Chosen) => string;
  readonly remedy: (naming: Naming) => string;
  /** The value that says what holds anyway, and may therefore be given. */
  readonly neutral?: Value;
}

const list = (chosen: Chosen, key: OptionKey): readonly string[] => (chosen[key] ?? []) as readonly string[];

const leaveOut = (naming: Naming, key: OptionKey, value: Value): string =>
  `leave it out, or use ${naming.setting(key, value)}`;

const losses = (chosen: Chosen): readonly string[] => list(chosen, 'lossType');

const withLosses = (naming: Naming, chosen: Chosen): string =>
  `with ${naming.setting('lossType', chosen.lossType as Value)}`;

/** A setting of some losses does nothing with others. */
const lossSwitch = (key: LossSetting): DeadSwitch => ({
  keys: [key],
  dead: (chosen) => usersOf(key, losses(chosen)).length === 0,
  because: withLosses,
  remedy: (naming) => `use a loss that defines it: ${naming.setting('lossType', usersOf(key)[0])}`,
  ...(lossOptions[key].default === 0 && { neutral: 0 }),
});

const lossSwitches: readonly DeadSwitch[] = [
  ...[...lossParameterNames, 'slicLengthNormalize' as const].map(lossSwitch),
  {
    keys: ['beta'],
    dead: (chosen) => losses(chosen).length > 0 && factsOf(losses(chosen)).every((facts) => facts.noBeta),
    because: withLosses,
    remedy: () => 'leave it out',
  },
  {
    keys: ['reference'],
    dead: (chosen) => referenceFree(losses(chosen)),
    because: (naming, chosen) => `${withLosses(naming, chosen)}, which has no reference`,
    remedy: () => 'leave it out',
    neutral: 'none',
  },
  {
    keys: ['fDivergenceType'],
    dead: (chosen) => !takesDivergence(losses(chosen)),
    because: withLosses,
    remedy: (naming) => leaveOut(naming, 'lossType', 'sigmoid'),
    neutral: 'reverse_kl',
  },
  {
    keys: ['fAlphaDivergenceCoef'],
    dead: (chosen) => chosen.fDivergenceType !== 'alpha_divergence',
    because: (naming, chosen) => `with ${naming.setting('fDivergenceType', chosen.fDivergenceType as Value)}`,
    remedy: (naming) => leaveOut(naming, 'fDivergenceType', 'alpha_divergence'),
  },
  {
    keys: ['nllReduction'],
    dead: (chosen) => chosen.nllWeight === 0,
    because: (naming) => `with ${naming.setting('nllWeight', 0)}`,
    remedy: (naming) => `leave it out, or give ${naming.option('nllWeight')}`,
    neutral: 'token-mean',
  },
  {
    keys: ['ldAlpha'],
    dead: (chosen) => factsOf(losses(chosen)).every((facts) => facts.isNll),
    because: (naming, chosen) => `${withLosses(naming, chosen)}, which is no loss of pairs`,
    remedy: () => 'leave it out',
    neutral: 1,
  },
  {
    keys: ['lossWeights'],
    dead: (chosen) => losses(chosen).length < 2,
    because: () => 'with a single loss',
    remedy: (naming) => `leave it out, or name several: ${naming.setting('lossType', 'sigmoid,sft')}`,
  },
];

/** Whether the regularizer has a part: with one weight, or with some of several. */
const hasRegularizer = ({ gamma, gammas }: Chosen): boolean =>
  gammas === undefined ? gamma !== 0 : (gammas as readonly number[]).some((weight) => weight !== 0);

const withoutRegularizer = (key: OptionKey, neutral: Value, reported = false): DeadSwitch => ({
  keys: [key],
  dead: (chosen) => !hasRegularizer(chosen) && !(reported && chosen.gradNorms === 'on'),
  because: (naming) => `with ${naming.setting('gamma', 0)}: there is no regularizer`,
  remedy: (naming) => `leave it out, or give ${naming.option('gamma')}`,
  neutral,
});

const withoutLowerLevel = (key: OptionKey, neutral?: Value): DeadSwitch => ({
  keys: [key],
  dead: (chosen) => chosen.lowerSteps === 0,
  because: (naming) => `with ${naming.setting('lowerSteps', 0)}: there is no lower level`,
  remedy: (naming) => leaveOut(naming, 'lowerSteps', 1),
  ...(neutral !== undefined && { neutral }),
});

const spoSwitches: readonly DeadSwitch[] = [
  withoutRegularizer('normOver', 'all', true),
  withoutRegularizer('normPerToken', false, true),
  withoutRegularizer('regularizerMethod', 'exact'),
  withoutLowerLevel('lowerLearningRate'),
  withoutLowerLevel('lowerSolver', 'gradient'),
  withoutLowerLevel('lowerWarmStart', false),
  withoutLowerLevel('penaltyForm', 'auto'),
  {
    keys: ['lowerSolver'],
    dead: (chosen) => chosen.lowerSolver === 'momentum' && chosen.lowerSteps === 1,
    because: (naming) =>
      `with ${naming.setting('lowerSteps', 1)}: momentum is fresh in every step, and its first one is the gradient's`,
    remedy: (naming) => `take more steps, or use ${naming.setting('lowerSolver', 'adam')}`,
  },
  {
    keys: ['gradNorms'],
    dead: (chosen) => chosen.gradNorms === 'off' && hasRegularizer(chosen),
    because: (naming, chosen) =>
      `with ${naming.setting('gamma', chosen.gamma as Value)}: the regularizer needs these norms`,
    remedy: (naming) => leaveOut(naming, 'gamma', 0),
  },
  {
    keys: ['lambdaSchedule'],
    dead: (chosen) => chosen.lambda === 0,
    because: (naming) => `with ${naming.setting('lambda', 0)}: there is no penalty`,
    remedy: (naming) => leaveOut(naming, 'lambda', 1),
    neutral: 'constant',
  },
  {
    keys: ['lambdaRampSteps'],
    dead: (chosen) => chosen.lambdaSchedule === 'constant',
    because: (naming) => `with ${naming.setting('lambdaSchedule', 'constant')}`,
    remedy: (naming) => leaveOut(naming, 'lambdaSchedule', 'linear'),
  },
  {
    keys: ['termNorms'],
    dead: (chosen) => chosen.lambda === 0 && chosen.gamma === 0,
    because: (naming) =>
      `with ${naming.setting('lambda', 0)} and ${naming.setting('gamma', 0)}: the gradient is the preference loss's alone`,
    remedy: () => 'leave it out',
  },
  {
    keys: ['termNorms'],
    dead: (chosen) => chosen.gamma === 0 && chosen.lowerSteps !== 0 && chosen.ldAlpha === 1,
    because: (naming) => `with a lower level and ${naming.setting('gamma', 0)}: all terms are reported without it`,
    remedy: () => 'leave it out',
  },
  {
    keys: ['termNorms'],
    dead: (chosen) => chosen.ldAlpha !== 1,
    because: (naming, chosen) =>
      `with ${naming.setting('ldAlpha', chosen.ldAlpha as Value)}, which weighs tokens: the terms are then not told apart`,
    remedy: (naming) => leaveOut(naming, 'ldAlpha', 1),
  },
];

const deadSwitches: readonly DeadSwitch[] = [
  {
    keys: ['loraR', 'loraAlpha', 'loraDropout', 'loraTargets', 'rslora'],
    dead: (chosen) => chosen.train === 'full',
    because: (naming) => `with ${naming.setting('train', 'full')}, which trains no adapter`,
    remedy: (naming) => leaveOut(naming, 'train', 'both'),
  },
  {
    keys: ['loraR', 'loraAlpha', 'loraDropout', 'loraTargets', 'rslora'],
    dead: (chosen) => chosen.adapter !== undefined,
    because: (naming) => `with ${naming.option('adapter')}: the values that the adapter was made with hold`,
    remedy: (naming) => `leave it out, or start a new adapter without ${naming.option('adapter')}`,
  },
  {
    keys: ['loraDropout'],
    dead: (_, method) => method === 'dpo' || method === 'spo',
    because: () => 'here: dropout is off in every pass of a preference loss',
    remedy: () => 'leave it out',
    neutral: 0,
  },
  {
    keys: ['adapter'],
    dead: (chosen) => chosen.train === 'full',
    because: (naming) => `with ${naming.setting('train', 'full')}, which trains and saves the backbone alone`,
    remedy: (naming) => `merge it into the model first, or use ${naming.setting('train', 'both')}`,
  },
  ...lossSwitches,
  {
    keys: ['momentum'],
    dead: (chosen) => chosen.optimizer === 'adamw',
    because: (naming) => `with ${naming.setting('optimizer', 'adamw')}`,
    remedy: (naming) => leaveOut(naming, 'optimizer', 'sgd'),
    neutral: 0,
  },
  {
    keys: ['adamBeta1', 'adamBeta2', 'adamEpsilon'],
    dead: (chosen) => chosen.optimizer === 'sgd',
    because: (naming) => `with ${naming.setting('optimizer', 'sgd')}`,
    remedy: (naming) => leaveOut(naming, 'optimizer', 'adamw'),
  },
  {
    keys: ['weightDecayParams'],
    dead: (chosen) => chosen.weightDecay === 0,
    because: (naming) => `with ${naming.setting('weightDecay', 0)}`,
    remedy: (naming) => `leave it out, or give ${naming.option('weightDecay')}`,
    neutral: 'matrices',
  },
  {
    keys: ['warmupSteps', 'warmupRatio'],
    dead: (chosen) => chosen.lrSchedule === 'constant',
    because: (naming) => `with ${naming.setting('lrSchedule', 'constant')}`,
    remedy: (naming) => leaveOut(naming, 'lrSchedule', 'constant_with_warmup'),
    neutral: 0,
  },
  {
    keys: ['warmupSteps'],
    dead: (chosen) => chosen.warmupRatio !== undefined,
    because: (naming) => `beside ${naming.option('warmupRatio')}`,
    remedy: () => 'give one of the two',
  },
  {
    keys: ['epochs'],
    dead: (chosen) => chosen.maxSteps !== undefined,
    because: (naming) => `beside ${naming.option('maxSteps')}`,
    remedy: () => 'give one of the two',
  },
  ...spoSwitches,
  {
    keys: ['learningRate'],
    dead: (chosen, method) =>
      method === 'spo' && ![chosen.learningRateBackbone, chosen.learningRateAdapters].includes(chosen.learningRate),
    because: (naming) => `beside ${naming.option('learningRateBackbone')} and ${naming.option('learningRateAdapters')}`,
    remedy: () => 'leave it out',
  },
];

/** Pairs of options that replace each other: the command line's one drops a config file's other. */
export const exclusiveOptions: readonly (readonly [OptionKey, OptionKey])[] = [
  ['epochs', 'maxSteps'],
  ['warmupSteps', 'warmupRatio'],
];

/** Whether an option has any part in a run with these values. */
export function isLive(key: OptionKey, chosen: Chosen, method: Method): boolean {
  return !deadSwitches.some((row) => row.keys.includes(key) && row.dead(chosen, method));
}

export interface RuleContext {
  readonly method: Method;
  readonly chosen: Chosen;
  readonly isGiven: (key: OptionKey) => boolean;
  readonly naming: Naming;
}

function refuseDeadSwitches({ method, chosen, isGiven, naming }: RuleContext): void {
  for (const row of deadSwitches) {
    for (const key of row.keys) {
      const value = chosen[key];
      if (!isGiven(key) || value === false || value === row.neutral || !row.dead(chosen, method)) continue;
      throw new KeelgradError(
        `${naming.option(key)} has no effect ${row.because(naming, chosen)}; ${row.remedy(naming)}`,
      );
    }
  }
}

function checkLosses({ chosen, naming }: RuleContext): void {
  const names = losses(chosen);
  const weights = (chosen.lossWeights ?? []) as readonly number[];
  const repeated = names.find((name, i) => names.indexOf(name) !== i);
  if (repeated !== undefined) {
    const advice = `name it once and give its weight by ${naming.option('lossWeights')}`;
    throw new KeelgradError(`${naming.option('lossType')}: found ${repeated} twice; ${advice}`);
  }
  if (weights.length !== names.length) {
    const expected = `expected ${names.length} numbers, one for each of ${names.join(', ')}`;
    throw new KeelgradError(`${naming.option('lossWeights')}: ${expected}, found ${weights.length}`);
  }
  if (weights.length > 0 && weights.every((weight) => weight === 0)) {
    throw new KeelgradError(
      `${naming.option('lossWeights')}: expected at least one weight above 0, found ${show(weights)}`,
    );
  }
}

const takesSpoGradient = (method: Method): boolean => spoMethods.some((one) => one === method);

/** Losses that lack what they need, or that cannot be had together. */
function checkLossInputs({ method, chosen, naming }: RuleContext): void {
  if (method !== 'dpo' && !takesSpoGradient(method)) return;
  const context: LossContext = {
    names: losses(chosen) as readonly PreferenceLossName[],
    labelSmoothing: chosen.labelSmoothing as number,
    fDivergenceType: chosen.fDivergenceType as string,
    nllWeight: chosen.nllWeight as number,
    hasReference: chosen.reference !== 'none',
    referenceRemedy: leaveOut(naming, 'reference', 'initial'),
    batchSize: ((chosen.batchSize ?? chosen.pairs) as number) * ((chosen.gradientAccumulationSteps ?? 1) as number),
    weighted: chosen.wpo === true,
  };
  const conflict = lossConflict(context, naming);
  if (conflict !== undefined) throw new KeelgradError(`${naming.option('lossType')}: ${conflict}`);
}

/** The largest of an option's values, of which an analysis may take several. */
const largest = (chosen: Chosen, one: OptionKey, several: OptionKey): number =>
  Math.max(...((chosen[several] ?? [chosen[one]]) as readonly number[]));

/** Settings of SPO that exclude each other. The model's own dtype is looked at once more where it is known. */
function checkSpo({ method, chosen, naming }: RuleContext): void {
  if (!takesSpoGradient(method)) return;
  const conflict = spoConflict(
    {
      dtype: chosen.dtype as string,
      gamma: largest(chosen, 'gamma', 'gammas'),
      lowerSteps: largest(chosen, 'lowerSteps', 'lowerStepCounts'),
      lowerSolver: chosen.lowerSolver as string,
      lowerWarmStart: chosen.lowerWarmStart as boolean,
      penaltyForm: chosen.penaltyForm as PenaltyForm,
      regularizerMethod: chosen.regularizerMethod as string,
      gradientCheckpointing: chosen.gradientCheckpointing as boolean,
      learningRateBackbone: chosen.learningRateBackbone as number,
      learningRateAdapters: chosen.learningRateAdapters as number,
    },
    naming,
  );
  if (conflict !== undefined) throw new KeelgradError(conflict);
}

/** Names and full module paths both end in one of the seven; whether a path exists is the model's to say. */
function checkLoraTargets({ chosen, naming }: RuleContext): void {
  const targets = list(chosen, 'loraTargets');
  const known: readonly string[] = linearNames;
  const option = naming.option('loraTargets');
  for (const target of targets) {
    const name = target.slice(target.lastIndexOf('.') + 1);
    if (known.includes(name) || target === 'all-linear') continue;
    const advice = didYouMean(name, [...known, 'all-linear']);
    const expected = `expected all-linear, or names or module paths that end in ${known.join(', ')}`;
    throw new KeelgradError(`${option}: ${expected}, found ${show(target)}${advice}`);
  }
  if (targets.includes('all-linear') && targets.length > 1) {
    throw new KeelgradError(
      `${option}: expected all-linear alone, found ${show(targets.join(','))}; leave out the names`,
    );
  }
}

/** Applies every rule, in an order that reports the most specific trouble first. */
export function checkRules(context: RuleContext): void {
  refuseDeadSwitches(context);
  checkLosses(context);
  checkLossInputs(context);
  checkSpo(context);
  checkLoraTargets(context);
}
