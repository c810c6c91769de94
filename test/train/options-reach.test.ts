// Every option reaches the numbers: a run with one of them changed ends at other weights, or saves them differently.
import { createHash } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { preferenceLossNames } from '../../src/objectives/preference/facts.js';
import { type OptionKey, optionsOf, type TrainMethod } from '../../src/train/options.js';
import { makeModelFolder } from '../fixtures/make.js';
import { fixtureCompletions, fixturePairs, type Given, stable, temporaryFolder, train } from './support.js';

const folder = temporaryFolder();
let model: string;
let adapter: string;

beforeAll(async () => {
  model = await makeModelFolder(folder.path('model'), 'qwen2');
  const data = folder.write('adapter.json', fixtureCompletions(4));
  // An adapter that is neither new nor zero, of another rank than the default.
  const made = await train('sft', {
    model,
    data,
    'max-steps': 2,
    'learning-rate': 0.05,
    'lora-r': 3,
    output: folder.path('sft'),
  });
  adapter = join(made.result.output, 'adapter');
});

/** What a run left, but its metrics: two runs that agree here trained alike. */
function savedBytes(output: string): string {
  const hash = createHash('sha256');
  for (const file of ['model/model.safetensors', 'adapter/adapter_model.safetensors'])
    if (existsSync(join(output, file))) hash.update(file).update(readFileSync(join(output, file)));
  return hash.digest('hex');
}

async function fingerprint(method: TrainMethod, given: Given): Promise<string> {
  const offset = fixturePairs(7).map((pair, i) => ({ ...pair, offset: i / 4 }));
  const data = folder.write(`${method}.json`, method === 'sft' ? fixtureCompletions(7) : offset);
  return savedBytes((await train(method, { model, data, ...given })).result.output);
}

interface Change {
  readonly option: OptionKey;
  /** The options that differ from the method's base, and from `beside` where that is given. */
  readonly change: () => Given;
  /** What has to be set for the option to have a part. */
  readonly beside?: () => Given;
}

const nothing = (): Given => ({});

const common: readonly Change[] = [
  { option: 'learningRate', change: () => ({ 'learning-rate': 2e-3 }) },
  { option: 'lrSchedule', change: () => ({ 'lr-schedule': 'cosine' }) },
  { option: 'warmupSteps', change: () => ({ 'warmup-steps': 2 }) },
  { option: 'warmupRatio', change: () => ({ 'warmup-ratio': 0.5 }) },
  { option: 'optimizer', change: () => ({ optimizer: 'sgd' }) },
  { option: 'adamBeta1', change: () => ({ 'adam-beta1': 0.5 }) },
  { option: 'adamBeta2', change: () => ({ 'adam-beta2': 0.9 }) },
  { option: 'adamEpsilon', change: () => ({ 'adam-epsilon': 1e-2 }) },
  { option: 'momentum', beside: () => ({ optimizer: 'sgd' }), change: () => ({ momentum: 0.9 }) },
  { option: 'weightDecay', change: () => ({ 'weight-decay': 0.1 }) },
  {
    option: 'weightDecayParams',
    beside: () => ({ 'weight-decay': 0.1 }),
    change: () => ({ 'weight-decay-params': 'all' }),
  },
  { option: 'maxGradNorm', change: () => ({ 'max-grad-norm': 0.01 }) },
  { option: 'maxSteps', change: () => ({ 'max-steps': 4 }) },
  { option: 'epochs', beside: () => ({ 'max-steps': undefined, epochs: 1 }), change: () => ({ epochs: 1.5 }) },
  { option: 'batchSize', change: () => ({ 'batch-size': 3 }) },
  { option: 'gradientAccumulationSteps', change: () => ({ 'gradient-accumulation-steps': 2 }) },
  { option: 'maxLength', change: () => ({ 'max-length': 4 }) },
  { option: 'shuffle', change: () => ({ 'no-shuffle': true }) },
  { option: 'seed', change: () => ({ seed: 43 }) },
  { option: 'dtype', change: () => ({ dtype: 'float64', 'save-dtype': 'float32' }) },
  { option: 'dtype', change: () => ({ dtype: 'bfloat16' }) },
  { option: 'saveDtype', change: () => ({ 'save-dtype': 'bfloat16' }) },
  { option: 'loraR', change: () => ({ 'lora-r': 4 }) },
  { option: 'loraAlpha', change: () => ({ 'lora-alpha': 8 }) },
  { option: 'loraTargets', change: () => ({ 'lora-targets': 'q_proj,v_proj' }) },
  { option: 'rslora', change: () => ({ rslora: true }) },
  { option: 'adapter', change: () => ({ adapter }) },
];

