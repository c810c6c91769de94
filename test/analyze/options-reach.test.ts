// Every option of every analysis reaches what is measured: with one of them changed, a chart or a table holds other numbers.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { makeReport } from '../../src/analyze/commands.js';
import type { Report } from '../../src/analyze/report.js';
import { assets } from '../../src/demo/settings.js';
import { type Analysis, analyses, type OptionKey, optionsOf, resolveOptions } from '../../src/train/options.js';
import { makeModelFolder } from '../fixtures/make.js';
import { fixturePairs, type Given, temporaryFolder, train } from '../train/support.js';

const folder = temporaryFolder();
let model: string;
let data: string;
/** Neither new nor zero; one for the small model, one for the demo's. */
const adapters = { small: '', demo: '' };

async function makeAdapter(name: string, of: string, rate: number, records: object[]): Promise<string> {
  const path = folder.write(`${name}.json`, records);
  const given = { model: of, data: path, 'max-steps': 2, 'learning-rate': rate, 'lora-r': 3 };
  const { result } = await train('sft', { ...given, output: folder.path(name) });
  return join(result.output, 'adapter');
}

beforeAll(async () => {
  model = await makeModelFolder(folder.path('model'), 'qwen2');
  const pairs = fixturePairs(9) as { prompt_ids: number[] }[];
  data = folder.write(
    'pairs.json',
    pairs.map((pair, i) => ({ ...pair, offset: i / 4 })),
  );
  // Something else than either response, so that both lose.
  const others = pairs.map(({ prompt_ids }) => ({ prompt_ids, completion_ids: [7, 7, 7] }));
  adapters.small = await makeAdapter('small', model, 0.05, others);
  const [line] = readFileSync(assets.pairs, 'utf8').split('\n');
  const { prompt, rejected: completion } = JSON.parse(line);
  adapters.demo = await makeAdapter('demo', assets.model, 5e-4, [{ prompt, completion }]);
});

/** All numbers that a reader gets to see, without times. */
function measured({ charts, tables }: Report): string {
  const curves = charts.map(({ spec }) => JSON.stringify(spec, (key, value) => (key === 'title' ? undefined : value)));
  const rows = tables.map(({ columns, rows }) => rows.map((row) => row.filter((_, i) => columns[i] !== 'seconds')));
  return JSON.stringify([curves, rows]);
}

async function fingerprint(name: Analysis, given: Given): Promise<string> {
  const where = name === 'mass-shift' ? {} : { model, data };
  const options = resolveOptions(`analyze ${name}`, { ...where, device: 'cpu', ...given });
  return measured((await makeReport(name, options as never))!);
}

interface Change {
  readonly option: OptionKey;
  readonly change: Given;
  /** What has to be set for the option to have a part. */
  readonly beside?: Given;
}

const row = (option: OptionKey, value: unknown, beside: Given = {}): Change => ({
  option,
  change: { [option]: value },
  beside,
});

/** What analyses that make adapters have. */
const spo: readonly Change[] = [
  row('seed', 43),
  row('loraR', 4),
  row('loraAlpha', 8),
  row('loraTargets', 'q_proj,v_proj'),
  row('rslora', true),
  row('sftReduction', 'token-mean'),
  row('penaltyForm', 'first-order'),
  row('normOver', 'adapters'),
  row('normPerToken', true),
  row('regularizerMethod', 'finite-differences'),
  row('lowerSolver', 'adam'),
  row('dtype', 'bfloat16'),
  row('beta', 0.9),
];

/** Beside them: the model is not its reference, whose margins of 0 would hide some. */
const losses: readonly Change[] = [
  row('reference', 'initial'),
  row('lossType', 'ipo_sum'),
  row('lossWeights', '1,0.1', { lossType: 'sigmoid,sft' }),
  row('nllWeight', 0.5),
  row('nllReduction', 'sequence-sum', { nllWeight: 0.5 }),
  row('ldAlpha', 0.3),
  row('wpo', true),
  row('labelSmoothing', 0.3, { lossType: 'robust' }),
  row('fDivergenceType', 'forward_kl'),
  row('fAlphaDivergenceCoef', -0.5, { fDivergenceType: 'alpha_divergence' }),
  row('discopopTau', 0.5, { lossType: 'discopop' }),
  row('dpopLambda', 5, { lossType: 'dpop' }),
  row('rdpoAlpha', 0.3, { lossType: 'rdpo' }),
  row('betaDpoAlpha', 0.1, { lossType: 'beta_dpo' }),
  row('simpoGamma', 1.5, { lossType: 'simpo', reference: undefined }),
  row('alphapoAlpha', -0.5, { lossType: 'alphapo', reference: undefined }),
  row('orpoLambda', 2, { lossType: 'orpo', reference: undefined }),
  row('slicDelta', 50, { lossType: 'slic', reference: undefined }),
  row('slicLambda', 2, { lossType: 'slic', reference: undefined }),
  row('slicLengthNormalize', true, { lossType: 'slic', reference: undefined }),
  row('ktoDesirableWeight', 2, { lossType: 'apo_zero_unpaired' }),
  row('ktoUndesirableWeight', 2, { lossType: 'apo_zero_unpaired' }),
];

