// The option table against the documented names and defaults, and every refusal with its reason and way out.
import { describe, expect, it } from 'vitest';
import { assets } from '../../src/demo/settings.js';
import { KeelgradError } from '../../src/errors.js';
import {
  describeOptions,
  flagNaming,
  type Method,
  methods,
  optionsOf,
  planSteps,
  type Resolved,
  resolveOptions,
  specOf,
} from '../../src/train/options.js';
import { spoPresets } from '../../src/train/presets.js';

const paths = { model: 'm', data: 'd', output: 'o' };

function resolve<M extends Method>(method: M, given: Record<string, unknown> = {}): Resolved<M> {
  const required =
    method === 'score'
      ? { model: 'm', data: 'd' }
      : method === 'info' || method === 'demo' || method.startsWith('analyze')
        ? {}
        : paths;
  return resolveOptions(method, { ...required, ...given }, { naming: flagNaming });
}

function refusal(method: Method, given: Record<string, unknown>): string {
  try {
    resolve(method, given);
  } catch (error) {
    expect(error).toBeInstanceOf(KeelgradError);
    return (error as Error).message;
  }
  throw new Error(`accepted: ${method} ${JSON.stringify(given)}`);
}

const sevenLinears = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'];

/** As documented, written down a second time: the table must agree with it, not it with the table. */
const common = {
  adapter: undefined,
  overwrite: false,
  saveDtype: 'float32',
  device: 'auto',
  dtype: 'float32',
  threads: undefined,
  seed: 42,
  maxSteps: undefined,
  gradientAccumulationSteps: 1,
  lrSchedule: 'linear',
  warmupSteps: 0,
  warmupRatio: undefined,
  optimizer: 'adamw',
  adamBeta1: 0.9,
  adamBeta2: 0.999,
  adamEpsilon: 1e-8,
  momentum: 0,
  weightDecay: 0,
  weightDecayParams: 'matrices',
  maxGradNorm: 1,
  gradientCheckpointing: false,
  maxLength: 1024,
  shuffle: true,
  loraR: 16,
  loraAlpha: 32,
  loraTargets: sevenLinears,
  rslora: false,
  ...paths,
};

/** Of preference losses. */
const losses = {
  lossType: ['sigmoid'],
  lossWeights: [1],
  reference: 'initial',
  nllWeight: 0,
  nllReduction: 'token-mean',
  ldAlpha: 1,
  wpo: false,
  labelSmoothing: 0,
  fDivergenceType: 'reverse_kl',
  fAlphaDivergenceCoef: 0.5,
  discopopTau: 0.05,
  dpopLambda: 50,
  rdpoAlpha: 0.02,
  betaDpoAlpha: 0.6,
  betaDpoMomentum: 0.9,
  simpoGamma: 0.5,
  alphapoAlpha: 0.25,
  orpoLambda: 0.1,
  slicDelta: 1,
  slicLambda: 0.5,
  slicLengthNormalize: false,
  ktoDesirableWeight: 1,
  ktoUndesirableWeight: 1,
} as const;

/** What all analyses have. */
const analysis = <A extends string>(name: A) =>
  ({
    method: `analyze ${name}`,
    model: assets.model,
    output: `keelgrad-analyze-${name}`,
    adapter: undefined,
    beta: 0.5,
    dtype: 'float32',
    device: 'auto',
    threads: undefined,
  }) as const;

/** What those that take SPO's gradient have. */
const ofSpo = {
  ...losses,
  seed: 42,
  loraR: 16,
  loraAlpha: 32,
  loraTargets: sevenLinears,
  rslora: false,
  sftReduction: 'sum',
  penaltyForm: 'auto',
  normOver: 'all',
  regularizerMethod: 'exact',
} as const;

/** A momentum over steps has no part in one gradient. */
const { betaDpoMomentum: _, ...withoutMomentum } = ofSpo;

/** What those that train have. */
const followed = {
  ...ofSpo,
  preset: undefined,
  learningRate: 1e-4,
  batchSize: 4,
  lowerSteps: 1,
  lowerLearningRate: 2e-5,
  lowerSolver: 'gradient',
  lowerWarmStart: false,
  normPerToken: false,
} as const;

