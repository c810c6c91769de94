// Accumulation: the same step however its batch is cut. One seed, one result: bit for bit, whatever the number of threads.
import { afterEach, describe, expect, it } from 'vitest';
import { runtimeInfo, setThreads } from '../../src/native/info.js';
import type { TrainMethod } from '../../src/train/options.js';
import { makeModelFolder } from '../fixtures/make.js';
import {
  fixtureCompletions,
  fixturePairs,
  type Given,
  type Run,
  relativeError,
  savedAdapter,
  savedModel,
  stable,
  temporaryFolder,
  train,
} from './support.js';

const folder = temporaryFolder();

async function run(method: TrainMethod, given: Given, records?: object[]): Promise<Run> {
  const model = await makeModelFolder(folder.path('model'), 'qwen2');
  const rows = records ?? (method === 'sft' ? fixtureCompletions(8) : fixturePairs(8));
  const data = folder.write(`${method}.json`, rows);
  return train(method, { model, data, 'no-shuffle': true, dtype: 'float64', ...given });
}

const cuts: readonly Given[] = [
  { 'batch-size': 2, 'gradient-accumulation-steps': 2 },
  { 'batch-size': 1, 'gradient-accumulation-steps': 4 },
];
const uneven: Given = { 'batch-size': 3, 'gradient-accumulation-steps': 2 };

/** What must not depend on how the batch is cut; averages over micro-batches of unequal size do. */
const invariant = ['step', 'loss', 'grad_norm', 'learning_rate', 'num_tokens', 'epoch'];

function expectSame(found: Run, whole: Run, names: readonly string[] = invariant): void {
  expect(found.metrics).toHaveLength(whole.metrics.length);
  found.metrics.forEach((step, i) => {
    for (const name of names)
      expect(Math.abs(step[name] - whole.metrics[i][name]), `${name} of step ${i + 1}`).toBeLessThan(
        1e-12 * Math.max(1, Math.abs(whole.metrics[i][name])),
      );
  });
}

describe('accumulation', () => {
  it.each(['token-mean', 'sum'])('sft, %s: tokens and records count alike in any micro-batch', async (reduction) => {
    const options = { train: 'full', 'sft-reduction': reduction, 'max-steps': 4, 'learning-rate': 1e-3 };
    const whole = await run('sft', { ...options, 'batch-size': 4 });
    for (const cut of cuts) {
      const found = await run('sft', { ...options, ...cut });
      expectSame(found, whole);
      expect(relativeError(await savedModel(found.result.output), await savedModel(whole.result.output))).toBeLessThan(
        1e-11,
      );
    }
  });

  it('sft: a window of unequal micro-batches is the mean over all of its tokens', async () => {
    const options = { train: 'full', epochs: 1, 'learning-rate': 1e-3 };
    const five = fixtureCompletions(5);
    expectSame(
      await run('sft', { ...options, ...uneven }, five),
      await run('sft', { ...options, 'batch-size': 5 }, five),
    );
  });

  it('dpo: equal micro-batches make the mean over the whole batch', async () => {
    const options = { train: 'both', 'max-steps': 4, 'learning-rate': 1e-3 };
    const whole = await run('dpo', { ...options, 'batch-size': 4 });
    const pairwise = [
      'rewards/chosen',
      'rewards/margins',
      'logps/chosen',
      'logps/rejected_delta',
      'rewards/accuracies',
    ];
    for (const cut of cuts) {
      const found = await run('dpo', { ...options, ...cut });
      expectSame(found, whole, [...invariant, ...pairwise]);
      expect(relativeError(await savedModel(found.result.output), await savedModel(whole.result.output))).toBeLessThan(
        1e-11,
      );
      expect(
        relativeError(await savedAdapter(found.result.output), await savedAdapter(whole.result.output)),
      ).toBeLessThan(1e-9);
    }
  });

  it('dpo: unequal micro-batches weigh alike, as in TRL: the step is the mean of their means', async () => {
    const options = { train: 'full', 'max-steps': 1, 'learning-rate': 1e-3, reference: 'none' };
    const rows = fixturePairs(4);
    const [first, second, both] = [
      await run('dpo', { ...options, 'batch-size': 3 }, rows.slice(0, 3)),
      await run('dpo', { ...options, 'batch-size': 1 }, rows.slice(3)),
      await run('dpo', { ...options, ...uneven }, rows),
    ].map(({ metrics }) => metrics[0]);
    for (const name of ['loss', 'rewards/margins', 'logps/chosen', 'entropy', 'mean_token_accuracy'])
      expect(Math.abs(both[name] - (first[name] + second[name]) / 2)).toBeLessThan(1e-13);
  });

  it('spo: lower level, penalty and regularizer see the whole batch of the step, unequal micro-batches or not', async () => {
    const options = {
      'max-steps': 3,
      'learning-rate': 1e-3,
      'lower-learning-rate': 1e-2,
      'lower-steps': 2,
      gamma: 0.1,
      'sft-reduction': 'token-mean',
    };
    const whole = await run('spo', { ...options, 'batch-size': 4 });
    const parts = ['spo/dpo', 'spo/sft', 'spo/sft_star', 'spo/regularizer', 'grad_norm/backbone', 'grad_norm/adapters'];
    for (const cut of [...cuts, { 'batch-size': 3, 'gradient-accumulation-steps': 2, four: true }]) {
      const { four, ...given } = cut as Given;
      const rows = fixturePairs(four ? 4 : 8);
      const found = await run('spo', { ...options, ...given }, rows);
      const expected = four ? await run('spo', { ...options, 'batch-size': 4 }, rows) : whole;
      expectSame(found, expected, [...invariant, ...parts]);
      expect(
        relativeError(await savedModel(found.result.output), await savedModel(expected.result.output)),
      ).toBeLessThan(1e-11);
    }
  });
});