/** A setting of one loss. */
const ofLoss = (loss: string, option: OptionKey, given: Given, more: Given = {}): Change => ({
  option,
  beside: () => ({ 'loss-type': loss, ...more }),
  change: () => given,
});

/** Every loss but the default; some need a setting to differ from sigmoid. */
const lossTypes: readonly Given[] = preferenceLossNames
  .filter((name) => name !== 'sigmoid')
  .map((name) => ({
    'loss-type': name,
    ...(['robust', 'cdpo', 'exo_pair'].includes(name) && { 'label-smoothing': 0.2 }),
    // It is sigmoid as long as no chosen response is below the reference, and as long as the mean margin is 0.
    ...(name === 'dpop' && { 'max-steps': 5 }),
  }));

const preference: readonly Change[] = [
  { option: 'beta', change: () => ({ beta: 0.9 }) },
  ...[...lossTypes, { 'loss-type': 'sigmoid,sft' }, { 'loss-type': 'sigmoid,bco_pair' }].map((given) => ({
    option: 'lossType' as const,
    change: () => given,
  })),
  ofLoss('sigmoid,sft', 'lossWeights', { 'loss-weights': '1,0.1' }),
  { option: 'nllWeight', change: () => ({ 'nll-weight': 0.5 }) },
  ofLoss('cpo', 'nllWeight', { 'nll-weight': 0 }),
  ...['sequence-mean', 'sequence-sum'].map((nll) =>
    ofLoss('sigmoid', 'nllReduction', { 'nll-reduction': nll }, { 'nll-weight': 0.5 }),
  ),
  { option: 'ldAlpha', change: () => ({ 'ld-alpha': 0.3 }) },
  { option: 'wpo', change: () => ({ wpo: true }) },
  ...['robust', 'cdpo', 'aot', 'aot_unpaired', 'simpo', 'alphapo', 'cpo'].map((loss) =>
    ofLoss(loss, 'labelSmoothing', { 'label-smoothing': 0.3 }),
  ),
  ofLoss('exo_pair', 'labelSmoothing', { 'label-smoothing': 0.3 }, { 'label-smoothing': 0.1 }),
  ...['forward_kl', 'js_divergence', 'alpha_divergence'].map((score) =>
    ofLoss('sigmoid', 'fDivergenceType', { 'f-divergence-type': score }),
  ),
  ofLoss(
    'sigmoid',
    'fAlphaDivergenceCoef',
    { 'f-alpha-divergence-coef': -0.5 },
    { 'f-divergence-type': 'alpha_divergence' },
  ),
  ofLoss('discopop', 'discopopTau', { 'discopop-tau': 0.5 }),
  ofLoss('dpop', 'dpopLambda', { 'dpop-lambda': 5 }, { 'max-steps': 5 }),
  ofLoss('rdpo', 'rdpoAlpha', { 'rdpo-alpha': 0.3 }),
  ofLoss('beta_dpo', 'betaDpoAlpha', { 'beta-dpo-alpha': 0.1 }),
  ofLoss('beta_dpo', 'betaDpoMomentum', { 'beta-dpo-momentum': 0.1 }, { 'max-steps': 5 }),
  ...['simpo', 'alphapo'].map((loss) => ofLoss(loss, 'simpoGamma', { 'simpo-gamma': 1.5 })),
  ofLoss('alphapo', 'alphapoAlpha', { 'alphapo-alpha': -0.5 }),
  ofLoss('orpo', 'orpoLambda', { 'orpo-lambda': 2 }),
  ofLoss('slic', 'slicDelta', { 'slic-delta': 50 }),
  ofLoss('slic', 'slicLambda', { 'slic-lambda': 2 }),
  ofLoss('slic', 'slicLengthNormalize', { 'slic-length-normalize': true }),
  ...['kto', 'apo_zero_unpaired'].flatMap((loss) => [
    ofLoss(loss, 'ktoDesirableWeight', { 'kto-desirable-weight': 2 }),
    ofLoss(loss, 'ktoUndesirableWeight', { 'kto-undesirable-weight': 2 }),
  ]),
  { option: 'reference', change: () => ({ reference: 'none' }) },
  { option: 'reference', beside: () => ({ adapter }), change: () => ({ reference: 'base' }) },
];