const documented = {
  sft: {
    ...common,
    method: 'sft',
    train: 'lora',
    sftLoss: 'nll',
    sftReduction: 'token-mean',
    epochs: 3,
    batchSize: 8,
    learningRate: 2e-4,
    loraDropout: 0.05,
  },
  dpo: {
    ...common,
    ...losses,
    method: 'dpo',
    train: 'lora',
    beta: 0.1,
    epochs: 1,
    batchSize: 4,
    learningRate: 1e-5,
    loraDropout: 0,
  },
  spo: {
    ...common,
    ...losses,
    method: 'spo',
    preset: undefined,
    beta: 0.5,
    lambda: 1,
    lambdaSchedule: 'constant',
    lambdaRampSteps: 100,
    penaltyForm: 'auto',
    gamma: 0,
    normPerToken: false,
    regularizerMethod: 'exact',
    lowerSteps: 1,
    lowerLearningRate: 2e-5,
    lowerSolver: 'gradient',
    lowerWarmStart: false,
    termNorms: false,
    gradNorms: 'auto',
    learningRate: undefined,
    learningRateBackbone: 1e-5,
    learningRateAdapters: 1e-5,
    normOver: 'all',
    sftReduction: 'sum',
    epochs: 3,
    batchSize: 4,
    loraDropout: 0,
  },
  score: {
    method: 'score',
    model: 'm',
    data: 'd',
    adapter: undefined,
    json: false,
    dtype: 'float32',
    device: 'auto',
    threads: undefined,
    maxLength: undefined,
    batchSize: 4,
  },
  'analyze theory': {
    ...analysis('theory'),
    dtype: 'float64',
    data: assets.pairs,
    maxLength: 1024,
    pairs: 8,
    stepSizes: [1e-3, 1e-4, 1e-5],
  },
  'analyze dynamics': {
    ...analysis('dynamics'),
    ...followed,
    data: assets.pairs,
    maxLength: 1024,
    lambda: 1,
    gamma: 0,
    maxSteps: 60,
    pairs: 50,
    every: 2,
    gradientPairs: 4,
    emaDecay: 0.9,
  },
  'analyze mass-shift': {
    ...analysis('mass-shift'),
    ...followed,
    lambda: 1,
    gamma: 0,
    maxSteps: 40,
    every: 2,
    stepSize: 1e-3,
    prompt: 'Tom has 23 apples and buys 18 more. How many apples does Tom have?',
    answer: '41',
    samples: 100,
    maxTokens: 48,
    temperature: 1,
    perSet: 5,
  },
  'analyze sensitivity': {
    ...analysis('sensitivity'),
    ...followed,
    data: assets.pairs,
    maxLength: 1024,
    maxSteps: 20,
    pairs: 50,
    gradientPairs: 8,
    lambdas: [0, 0.5, 1, 2, 5],
    gammas: [0, 0.01],
  },
  'analyze terms': {
    ...analysis('terms'),
    ...withoutMomentum,
    data: assets.pairs,
    maxLength: 1024,
    pairs: 4,
    lambdas: [1, 2, 5],
    gammas: [0, 0.01, 0.1],
    normPerToken: false,
    lowerSolver: 'gradient',
    lowerLearningRates: [2e-5, 2e-4, 2e-3, 2e-2],
    lowerStepCounts: [1, 3],
  },
  demo: { method: 'demo', output: 'keelgrad-demo', threads: undefined, seed: 42 },
  info: { method: 'info', json: false },
} as const;

describe('defaults', () => {
  it.each(methods)('%s has exactly the documented options and defaults', (method) => {
    expect(resolve(method)).toStrictEqual(documented[method]);
  });

  it.each([
    ['sft', 'full', 2e-5],
    ['sft', 'both', 2e-5],
    ['sft', 'lora', 2e-4],
    ['dpo', 'full', 1e-6],
    ['dpo', 'lora', 1e-5],
  ] as const)('%s --train %s learns at %d', (method, train, rate) => {
    expect(resolve(method, { train }).learningRate).toBe(rate);
    expect(resolve(method, { train, learningRate: 0.5 }).learningRate).toBe(0.5);
  });

  it('spo takes --learning-rate for each level that has none of its own', () => {
    const options = resolve('spo', { learningRate: 3e-4, learningRateAdapters: 1e-3 });
    expect([options.learningRateBackbone, options.learningRateAdapters]).toStrictEqual([3e-4, 1e-3]);
  });

  it('saves in the master dtype', () => {
    expect(resolve('sft', { dtype: 'float64' }).saveDtype).toBe('float64');
    expect(resolve('sft', { dtype: 'bfloat16' }).saveDtype).toBe('float32');
    expect(resolve('sft', { dtype: 'float64', saveDtype: 'bfloat16' }).saveDtype).toBe('bfloat16');
  });

  it('weighs several losses by 1', () => {
    expect(resolve('dpo', { lossType: 'sigmoid, sft' }).lossWeights).toStrictEqual([1, 1]);
  });

  it.each(['dpo', 'spo'] as const)('%s: what a loss has of its own', (method) => {
    for (const lossType of ['simpo', 'cpo,simpo', 'orpo', 'slic', 'alphapo'])
      expect(resolve(method, { lossType }).reference).toBe('none');
    for (const lossType of ['sigmoid', 'cpo,sigmoid', 'sft'])
      expect(resolve(method, { lossType }).reference).toBe('initial');
    expect(resolve(method, { lossType: 'cpo' }).nllWeight).toBe(1);
    expect(resolve(method, { lossType: 'orpo,simpo' }).nllWeight).toBe(1);
    expect(resolve(method, { lossType: 'orpo', nllWeight: 0 }).nllWeight).toBe(0);
  });
});

