// What fails half-way: memory comes back, weights are those of the last good step, nothing is lost or reported twice.
import { afterEach, describe, expect, it, vi } from 'vitest';
import { loadModel } from '../../src/io/model-folder.js';
import { CausalLM } from '../../src/models/causal-lm.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import type { TrainMethod } from '../../src/train/options.js';
import { SpoTask } from '../../src/train/spo-task.js';
import { Trainable } from '../../src/train/task.js';
import { makeModelFolder } from '../fixtures/make.js';
import { bitsOf } from '../models/support.js';
import {
  fixtureCompletions,
  fixturePairs,
  type Given,
  readMetrics,
  readRun,
  readTensors,
  refusal,
  savedAdapter,
  savedModel,
  stable,
  temporaryFolder,
  train,
} from './support.js';

const folder = temporaryFolder();
const model = () => makeModelFolder(folder.path('model'), 'llama');

afterEach(() => vi.restoreAllMocks());

/** Counts the calls of a method, and makes the one numbered `at` (from 1) fail. */
function failAt(target: object, name: string, at: number, fail: () => unknown): { calls: () => number } {
  let calls = 0;
  const original = (target as Record<string, (...args: unknown[]) => unknown>)[name];
  vi.spyOn(target as Record<string, typeof original>, name).mockImplementation(function (this: unknown, ...args) {
    return ++calls === at ? fail() : original.apply(this, args);
  });
  return { calls: () => calls };
}

/** Numbers from 1 to `count`, first and last among them; of many only some. */
const sample = (count: number): number[] => {
  const stride = Math.max(1, Math.floor(count / 16));
  return Array.from({ length: count }, (_, i) => i + 1).filter((at) => at % stride === 0 || at === 1 || at > count - 2);
};

const throwing = (): never => {
  throw new Error('injected');
};
const rejecting = (): Promise<never> => Promise.reject(new Error('injected'));

const runs: readonly (readonly [TrainMethod, Given])[] = [
  ['sft', { train: 'both' }],
  ['dpo', { train: 'both' }],
  ['spo', { gamma: 0.1, 'lower-steps': 2, 'lower-learning-rate': 1e-3, 'term-norms': true }],
  ['spo', { 'lower-steps': 2, 'lower-solver': 'adam', 'lower-warm-start': true }],
  ['spo', { 'ld-alpha': 0.5, 'penalty-form': 'first-order', 'lambda-schedule': 'linear' }],
  ['spo', { gamma: 0.1, 'regularizer-method': 'finite-differences', 'norm-per-token': true }],
];

async function small(method: TrainMethod, given: Given, output: string): Promise<unknown> {
  const rows = method === 'sft' ? fixtureCompletions(6) : fixturePairs(6);
  const data = folder.write(`${method}.json`, rows);
  const size = { 'batch-size': 2, 'gradient-accumulation-steps': 2, 'max-steps': 2 };
  return train(method, { model: await model(), data, ...size, ...given, output: folder.path(output), overwrite: true });
}

describe('memory', () => {
  it.each(runs)('%s: a run gives back everything, and no step keeps anything', async (method, given) => {
    const start = memory();
    const data = folder.write('data.json', method === 'sft' ? fixtureCompletions(4) : fixturePairs(4));
    // At its last step a run has no reads under way.
    const heldAfter = async (steps: number): Promise<number> => {
      let held = 0;
      const onStep = () => {
        held = memory().storages;
      };
      await train(method, { model: await model(), data, 'batch-size': 2, 'max-steps': steps, ...given }, { onStep });
      return held;
    };
    expect(await heldAfter(8)).toBe(await heldAfter(3));
    expect(memory().storages).toBe(start.storages);
    expect(memory().allocated).toBe(start.allocated);
    expect(memory().byTag).toEqual(start.byTag);
  });

  it.each(runs)('%s: comes back when any forward pass throws', async (method, given) => {
    const start = memory().storages;
    const counter = failAt(CausalLM.prototype, 'logProbs', 0, throwing);
    await small(method, given, 'whole');
    const calls = counter.calls();
    expect(calls).toBeGreaterThan(2);
    for (const at of sample(calls)) {
      vi.restoreAllMocks();
      failAt(CausalLM.prototype, 'logProbs', at, throwing);
      await expect(small(method, given, 'broken'), `call ${at} of ${calls}`).rejects.toThrow('injected');
      expect(memory().storages, `call ${at} of ${calls}`).toBe(start);
    }
  });

  it.each(runs)('%s: comes back when any read of a result fails', async (method, given) => {
    const start = memory().storages;
    const counter = failAt(Tensor.prototype, 'data', 0, rejecting);
    await small(method, given, 'whole');
    const calls = counter.calls();
    expect(calls).toBeGreaterThan(8);
    for (const at of sample(calls)) {
      vi.restoreAllMocks();
      failAt(Tensor.prototype, 'data', at, rejecting);
      await expect(small(method, given, 'broken'), `read ${at} of ${calls}`).rejects.toThrow('injected');
      expect(memory().storages, `read ${at} of ${calls}`).toBe(start);
    }
  });
});