const followed: readonly Change[] = [
  row('preset', 'paper', { beta: undefined, learningRate: undefined }),
  row('learningRate', 2e-3),
  row('maxSteps', 3),
  row('batchSize', 1),
  row('lowerSteps', 3),
  row('lowerLearningRate', 0.2),
  row('lowerWarmStart', true),
];

const momentum = row('betaDpoMomentum', 0.1, { lossType: 'beta_dpo', maxSteps: 4 });

const changes: Readonly<Record<Analysis, readonly Change[]>> = {
  theory: [
    row('beta', 0.9),
    row('pairs', 3),
    row('stepSizes', '1e-3,1e-5'),
    row('dtype', 'float32'),
    row('maxLength', 4),
  ],
  dynamics: [
    ...spo,
    ...followed,
    momentum,
    row('maxLength', 4),
    row('lambda', 3),
    row('gamma', 0),
    row('pairs', 4),
    row('every', 2),
    row('gradientPairs', 2),
    row('emaDecay', 0.5),
  ],
  'mass-shift': [
    // Rare answers have the larger gradients, which the regularizer takes hold of.
    ...spo.map((one) => ({ ...one, beside: { answer: '31' } })),
    ...followed,
    momentum,
    row('lambda', 3),
    row('gamma', 0),
    row('every', 2),
    row('prompt', 'Tom has 24 apples and buys 17 more. How many apples does Tom have?'),
    row('answer', 'none but 31'),
    row('samples', 100),
    row('maxTokens', 20, { temperature: 2 }),
    row('temperature', 1.3),
    row('perSet', 1),
    row('stepSize', 1e-2),
  ],
  sensitivity: [
    ...spo,
    ...followed,
    momentum,
    row('maxLength', 4),
    row('pairs', 4),
    row('gradientPairs', 2),
    row('lambdas', '2'),
    row('gammas', '0.2'),
  ],
  terms: [
    ...spo,
    row('maxLength', 4),
    row('pairs', 4),
    row('lambdas', '2'),
    row('gammas', '0.2'),
    row('lowerLearningRates', '0.2'),
    row('lowerStepCounts', '3'),
  ],
};

const training = { maxSteps: 2, batchSize: 2, learningRate: 1e-3, lowerLearningRate: 0.1 };
const base: Readonly<Record<Analysis, Given>> = {
  theory: { pairs: 2, stepSizes: '1e-3,1e-4' },
  dynamics: { ...training, pairs: 3, every: 1, gradientPairs: 1, gamma: 0.5, loraR: 8 },
  'mass-shift': { ...training, lowerLearningRate: 1e-4, samples: 50, perSet: 4, every: 1, gamma: 0.01, loraR: 8 },
  sensitivity: { ...training, pairs: 3, gradientPairs: 3, lambdas: '1', gammas: '0.5', loraR: 8 },
  terms: { pairs: 3, lambdas: '1', gammas: '0.5', lowerLearningRates: '0.1', lowerStepCounts: '2', loraR: 8 },
};

/** Options that say where things are, or that must not change a result. */
const elsewhere = ['model', 'data', 'output', 'device', 'threads', 'adapter'];

/** Losses by analysis: of the one batch of the terms, dpop's penalty needs a pair whose chosen response is below the reference. */
const lossesOf = (name: Analysis): readonly Change[] =>
  losses.map((one) =>
    name === 'terms' && one.option === 'dpopLambda' ? { ...one, beside: { ...one.beside, pairs: 9 } } : one,
  );

describe.each(analyses)('%s', (name) => {
  const ofLosses = name === 'theory' ? [] : lossesOf(name);
  const all = [...changes[name], ...ofLosses];
  const known = new Map<string, Promise<string>>();
  const remembered = (given: Given): Promise<string> => {
    const key = JSON.stringify(given);
    if (!known.has(key)) known.set(key, fingerprint(name, given));
    return known.get(key)!;
  };
  const withAdapter = (): Given => ({
    adapter: name === 'mass-shift' ? adapters.demo : adapters.small,
    ...(name !== 'theory' && { loraR: undefined }),
  });

  it('has a test of every option', () => {
    const tested = new Set<string>(all.map(({ option }) => option));
    const missing = optionsOf(`analyze ${name}`).filter((key) => ![...tested, ...elsewhere].includes(key));
    expect(missing).toEqual([]);
  });

  it.each(all.map((one) => [one.option, one] as const))('%s changes the result', async (_, one) => {
    const apart = ofLosses.includes(one) ? { ...withAdapter(), reference: 'base' } : {};
    const before = { ...base[name], ...apart, ...one.beside };
    expect(await fingerprint(name, { ...before, ...one.change })).not.toBe(await remembered(before));
  });

  it('adapter changes the result, the number of threads does not', async () => {
    const before = await remembered(base[name]);
    expect(await fingerprint(name, { ...base[name], ...withAdapter() })).not.toBe(before);
    expect(await fingerprint(name, { ...base[name], threads: 1 })).toBe(before);
  });
});