describe('values', () => {
  it('reads the command line and config files alike', () => {
    const fromStrings = resolve('spo', { 'lower-steps': '0', gamma: '1e-1', 'lora-targets': 'q_proj,v_proj' });
    const fromValues = resolve('spo', { lower_steps: 0, gamma: 0.1, loraTargets: ['q_proj', 'v_proj'] });
    expect(fromStrings).toStrictEqual(fromValues);
    expect(fromValues.lowerSteps).toBe(0);
  });

  it('takes no-shuffle and shuffle as keys', () => {
    expect(resolve('sft', { 'no-shuffle': true }).shuffle).toBe(false);
    expect(resolve('sft', { shuffle: false }).shuffle).toBe(false);
  });

  it('takes null for not given, and the method itself', () => {
    expect(resolve('sft', { adapter: null, method: 'sft' })).toStrictEqual(documented.sft);
    expect(refusal('sft', { method: 'dpo' })).toBe('method: expected "sft", found "dpo"');
  });

  it('accepts the limits', () => {
    const zeros = { gamma: 0, lambda: 0, weightDecay: 0, maxGradNorm: 0, learningRate: 0, lowerSteps: 0 };
    expect(resolve('spo', zeros)).toMatchObject(zeros);
    expect(resolve('dpo', { lossType: 'robust', labelSmoothing: 0.4999 }).labelSmoothing).toBe(0.4999);
    expect(resolve('sft', { warmupRatio: 1 }).warmupRatio).toBe(1);
  });

  it.each([
    ['dpo', 'beta', 0],
    ['dpo', 'beta', '-0.1'],
    ['dpo', 'beta', 'abc'],
    ['dpo', 'beta', Number.NaN],
    ['dpo', 'beta', Number.POSITIVE_INFINITY],
    ['dpo', 'beta', ''],
    ['dpo', 'beta', '0x10'],
    ['dpo', 'beta', true],
    ['dpo', 'labelSmoothing', 0.5],
    ['dpo', 'labelSmoothing', -0.1],
    ['spo', 'lambda', -1],
    ['spo', 'gamma', -1e-9],
    ['spo', 'lowerSteps', -1],
    ['spo', 'lowerSteps', 1.5],
    ['spo', 'lowerLearningRate', 0],
    ['spo', 'lowerLearningRate', Number.POSITIVE_INFINITY],
    ['spo', 'beta', 0],
    ['spo', 'lambda', Number.NaN],
    ['spo', 'gamma', 'much'],
    ['spo', 'learningRateBackbone', -1e-5],
    ['spo', 'learningRateAdapters', -1e-5],
    ['spo', 'lambdaSchedule', 'quadratic'],
    ['spo', 'lambdaRampSteps', 0],
    ['spo', 'lambdaRampSteps', 1.5],
    ['spo', 'penaltyForm', 'second-order'],
    ['spo', 'regularizerMethod', 'approximate'],
    ['spo', 'lowerSolver', 'newton'],
    ['spo', 'lowerWarmStart', 'yes'],
    ['spo', 'normPerToken', 1],
    ['spo', 'termNorms', 'c'],
    ['sft', 'epochs', 0],
    ['sft', 'maxSteps', 0],
    ['sft', 'batchSize', 0],
    ['sft', 'batchSize', '4k'],
    ['sft', 'gradientAccumulationSteps', 0],
    ['sft', 'learningRate', -1e-5],
    ['sft', 'warmupRatio', 1.1],
    ['sft', 'adamBeta1', 1],
    ['sft', 'adamBeta2', -0.1],
    ['sft', 'adamEpsilon', 0],
    ['sft', 'momentum', 1],
    ['sft', 'weightDecay', -1],
    ['sft', 'maxGradNorm', -1],
    ['sft', 'maxLength', 1],
    ['sft', 'loraR', 0],
    ['sft', 'loraAlpha', 0],
    ['sft', 'loraDropout', 1],
    ['sft', 'seed', -1],
    ['sft', 'seed', 2 ** 53],
    ['sft', 'threads', 0],
    ['sft', 'overwrite', 'yes'],
    ['sft', 'dtype', 'float8'],
    ['sft', 'loraTargets', []],
    ['sft', 'loraTargets', 'q_proj,,v_proj'],
  ] as const)('%s refuses %s = %j with what it expects', (method, key, value) => {
    expect(refusal(method, { [key]: value })).toMatch(/^--[a-z0-9-]+: expected .+, found /);
  });

  it('says what is out of range at spo', () => {
    for (const [key, value, expected] of [
      ['lambda', -1, '--lambda: expected a number of at least 0, found -1'],
      ['gamma', -1, '--gamma: expected a number of at least 0, found -1'],
      ['lowerLearningRate', 0, '--lower-learning-rate: expected a number above 0, found 0; use --lower-steps 0 for no'],
      ['lowerSteps', -1, '--lower-steps: expected a whole number of at least 0, found -1'],
      ['beta', 0, '--beta: expected a number above 0, found 0'],
      ['learningRateBackbone', -1, '--learning-rate-backbone: expected a number of at least 0, found -1'],
      ['learningRateAdapters', -1, '--learning-rate-adapters: expected a number of at least 0, found -1'],
      ['lambdaRampSteps', 0, '--lambda-ramp-steps: expected a whole number of at least 1, found 0'],
      [
        'lowerSolver',
        'adm',
        '--lower-solver: expected one of gradient, momentum, adam, found "adm"; did you mean "adam"?',
      ],
    ] as const)
      expect(refusal('spo', { [key]: value })).toContain(expected);
  });

  it('says what to do', () => {
    expect(refusal('sft', { beta1: 1 })).toBe('beta1 is no option of keelgrad sft; did you mean --adam-beta1?');
    expect(refusal('sft', { warmupSteps: '0.1' })).toBe(
      '--warmup-steps: expected a whole number of at least 0, found 0.1; a fraction of all steps is --warmup-ratio',
    );
    expect(refusal('dpo', { lossType: 'sigmoid,ipoo' })).toMatch('did you mean "ipo"?');
    expect(refusal('sft', { loraTargets: 'q_proj,vproj' })).toMatch('did you mean "v_proj"?');
  });

  it('asks for what is missing, unless a library call hands over objects', () => {
    expect(() => resolveOptions('dpo', { model: 'm' })).toThrow('keelgrad dpo needs data FILE output DIR');
    expect(resolveOptions('dpo', {}, { requirePaths: false }).beta).toBe(0.1);
  });
});