describe('one seed', () => {
  afterEach(() => setThreads(runtimeInfo().hardwareThreads));

  const methods: readonly (readonly [TrainMethod, Given])[] = [
    ['sft', { train: 'both', 'lora-dropout': 0.2 }],
    ['dpo', { train: 'both' }],
    ['spo', { gamma: 0.1, 'lower-learning-rate': 1e-3 }],
  ];

  it.each(methods)('%s gives the same bits again, and on any number of threads', async (method, given) => {
    const options = {
      ...given,
      'max-steps': 4,
      'batch-size': 2,
      'no-shuffle': false,
      dtype: 'float32',
      'learning-rate': 1e-3,
    };
    const first = await run(method, options);
    const weights = async ({ result }: Run) => [await savedModel(result.output), await savedAdapter(result.output)];
    for (const more of [{}, { threads: 1 }, { threads: 2 }]) {
      const again = await run(method, { ...options, ...more });
      expect(stable(again.metrics)).toEqual(stable(first.metrics));
      expect(await weights(again)).toEqual(await weights(first));
    }
    const other = await run(method, { ...options, seed: 7 });
    expect(stable(other.metrics)).not.toEqual(stable(first.metrics));
    expect(await weights(other)).not.toEqual(await weights(first));
  });
});

describe('spo without penalty and regularizer', () => {
  it.each([1, 0])('is dpo of both groups, bit for bit, with %i lower-level steps', async (lowerSteps) => {
    const options = { 'max-steps': 4, 'batch-size': 2, 'learning-rate': 1e-3, beta: 0.2, dtype: 'float32' };
    const lower = { 'lower-steps': lowerSteps, ...(lowerSteps > 0 && { 'lower-learning-rate': 0.1 }) };
    const spo = await run('spo', { ...options, lambda: 0, ...lower });
    const dpo = await run('dpo', { ...options, train: 'both' });
    expect(spo.metrics).toMatchObject(stable(dpo.metrics));
    expect(await savedModel(spo.result.output)).toEqual(await savedModel(dpo.result.output));
    expect(await savedAdapter(spo.result.output)).toEqual(await savedAdapter(dpo.result.output));
  });
});