const changes: Readonly<Record<TrainMethod, readonly Change[]>> = {
  sft: [
    ...common,
    { option: 'train', change: () => ({ train: 'lora' }) },
    { option: 'train', change: () => ({ train: 'full' }) },
    { option: 'sftLoss', change: () => ({ 'sft-loss': 'dft' }) },
    // Clipping would hide a factor of all gradients.
    {
      option: 'sftReduction',
      beside: () => ({ optimizer: 'sgd', 'max-grad-norm': 0 }),
      change: () => ({ 'sft-reduction': 'sum' }),
    },
    { option: 'loraDropout', change: () => ({ 'lora-dropout': 0.5 }) },
  ],
  dpo: [
    ...common,
    ...preference,
    { option: 'train', change: () => ({ train: 'lora' }) },
    { option: 'train', change: () => ({ train: 'full' }) },
  ],
  spo: [
    ...common,
    ...preference,
    { option: 'sftReduction', change: () => ({ 'sft-reduction': 'token-mean' }) },
    { option: 'lambda', change: () => ({ lambda: 0 }) },
    { option: 'lambda', change: () => ({ lambda: 3 }) },
    { option: 'gamma', change: () => ({ gamma: 0.5 }) },
    { option: 'normOver', beside: () => ({ gamma: 0.5 }), change: () => ({ 'norm-over': 'adapters' }) },
    { option: 'normOver', beside: () => ({ gamma: 0.5 }), change: () => ({ 'norm-over': 'backbone' }) },
    { option: 'normPerToken', beside: () => ({ gamma: 0.5 }), change: () => ({ 'norm-per-token': true }) },
    {
      option: 'regularizerMethod',
      beside: () => ({ gamma: 0.5 }),
      change: () => ({ 'regularizer-method': 'finite-differences' }),
    },
    { option: 'preset', change: () => ({ preset: 'paper' }) },
    { option: 'lambdaSchedule', change: () => ({ 'lambda-schedule': 'linear' }) },
    {
      option: 'lambdaSchedule',
      beside: () => ({ 'lambda-schedule': 'linear', 'lambda-ramp-steps': 3 }),
      change: () => ({ 'lambda-schedule': 'cosine' }),
    },
    {
      option: 'lambdaRampSteps',
      beside: () => ({ 'lambda-schedule': 'linear', 'lambda-ramp-steps': 3 }),
      change: () => ({ 'lambda-ramp-steps': 2 }),
    },
    { option: 'penaltyForm', change: () => ({ 'penalty-form': 'first-order' }) },
    { option: 'penaltyForm', beside: () => ({ dtype: 'bfloat16' }), change: () => ({ 'penalty-form': 'difference' }) },
    { option: 'lowerSolver', change: () => ({ 'lower-solver': 'adam' }) },
    { option: 'lowerSolver', beside: () => ({ 'lower-steps': 2 }), change: () => ({ 'lower-solver': 'momentum' }) },
    { option: 'lowerWarmStart', change: () => ({ 'lower-warm-start': true }) },
    { option: 'lowerSteps', change: () => ({ 'lower-steps': 0, 'lower-learning-rate': undefined }) },
    { option: 'lowerSteps', change: () => ({ 'lower-steps': 3 }) },
    { option: 'lowerLearningRate', change: () => ({ 'lower-learning-rate': 0.2 }) },
    { option: 'learningRateBackbone', change: () => ({ 'learning-rate-backbone': 5e-3 }) },
    { option: 'learningRateAdapters', change: () => ({ 'learning-rate-adapters': 5e-3 }) },
  ],
};

const base: Readonly<Record<TrainMethod, Given>> = {
  sft: { train: 'both', 'learning-rate': 1e-3, 'max-steps': 3, 'batch-size': 2, 'lora-r': 8, 'lora-dropout': 0 },
  dpo: { train: 'both', 'learning-rate': 1e-3, 'max-steps': 3, 'batch-size': 2, 'lora-r': 8 },
  spo: { 'learning-rate': 1e-3, 'max-steps': 3, 'batch-size': 2, 'lora-r': 8, 'lower-learning-rate': 0.1 },
};

/** Options that say where things are, or what must not change a result but what is reported or kept in memory. */
const elsewhere = [
  ...['model', 'data', 'output', 'overwrite', 'device', 'threads'],
  ...['termNorms', 'gradNorms', 'gradientCheckpointing'],
];
/** Options that the base's own adapter settings would make dead, or that dpo and spo refuse. */
const refusedHere: Readonly<Record<TrainMethod, readonly string[]>> = {
  sft: [],
  dpo: ['loraDropout'],
  spo: ['loraDropout'],
};