describe('names', () => {
  it('suggests the nearest option of the command', () => {
    expect(refusal('dpo', { '--lr': 1 })).toBe('--lr is no option of keelgrad dpo; did you mean --learning-rate?');
    expect(refusal('spo', { '--lamda': 1 })).toBe('--lamda is no option of keelgrad spo; did you mean --lambda?');
    expect(refusal('sft', { '--mdl': 1 })).toBe('--mdl is no option of keelgrad sft; did you mean --model?');
    expect(refusal('sft', { no_shufle: true })).toMatch('did you mean --no-shuffle?');
    expect(refusal('sft', { frobnicate: 1 })).toBe('frobnicate is no option of keelgrad sft; see keelgrad sft --help');
  });

  it('says whose option it is', () => {
    expect(refusal('dpo', { '--gamma': 1 })).toMatch(/^--gamma is an option of keelgrad spo, not of keelgrad dpo/);
    expect(refusal('dpo', { 'learning-rate-backbone': 1 })).toMatch('did you mean --learning-rate?');
    for (const train of ['lora', 'full'])
      expect(refusal('spo', { train })).toMatch(
        'spo always trains both levels, the backbone in the lower one and the adapters in the upper one',
      );
    expect(refusal('sft', { lossType: 'dft' })).toMatch(
      'not of keelgrad sft: its losses are --sft-loss nll and --sft-loss dft',
    );
    expect(refusal('dpo', { rpo_alpha: 1 })).toMatch('did you mean --nll-weight?');
    expect(refusal('dpo', { use_weighting: true })).toMatch('did you mean --wpo?');
    expect(refusal('dpo', { desirable_weight: 1 })).toMatch('did you mean --kto-desirable-weight?');
    expect(refusal('dpo', { gama: 1 })).toMatch('did you mean --gamma, of keelgrad spo?');
  });

  it('refuses one option in two spellings', () => {
    expect(refusal('sft', { max_length: 10, 'max-length': 20 })).toMatch('is given twice');
  });

  it('spells options as the caller does', () => {
    expect(() => resolveOptions('dpo', { ...paths, labelSmoothing: 0.1 })).toThrow(
      'labelSmoothing has no effect with lossType: ["sigmoid"]; use a loss that defines it: lossType: "robust"',
    );
  });
});