describe('the lower level', () => {
  it('leaves θ bit for bit where it was, wherever it throws', async () => {
    using trained = await loadModel(await model(), { lora: { r: 2, seed: 1 } });
    const bits = async (): Promise<string[]> => Promise.all([...trained.backbone.values()].map(bitsOf));
    const before = await bits();
    const examples = [0, 1, 2, 3].map((i) => ({
      index: i,
      line: i,
      promptIds: Int32Array.of(4, 5 + i),
      chosenIds: Int32Array.of(6, 7, 2),
      rejectedIds: Int32Array.of(8 + i, 2),
    }));
    const options = {
      beta: 0.5,
      lambda: 1,
      gamma: 0.1,
      lowerSteps: 3,
      lowerLearningRate: 0.1,
      normOver: 'all',
      sftReduction: 'sum',
    } as const;
    const accumulate = async (): Promise<void> => {
      const trainable = new Trainable(trained, ['backbone', 'adapters']);
      try {
        const task = new SpoTask(trainable, examples, null, options, () => trained.backbone);
        const { losses, metrics } = await task.accumulate({
          step: 0,
          microBatches: [
            [0, 1],
            [2, 3],
          ],
        });
        for (const t of losses) t.dispose();
        await metrics;
      } finally {
        trainable.dispose();
      }
    };
    const passes = vi.spyOn(CausalLM.prototype, 'logProbs');
    await accumulate();
    const count = passes.mock.calls.length;
    vi.restoreAllMocks();
    expect(await bits()).toEqual(before);
    const start = memory().storages; // the model's table of rotations, made with its first pass, included
    // A pass for each of two micro-batches (the first step included), two steps and h of both.
    expect(count).toBe(8);
    for (let at = 1; at <= count; at++) {
      failAt(CausalLM.prototype, 'logProbs', at, throwing);
      await expect(accumulate()).rejects.toThrow('injected');
      vi.restoreAllMocks();
      expect(await bits()).toEqual(before);
      expect(memory().storages).toBe(start);
    }
  });
});