/** An adapter brings its own settings; a full training has none. */
function withoutDead(given: Given): Given {
  if (given.adapter === undefined && given.train !== 'full') return given;
  return { ...given, 'lora-r': undefined, 'lora-dropout': undefined };
}

describe.each(['sft', 'dpo', 'spo'] as const)('%s', (method) => {
  it('has a test of every option', () => {
    const tested = new Set<string>(changes[method].map(({ option }) => option));
    const missing = optionsOf(method).filter((key) => ![...tested, ...elsewhere, ...refusedHere[method]].includes(key));
    expect(missing).toEqual([]);
  });

  const known = new Map<string, Promise<string>>();
  const remembered = (given: Given): Promise<string> => {
    const key = JSON.stringify(given);
    if (!known.has(key)) known.set(key, fingerprint(method, given));
    return known.get(key)!;
  };

  it.each(changes[method].map((c) => [c.option, c] as const))(
    '%s changes the result',
    async (_, { change, beside = nothing }) => {
      const before = { ...base[method], ...beside() };
      const [one, other] = [
        await remembered(withoutDead(before)),
        await fingerprint(method, withoutDead({ ...before, ...change() })),
      ];
      expect(other).not.toBe(one);
    },
  );

  it('the number of threads does not', async () => {
    expect(await fingerprint(method, { ...base[method], threads: 1 })).toBe(await remembered(base[method]));
  });
});

describe('gradientCheckpointing', () => {
  it.each([
    ['sft', { 'lora-dropout': 0.1, 'gradient-accumulation-steps': 2 }],
    ['dpo', { 'gradient-accumulation-steps': 2, 'nll-weight': 0.5 }],
    ['spo', { 'gradient-accumulation-steps': 2, 'lower-steps': 2 }],
    ['spo', { 'ld-alpha': 0.5 }],
    ['spo', { dtype: 'bfloat16' }],
  ] as const)('%s learns the same, bit for bit (%j)', async (method, more) => {
    const data = folder.write('long.json', method === 'sft' ? fixtureCompletions(9) : fixturePairs(9));
    const given = { model, data, ...base[method], ...more };
    const plain = await train(method, given);
    const saving = await train(method, { ...given, 'gradient-checkpointing': true });
    expect(savedBytes(saving.result.output)).toBe(savedBytes(plain.result.output));
    expect(stable(saving.metrics)).toEqual(stable(plain.metrics));
    expect(saving.record.options['gradient-checkpointing']).toBe(true);
    expect(plain.record.options['gradient-checkpointing']).toBe(false);
  });
});

it.each([
  ['auto', 'off'],
  ['on', 'auto'],
])('gradNorms %s changes what spo reports beside %s, not what it learns', async (more, less) => {
  const data = folder.write('pairs-norms.json', fixturePairs(7));
  const given = {
    model,
    data,
    ...base.spo,
    ...(less === 'auto' && { 'lower-steps': 0, 'lower-learning-rate': undefined }),
  };
  const [reported, without] = [
    await train('spo', { ...given, 'grad-norms': more }),
    await train('spo', { ...given, 'grad-norms': less }),
  ];
  const added = Object.keys(reported.metrics[0]).filter((name) => !(name in without.metrics[0]));
  expect(added.sort()).toEqual([
    ...['grad_cosine', 'grad_norm/chosen', 'grad_norm/rejected', 'spo/active_fraction', 'spo/regularizer'],
  ]);
  // Gradients are added up in another order.
  for (const [i, { loss }] of without.metrics.entries()) expect(reported.metrics[i].loss).toBeCloseTo(loss, 4);
});

it.each([
  [{ gamma: 0, 'lower-steps': 0, 'lower-learning-rate': undefined }, ['c', 'd']],
  [{ gamma: 0.5 }, ['c', 'e']],
])('termNorms with %j changes what spo reports, not what it learns', async (setting, terms) => {
  const data = folder.write('norms.json', fixturePairs(7));
  const given = { model, data, ...base.spo, ...setting };
  const names = ['share', 'term'].flatMap((kind) => terms.map((term) => `spo/${kind}_${term}`));
  const [without, reported] = [await train('spo', given), await train('spo', { ...given, 'term-norms': true })];
  const more = Object.keys(reported.metrics[0]).filter((name) => !(name in without.metrics[0]));
  expect(more.sort()).toEqual(names);
  // Term (e) is added up apart, which rounds in another order.
  for (const [i, { loss }] of without.metrics.entries()) expect(reported.metrics[i].loss).toBeCloseTo(loss, 4);
  if (setting.gamma === 0) expect(savedBytes(reported.result.output)).toBe(savedBytes(without.result.output));
});