describe('combinations in which an option would do nothing', () => {
  it.each([
    [
      'dpo',
      { labelSmoothing: 0.1 },
      '--label-smoothing has no effect with --loss-type sigmoid; use a loss that defines it: --loss-type robust',
    ],
    ['dpo', { labelSmoothing: 0.1, lossType: 'ipo,sft' }, 'with --loss-type ipo,sft'],
    ['spo', { labelSmoothing: 0.1, lossType: 'hinge' }, 'use a loss that defines it: --loss-type robust'],
    ['dpo', { lossWeights: '2' }, '--loss-weights has no effect with a single loss'],
    [
      'dpo',
      { simpoGamma: 1 },
      '--simpo-gamma has no effect with --loss-type sigmoid; use a loss that defines it: --loss-type simpo',
    ],
    ['dpo', { alphapoAlpha: 0.25, lossType: 'simpo' }, '--alphapo-alpha has no effect with --loss-type simpo'],
    ['spo', { dpopLambda: 5, lossType: 'rdpo' }, 'use a loss that defines it: --loss-type dpop'],
    ['dpo', { rdpoAlpha: 0.1 }, '--loss-type rdpo'],
    ['dpo', { orpoLambda: 0.1, lossType: 'cpo' }, '--loss-type orpo'],
    ['dpo', { discopopTau: 0.1 }, '--loss-type discopop'],
    ['dpo', { betaDpoAlpha: 0.1 }, '--loss-type beta_dpo'],
    ['dpo', { betaDpoMomentum: 0.5, lossType: 'cal_dpo' }, '--loss-type beta_dpo'],
    ['dpo', { slicLambda: 0.1 }, '--loss-type slic'],
    ['dpo', { slicDelta: 0.1, lossType: 'hinge' }, '--loss-type slic'],
    ['dpo', { slicLengthNormalize: true }, '--slic-length-normalize has no effect with --loss-type sigmoid'],
    ['dpo', { ktoDesirableWeight: 2, lossType: 'bco_pair' }, '--loss-type kto'],
    ['dpo', { ktoUndesirableWeight: 2 }, '--loss-type kto'],
    ['dpo', { beta: 0.3, lossType: 'orpo,slic' }, '--beta has no effect with --loss-type orpo,slic'],
    [
      'dpo',
      { reference: 'initial', lossType: 'simpo' },
      '--reference has no effect with --loss-type simpo, which has no reference',
    ],
    ['spo', { reference: 'base', lossType: 'orpo' }, '--reference has no effect with --loss-type orpo'],
    [
      'dpo',
      { fDivergenceType: 'js_divergence', lossType: 'simpo' },
      '--f-divergence-type has no effect with --loss-type simpo',
    ],
    [
      'dpo',
      { fAlphaDivergenceCoef: 0.3 },
      '--f-alpha-divergence-coef has no effect with --f-divergence-type reverse_kl',
    ],
    ['dpo', { nllReduction: 'sequence-mean' }, '--nll-reduction has no effect with --nll-weight 0'],
    ['dpo', { ldAlpha: 0.5, lossType: 'sft' }, '--ld-alpha has no effect with --loss-type sft'],
    [
      'sft',
      { train: 'full', loraR: 16 },
      '--lora-r has no effect with --train full, which trains no adapter; leave it out, or use --train both',
    ],
    ['dpo', { train: 'full', rslora: true }, '--rslora has no effect with --train full'],
    ['sft', { train: 'full', loraDropout: 0.1 }, '--lora-dropout has no effect with --train full'],
    [
      'dpo',
      { train: 'full', adapter: 'a' },
      '--adapter has no effect with --train full, which trains and saves the backbone alone; merge it',
    ],
    ['spo', { adapter: 'a', loraAlpha: 8 }, '--lora-alpha has no effect with --adapter'],
    ['sft', { adapter: 'a', loraTargets: 'q_proj' }, '--lora-targets has no effect with --adapter'],
    ['dpo', { loraDropout: 0.05 }, 'dropout is off in every pass of a preference loss'],
    ['spo', { loraDropout: 0.05 }, 'dropout is off in every pass of a preference loss'],
    ['sft', { momentum: 0.9 }, '--momentum has no effect with --optimizer adamw; leave it out, or use --optimizer sgd'],
    ['sft', { optimizer: 'sgd', adamBeta1: 0.9 }, '--adam-beta1 has no effect with --optimizer sgd'],
    ['sft', { optimizer: 'sgd', adamEpsilon: 1e-6 }, '--adam-epsilon has no effect with --optimizer sgd'],
    ['sft', { weightDecayParams: 'all' }, '--weight-decay-params has no effect with --weight-decay 0'],
    ['sft', { lrSchedule: 'constant', warmupSteps: 5 }, 'use --lr-schedule constant_with_warmup'],
    ['sft', { lrSchedule: 'constant', warmupRatio: 0.1 }, 'use --lr-schedule constant_with_warmup'],
    [
      'sft',
      { warmupSteps: 5, warmupRatio: 0.1 },
      '--warmup-steps has no effect beside --warmup-ratio; give one of the two',
    ],
    ['sft', { epochs: 2, maxSteps: 5 }, '--epochs has no effect beside --max-steps; give one of the two'],
    ['spo', { normOver: 'adapters' }, '--norm-over has no effect with --gamma 0'],
    [
      'spo',
      { normPerToken: true },
      '--norm-per-token has no effect with --gamma 0: there is no regularizer; leave it out',
    ],
    ['spo', { regularizerMethod: 'finite-differences' }, '--regularizer-method has no effect with --gamma 0'],
    [
      'analyze terms',
      { lowerSolver: 'momentum', penaltyForm: 'first-order' },
      '--lower-solver momentum cannot be had with --penalty-form first-order',
    ],
    [
      'analyze sensitivity',
      { gammas: '0,0.1', regularizerMethod: 'finite-differences', dtype: 'bfloat16' },
      '--regularizer-method finite-differences expected dtype float32 or float64',
    ],
    ['analyze dynamics', { normOver: 'adapters' }, '--norm-over has no effect with --gamma 0'],
    ['analyze dynamics', { lowerSteps: 0, penaltyForm: 'first-order' }, '--penalty-form has no effect with'],
    ['analyze terms', { discopopTau: 0.1 }, '--discopop-tau has no effect with --loss-type sigmoid'],
    [
      'analyze terms',
      { preset: 'paper' },
      'not of keelgrad analyze terms: all that a preset sets apart from the defaults',
    ],
    ['analyze theory', { seed: 1 }, 'seed is an option of keelgrad sft'],
    ['analyze dynamics', { normPerToken: true }, '--norm-per-token has no effect with --gamma 0'],
    ['analyze sensitivity', { normPerToken: true, gammas: '0' }, '--norm-per-token has no effect with --gamma 0'],
    ['spo', { lowerSteps: 0, lowerLearningRate: 2e-5 }, '--lower-learning-rate has no effect with --lower-steps 0'],
    ['spo', { lowerSteps: 0, lowerSolver: 'adam' }, '--lower-solver has no effect with --lower-steps 0'],
    ['spo', { lowerSteps: 0, lowerWarmStart: true }, '--lower-warm-start has no effect with --lower-steps 0'],
    ['spo', { lowerSteps: 0, penaltyForm: 'first-order' }, '--penalty-form has no effect with --lower-steps 0'],
    [
      'spo',
      { gamma: 0.1, gradNorms: 'off' },
      '--grad-norms has no effect with --gamma 0.1: the regularizer needs these',
    ],
    ['spo', { preset: 'paper', gradNorms: 'off' }, '--grad-norms has no effect with --gamma 0.001'],
    ['spo', { gradNorms: 'off', normOver: 'adapters' }, '--norm-over has no effect with --gamma 0'],
    [
      'spo',
      { lowerSolver: 'momentum' },
      "--lower-solver has no effect with --lower-steps 1: momentum is fresh in every step, and its first one is the gradient's; take more",
    ],
    [
      'spo',
      { lambda: 0, lambdaSchedule: 'linear' },
      '--lambda-schedule has no effect with --lambda 0: there is no penalty',
    ],
    [
      'spo',
      { lambdaRampSteps: 5 },
      '--lambda-ramp-steps has no effect with --lambda-schedule constant; leave it out, or use --lambda-schedule linear',
    ],
    ['spo', { lambda: 0, termNorms: true }, '--term-norms has no effect with --lambda 0 and --gamma 0'],
    ['spo', { termNorms: true }, '--term-norms has no effect with a lower level and --gamma 0: all terms are reported'],
    ['spo', { ldAlpha: 0.5, termNorms: true }, '--term-norms has no effect with --ld-alpha 0.5, which weighs tokens'],
    [
      'spo',
      { learningRate: 1, learningRateBackbone: 2, learningRateAdapters: 3 },
      '--learning-rate has no effect beside',
    ],
  ] as const)('%s %j', (method, given, message) => {
    expect(refusal(method, given)).toContain(message);
  });

  it.each([
    ['dpo', { lossType: 'robust,sft', labelSmoothing: 0.1, lossWeights: [1, 0.2] }],
    ['dpo', { labelSmoothing: 0, loraDropout: 0 }],
    ['dpo', { lossType: 'sft', beta: 0.3 }],
    ['sft', { momentum: 0, weightDecayParams: 'matrices', rslora: false }],
    ['sft', { optimizer: 'sgd', momentum: 0.9 }],
    ['sft', { lrSchedule: 'constant', warmupSteps: 0 }],
    ['spo', { gamma: 0, normOver: 'all', lowerSteps: 0 }],
    ['spo', { gradNorms: 'on', normOver: 'backbone', normPerToken: true, lowerSteps: 0, termNorms: true }],
    ['spo', { gradNorms: 'off', gradientCheckpointing: true }],
    ['spo', { gradientCheckpointing: true, gamma: 0.1, regularizerMethod: 'finite-differences' }],
    ['spo', { learningRateBackbone: 0, lowerSteps: 0 }],
    ['spo', { learningRate: 0 }],
    ['spo', { gamma: 0.1, normOver: 'backbone', adapter: 'a' }],
    ['spo', { regularizerMethod: 'exact', penaltyForm: 'auto', lambdaSchedule: 'constant', lowerSolver: 'gradient' }],
    ['spo', { normPerToken: false, lowerWarmStart: false, termNorms: false, lowerSteps: 0, lambda: 0 }],
    ['spo', { lambda: 0, gamma: 0.1, termNorms: true, normPerToken: true }],
    ['spo', { lowerSolver: 'momentum', lowerSteps: 2, lowerWarmStart: true, penaltyForm: 'difference' }],
    ['spo', { preset: 'paper', lowerSteps: 0, maxSteps: 3, gamma: 0, optimizer: 'sgd' }],
    ['analyze terms', { normPerToken: true, lowerSolver: 'momentum' }],
    ['analyze terms', { normPerToken: true, penaltyForm: 'first-order' }],
    ['dpo', { train: 'both', adapter: 'a', reference: 'base' }],
    ['sft', { loraTargets: 'model.layers.0.self_attn.q_proj,base_model.model.model.layers.1.mlp.up_proj' }],
    ['sft', { loraTargets: 'all-linear' }],
  ] as const)('but accepts %s %j', (method, given) => {
    expect(resolve(method, given).method).toBe(method);
  });
});