describe('a loss that is not finite', () => {
  const reference = { ref_chosen_logps: -3, ref_rejected_logps: -4 };
  const good = fixturePairs(4).map((pair) => ({ ...pair, ...reference }));
  /** Finite on paper, infinite in float32. */
  const bad = { ...good[0], ref_chosen_logps: 1e300 };
  const common = { 'no-shuffle': true, 'learning-rate': 1e-2, 'lr-schedule': 'constant' };

  it.each([
    ['dpo', { train: 'both', 'batch-size': 1 }, 1, 'records 1'],
    ['dpo', { train: 'lora', 'batch-size': 1 }, 1, 'records 1'],
    ['dpo', { train: 'full', 'batch-size': 1, 'gradient-accumulation-steps': 2 }, 0, 'records 0, 1'],
    ['spo', { 'batch-size': 1, gamma: 0.1 }, 1, 'records 1'],
  ] as const)('%s %j: stops there, keeps the weights before that step', async (method, given, before, records) => {
    const options = { ...common, ...given, model: await model() };
    const output = folder.path('stopped');
    const data = folder.write('bad.json', [good[0], bad, good[2], good[3]]);
    const steps: number[] = [];
    const run = train(
      method,
      { ...options, data, epochs: 1, output, overwrite: true },
      { onStep: ({ step }) => steps.push(step) },
    );
    const message = await refusal(run);
    expect(message).toMatch(
      new RegExp(`^step ${before + 1}: loss is Infinity \\(${records}\\); the weights before this step are kept`),
    );
    expect(steps).toEqual(Array.from({ length: before }, (_, i) => i + 1));
    expect(readMetrics(output)).toHaveLength(before);
    expect(readRun(output)).toMatchObject({ status: 'failed', steps: before, error: message });
    if (before === 0) {
      expect(await savedModel(output)).toEqual(await readTensors(`${await model()}/model.safetensors`));
      return;
    }
    // The same steps, with nothing wrong behind them.
    const shorter = await train(method, { ...options, data: folder.write('bad.json', good), 'max-steps': before });
    expect(stable(readMetrics(output)).map(({ epoch: _, ...rest }) => rest)).toEqual(
      stable(shorter.metrics).map(({ epoch: _, ...rest }) => rest),
    );
    const trains = (given as Given).train;
    if (trains !== 'lora') expect(await savedModel(output)).toEqual(await savedModel(shorter.result.output));
    if (trains !== 'full') expect(await savedAdapter(output)).toEqual(await savedAdapter(shorter.result.output));
  });

  it('a learning rate that blows up ends in a message and finite weights', async () => {
    const data = folder.write('huge.json', fixtureCompletions(4));
    const output = folder.path('huge');
    const given = { model: await model(), data, output, train: 'full', 'learning-rate': 1e18, 'max-steps': 20 };
    expect(await refusal(train('sft', given))).toMatch(
      /^step \d+: (loss|grad_norm) is (NaN|Infinity|-Infinity) \(records/,
    );
    const saved = await savedModel(output);
    for (const [name, values] of saved) expect(values.every(Number.isFinite), name).toBe(true);
    expect(
      readMetrics(output).every(({ loss, grad_norm }) => Number.isFinite(loss) && Number.isFinite(grad_norm)),
    ).toBe(true);
    expect(readRun(output).steps).toBe(readMetrics(output).length);
  });
});

describe('steps that were taken', () => {
  it('are in metrics.jsonl and in the weights when a later one throws', async () => {
    const data = folder.write('later.json', fixtureCompletions(8));
    const options = {
      model: await model(),
      data,
      train: 'full',
      'batch-size': 1,
      'no-shuffle': true,
      'lr-schedule': 'constant',
    };
    failAt(CausalLM.prototype, 'logProbs', 4, throwing);
    const output = folder.path('later');
    await expect(train('sft', { ...options, output, 'max-steps': 6 })).rejects.toThrow('injected');
    vi.restoreAllMocks();
    expect(readRun(output)).toMatchObject({ status: 'failed', steps: 3, error: 'injected' });
    const shorter = await train('sft', { ...options, 'max-steps': 3 });
    expect(stable(readMetrics(output))).toEqual(stable(shorter.metrics));
    expect(await savedModel(output)).toEqual(await savedModel(shorter.result.output));
  });

  it('are saved when a listener throws', async () => {
    const data = folder.write('listener.json', fixtureCompletions(8));
    const output = folder.path('listener');
    const options = { model: await model(), data, train: 'full', 'batch-size': 1, 'max-steps': 6, output };
    await expect(
      train('sft', options, { onStep: ({ step }) => (step === 2 ? throwing() : undefined) }),
    ).rejects.toThrow('injected');
    expect(readRun(output)).toMatchObject({ status: 'failed', error: 'injected' });
    expect(readRun(output).steps).toBe(readMetrics(output).length);
    await savedModel(output);
  });
});

describe('an aborted signal', () => {
  it.each(runs)('%s: ends after the current step, with exactly its steps saved', async (method, given) => {
    const controller = new AbortController();
    const rows = method === 'sft' ? fixtureCompletions(8) : fixturePairs(8);
    const data = folder.write('abort.json', rows);
    const options = {
      model: await model(),
      data,
      'batch-size': 1,
      'no-shuffle': true,
      'lr-schedule': 'constant',
      ...given,
    };
    const onStep = ({ step }: { step: number }) => (step === 2 ? controller.abort() : undefined);
    const stopped = await train(method, { ...options, 'max-steps': 8 }, { signal: controller.signal, onStep });
    expect(stopped.result.interrupted).toBe(true);
    expect(stopped.result.steps).toBeLessThanOrEqual(3);
    expect(stopped.record).toMatchObject({ status: 'interrupted', steps: stopped.result.steps, total_steps: 8 });
    const shorter = await train(method, { ...options, 'max-steps': stopped.result.steps });
    expect(shorter.record).toMatchObject({ status: 'completed' });
    expect(stable(stopped.metrics)).toEqual(stable(shorter.metrics));
    expect(stopped.result.lastMetrics).toEqual(
      Object.fromEntries(Object.entries(stopped.metrics.at(-1)!).filter(([name]) => name !== 'step')),
    );
    expect(await savedModel(stopped.result.output)).toEqual(await savedModel(shorter.result.output));
    expect(await savedAdapter(stopped.result.output)).toEqual(await savedAdapter(shorter.result.output));
  });

  it('before the first step: the model as it was, no steps', async () => {
    const data = folder.write('early.json', fixturePairs(8));
    const early = await train('dpo', { model: await model(), data, train: 'full' }, { signal: AbortSignal.abort() });
    expect(early.result).toMatchObject({ steps: 0, interrupted: true, lastMetrics: {} });
    expect(early.metrics).toEqual([]);
    expect(await savedModel(early.result.output)).toEqual(await readTensors(`${await model()}/model.safetensors`));
  });
});