describe('losses that lack what they need, or that cannot be had together', () => {
  it.each([
    [
      'dpo',
      { lossType: 'exo_pair' },
      '--loss-type: exo_pair needs a label smoothing above 0: it takes its logarithm; the paper',
    ],
    ['spo', { lossType: 'exo_pair' }, '--label-smoothing 0.001'],
    ...[
      'bco_pair',
      'nca_pair',
      'sppo_hard',
      'apo_zero',
      'apo_down',
      'aot',
      'aot_unpaired',
      'dpop',
      'cal_dpo',
      'kto',
    ].map(
      (lossType) =>
        ['dpo', { lossType, reference: 'none' }, `--loss-type: ${lossType} needs a reference: it `] as const,
    ),
    ['dpo', { lossType: 'kto', reference: 'none' }, 'leave it out, or use --reference initial'],
    ['spo', { lossType: 'apo_zero', reference: 'none' }, '--loss-type: apo_zero needs a reference: it '],
    [
      'dpo',
      { lossType: 'ipo_sum', fDivergenceType: 'js_divergence' },
      '--f-divergence-type has no effect with --loss-type ipo_sum',
    ],
    [
      'dpo',
      { lossType: 'sigmoid,cdpo', fDivergenceType: 'js_divergence' },
      'cdpo has no f-divergence; leave out --f-divergence-type',
    ],
    [
      'dpo',
      { fDivergenceType: 'forward_kl', reference: 'none' },
      'an f-divergence is one from the reference, and there is none',
    ],
    [
      'dpo',
      { lossType: 'sigmoid,sft', nllWeight: 0.5 },
      'sft is the NLL of the chosen responses already; leave out --nll-weight',
    ],
    ['dpo', { lossType: 'sigmoid,aot', wpo: true }, 'weights of pairs have no meaning for aot: it sorts the batch'],
    ['dpo', { lossType: 'sft', wpo: true }, 'weights of pairs have no meaning for sft'],
    ['dpo', { lossType: 'aot', batchSize: 1 }, 'aot sorts the pairs of a batch; raise --batch-size above 1'],
  ] as const)('%s %j', (method, given, message) => {
    expect(refusal(method, given)).toContain(message);
  });

  it.each([
    ['dpo', { lossType: 'aot', batchSize: 1, gradientAccumulationSteps: 2 }],
    ['dpo', { lossType: 'exo_pair,bco_pair', labelSmoothing: 0.001, lossWeights: '1,0.5' }],
    ['spo', { lossType: 'simpo', reference: 'none', simpoGamma: 1, beta: 2 }],
    ['spo', { lossType: 'sigmoid', reference: 'none', nllWeight: 1, nllReduction: 'sequence-sum' }],
    ['dpo', { lossType: 'sigmoid,sft', fDivergenceType: 'alpha_divergence', fAlphaDivergenceCoef: 2 }],
    ['dpo', { lossType: 'ipo', wpo: true, ldAlpha: 0.3 }],
    ['dpo', { lossType: 'kto', ktoUndesirableWeight: 1.5 }],
    ['dpo', { labelSmoothing: 0, ldAlpha: 1, wpo: false, nllWeight: 0 }],
  ] as const)('but accepts %s %j', (method, given) => {
    expect(resolve(method, given).method).toBe(method);
  });
});

describe('settings of SPO that exclude each other', () => {
  it.each([
    [
      { gamma: 0.1, regularizerMethod: 'finite-differences', dtype: 'bfloat16' },
      '--regularizer-method finite-differences expected dtype float32 or float64, found bfloat16: steps short enough for a difference round away in it; use --regularizer-method exact, or --dtype float32',
    ],
    [
      { lowerSolver: 'adam', penaltyForm: 'first-order' },
      '--lower-solver adam cannot be had with --penalty-form first-order: that form is the derivative along plain gradient steps, which this solver does not take; use --lower-solver gradient, or --penalty-form difference',
    ],
    [
      { lowerSolver: 'adam', dtype: 'bfloat16' },
      '--lower-solver adam cannot be had with the first-order form of term (b), which --dtype bfloat16 takes: ',
    ],
    [
      { lowerWarmStart: true, penaltyForm: 'first-order' },
      '--lower-warm-start cannot be had with --penalty-form first-order: that form is the derivative along steps from the backbone as it is, and a warm start begins elsewhere; use no --lower-warm-start, or --penalty-form difference',
    ],
    [{ lowerWarmStart: true, dtype: 'bfloat16' }, 'use no --lower-warm-start, or --dtype float32'],
  ] as const)('%j', (given, message) => {
    expect(refusal('spo', given)).toContain(message);
  });

  it.each([
    { lowerSolver: 'adam', penaltyForm: 'difference', dtype: 'bfloat16' },
    { lowerWarmStart: true, penaltyForm: 'difference', dtype: 'bfloat16' },
    { gamma: 0.1, regularizerMethod: 'finite-differences', dtype: 'float64' },
    { penaltyForm: 'first-order', dtype: 'float32', lowerSteps: 3 },
  ] as const)('but accepts %j', (given) => {
    expect(resolve('spo', given)).toMatchObject(given);
  });
});

describe('presets', () => {
  /** The paper's printed settings (Table 1, GSM8K), written down a second time. */
  const printed = {
    lambda: 1,
    lowerSteps: 1,
    lowerLearningRate: 2e-5,
    learningRateBackbone: 1e-5,
    learningRateAdapters: 1e-5,
    beta: 0.5,
    batchSize: 4,
    epochs: 3,
    maxLength: 1024,
    optimizer: 'adamw',
    sftReduction: 'sum',
  };

  it('paper is what the paper prints; it names no gamma', () => {
    expect(resolve('spo', { preset: 'paper' })).toMatchObject(printed);
    expect(spoPresets.paper.gamma).toBeGreaterThan(0);
  });

  it('recommended is what options are without it', () => {
    const named = { preset: 'recommended', learningRate: 1e-5 };
    expect(resolve('spo', { preset: 'recommended' })).toEqual({ ...resolve('spo', {}), ...named });
  });

  it.each(['paper', 'recommended'] as const)('%s takes the place of defaults, and gives way to options', (preset) => {
    const values = Object.entries(spoPresets[preset]);
    expect(resolve('spo', { preset })).toMatchObject(Object.fromEntries(values));
    const others = { lambda: 7, gamma: 0.5, beta: 0.25, lowerLearningRate: 0.5, learningRateAdapters: 1e-3 };
    expect(resolve('spo', { preset, ...others })).toMatchObject({ ...others, learningRateBackbone: 1e-5 });
    expect(resolve('spo', { preset, learningRate: 1e-4 })).toMatchObject({
      learningRateBackbone: 1e-4,
      learningRateAdapters: 1e-4,
    });
  });

  it.each(['paper', 'recommended'] as const)('%s names options of spo with values that they accept', (preset) => {
    const { method: _, ...found } = resolve('spo', spoPresets[preset]);
    expect(found).toMatchObject(spoPresets[preset]);
    for (const key of Object.keys(spoPresets[preset]))
      expect(specOf('preset').help).toContain(flagNaming.option(key).slice(2));
  });

  it('are refused by another name', () => {
    expect(refusal('spo', { preset: 'papr' })).toBe(
      '--preset: expected one of paper, recommended, found "papr"; did you mean "paper"?',
    );
    expect(refusal('dpo', { preset: 'paper' })).toContain('preset is an option of keelgrad spo');
  });
});

describe('lists', () => {
  it.each([
    [{ lossType: 'sigmoid,sigmoid' }, 'found sigmoid twice'],
    [{ lossType: 'sigmoid,sft', lossWeights: '1' }, 'expected 2 numbers, one for each of sigmoid, sft, found 1'],
    [{ lossType: 'sigmoid,sft', lossWeights: '0,0' }, 'expected at least one weight above 0'],
    [{ lossType: 'sigmoid,sft', lossWeights: '1,-1' }, 'expected numbers, each of at least 0, found "1,-1"'],
    [{ loraTargets: 'all-linear,q_proj' }, 'expected all-linear alone'],
    [{ loraTargets: 'lm_head' }, 'expected all-linear, or names or module paths that end in q_proj'],
  ])('%j', (given, message) => {
    expect(refusal('dpo', given)).toContain(message);
  });
});

describe('settings of spo that exclude each other', () => {
  it.each([
    [
      { learningRateBackbone: 0 },
      /^--learning-rate-backbone 0 freezes the backbone, which is the variable of the lower level: its step leads to .*; use --lower-steps 0 for .*, or a learning rate above 0/,
    ],
    [{ learningRateBackbone: 0, lowerSteps: 3 }, /freezes the backbone.* its 3 steps lead to/],
    [
      { gradientCheckpointing: true, gamma: 0.1 },
      /^--gradient-checkpointing cannot be had with --gamma 0.1: the regularizer's second derivatives need .* or use --gamma 0 or --regularizer-method finite-differences/,
    ],
  ])('%j', (given, message) => {
    expect(refusal('spo', given)).toMatch(message);
  });
});

describe('what run.json records', () => {
  it.each([
    ['sft', { train: 'full', optimizer: 'sgd', maxSteps: 3 }],
    ['sft', { adapter: 'a', warmupRatio: 0.1 }],
    ['dpo', { lossType: 'robust,sft', labelSmoothing: 0.1 }],
    ['spo', { lossType: 'simpo', simpoGamma: 1.5, nllWeight: 0.1 }],
    ['dpo', { lossType: 'orpo' }],
    ['spo', { lowerSteps: 0, learningRate: 1e-4, shuffle: false }],
    ['spo', { gamma: 0.1 }],
    ['spo', { preset: 'paper', lambda: 3 }],
    ['spo', { preset: 'recommended', maxSteps: 5, gamma: 0 }],
    ['spo', { lambdaSchedule: 'cosine', lambdaRampSteps: 7, lowerSolver: 'adam', lowerWarmStart: true }],
    ['spo', { gamma: 0.1, normPerToken: true, regularizerMethod: 'finite-differences', termNorms: true }],
    ['score', { maxLength: 10 }],
  ] as const)('%s %j resolves to itself again', (method, given) => {
    const options = resolve(method, given);
    expect(resolve(method, describeOptions(options))).toStrictEqual(options);
  });

  it('leaves out what has no part in the run', () => {
    const record = describeOptions(resolve('sft', { train: 'full', maxSteps: 3 }));
    expect(record).toMatchObject({ train: 'full', 'max-steps': 3, 'learning-rate': 2e-5 });
    for (const key of ['lora-r', 'lora-targets', 'epochs', 'momentum', 'threads'])
      expect(record).not.toHaveProperty(key);
  });
});

describe('planSteps', () => {
  it.each([
    [{ epochs: 3 }, 10, 30, 0],
    [{ epochs: 0.25 }, 10, 3, 0],
    [{ maxSteps: 7, warmupSteps: 2 }, 10, 7, 2],
    [{ epochs: 1, warmupRatio: 0.03 }, 50, 50, 2],
    [{ epochs: 1, warmupRatio: 0 }, 50, 50, 0],
  ])('%j over %d steps an epoch: %d, warmup %d', (given, stepsPerEpoch, totalSteps, warmupSteps) => {
    expect(planSteps(resolve('sft', given), stepsPerEpoch)).toStrictEqual({ totalSteps, warmupSteps });
  });
});

it('describes every option', () => {
  for (const method of methods) {
    for (const key of optionsOf(method)) expect(specOf(key).help, key).toMatch(/^\S.{2,}[^.]$/);
  }
});
