// The trainers as library calls: the same steps as the command, on a model in memory; stopping early; what they refuse.
import { beforeAll, describe, expect, it, vi } from 'vitest';
import { KeelgradError } from '../../src/errors.js';
import { loadModel } from '../../src/io/model-folder.js';
import { loadTokenizer } from '../../src/io/tokenizer.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import { tanh } from '../../src/ops/elementwise.js';
import { memory } from '../../src/tensor/storage.js';
import type { Metrics, RunStep } from '../../src/train/hooks.js';
import { spoPresets } from '../../src/train/presets.js';
import { dpo, sft, spo } from '../../src/train/trainers.js';
import { makeModelFolder } from '../fixtures/make.js';
import { writeToyTokenizer } from '../io/toy-tokenizer.js';
import { fixtureCompletions, fixturePairs, stable, temporaryFolder, train } from './support.js';

const folder = temporaryFolder();
let path: string;
beforeAll(async () => {
  path = await makeModelFolder(folder.path('model'), 'qwen2');
  await writeToyTokenizer(path);
});

const pairs = fixturePairs(6);
const lora = { r: 4, seed: 42, dropout: 0 };

async function steps(run: AsyncIterable<RunStep>): Promise<Metrics[]> {
  const all: Metrics[] = [];
  for await (const { step, metrics } of run) all.push({ step, ...metrics });
  return all;
}

const message = async (run: AsyncIterable<RunStep>): Promise<string> => {
  const error = await steps(run).then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(KeelgradError);
  return (error as Error).message;
};

describe('a library call', () => {
  it('takes the steps of the command, bit for bit', async () => {
    const common = { maxSteps: 3, batchSize: 2, learningRate: 1e-3, seed: 42 };
    const given = { model: path, data: folder.write('pairs.json', pairs), ...common };
    const cases = [
      [
        (m: CausalLM) => dpo(m, pairs, { ...common, train: 'both' }),
        await train('dpo', { ...given, train: 'both', loraR: 4 }),
      ],
      [
        (m: CausalLM) => spo(m, pairs, { ...common, gamma: 0.1, lower: { steps: 2, lr: 1e-2 } }),
        await train('spo', { ...given, gamma: 0.1, lowerSteps: 2, lowerLearningRate: 1e-2, loraR: 4 }),
      ],
    ] as const;
    for (const [run, command] of cases) {
      using model = await loadModel(path, { lora });
      expect(stable(await steps(run(model)))).toEqual(stable(command.metrics));
    }
  });

  it('trains everything where there are no adapters, and only the adapters where there are', async () => {
    const backbone = (m: CausalLM): Float32Array[] =>
      [...m.backbone.values()].map((t) => Float32Array.from(t.dataSync()));
    for (const options of [{}, { lora }]) {
      using model = await loadModel(path, options);
      const before = backbone(model);
      await steps(sft(model, fixtureCompletions(4), { maxSteps: 2, learningRate: 1e-3 }));
      if ('lora' in options) expect(backbone(model)).toEqual(before);
      else expect(backbone(model)).not.toEqual(before);
    }
  });

  it('takes text with a tokenizer', async () => {
    using model = await loadModel(path);
    const records = [{ prompt: 'ab:', completion: ' c' }];
    expect(await message(sft(model, records))).toMatch(/\[sft\] expected a tokenizer for text records/);
    const found = await steps(sft(model, records, { maxSteps: 1, tokenizer: await loadTokenizer(path) }));
    expect(found).toHaveLength(1);
    const labelled = ['a', 'b', 'ab:'].map((prompt, i) => ({ prompt, completion: ' c', label: i !== 1 }));
    const options = { lossType: 'kto', maxSteps: 2, batchSize: 3, tokenizer: await loadTokenizer(path) } as const;
    const [first, second] = await steps(dpo(model, labelled, options));
    expect([first.loss, first.kl]).toEqual([0.5, 0]);
    expect(second['rewards/margins']).not.toBe(0);
  });

  it('gives everything back when its reader stops early, and reports what was dropped', async () => {
    using model = await loadModel(path, { lora });
    await steps(dpo(model, pairs, { maxSteps: 1 })); // the model's table of rotations
    const start = memory().storages;
    for (const method of [dpo, spo])
      for await (const { step } of method(model, pairs, { maxSteps: 9, batchSize: 1 })) if (step === 2) break;
    expect(memory().storages).toBe(start);
    const messages: string[] = [];
    const long = [...pairs, { prompt_ids: Array(9).fill(5), chosen_ids: [4], rejected_ids: [6] }];
    const hooks = { onMessage: (text: string) => messages.push(text) };
    await steps(dpo(model, long, { maxSteps: 1, maxLength: 9, hooks }));
    expect(messages).toEqual(['dropped 1 records whose prompt alone fills max length 9']);
    await steps(dpo(model, pairs, { maxSteps: 9, hooks: { signal: AbortSignal.abort() } }));
    expect(memory().storages).toBe(start);
  });

  it('takes one loss by its name alone', async () => {
    const of = async (lossType: 'simpo' | readonly ['simpo']): Promise<Metrics[]> => {
      using model = await loadModel(path, { lora });
      return stable(await steps(dpo(model, pairs, { lossType, simpoGamma: 1, maxSteps: 2 })));
    };
    expect(await of('simpo')).toEqual(await of(['simpo']));
  });

  it('takes spo’s presets and the settings of its lower level', async () => {
    const of = async (options: Parameters<typeof spo>[2]): Promise<Metrics[]> => {
      using model = await loadModel(path, { lora });
      return stable(await steps(spo(model, pairs, { maxSteps: 3, ...options })));
    };
    const preset = await of({ preset: 'paper', epochs: undefined });
    expect(preset).toEqual(await of({ ...spoPresets.paper, epochs: undefined }));
    expect(preset).not.toEqual(await of({}));
    const lower = { steps: 2, lr: 1e-3, solver: 'momentum', warmStart: true } as const;
    const flat = { lowerSteps: 2, lowerLearningRate: 1e-3, lowerSolver: 'momentum', lowerWarmStart: true } as const;
    expect(await of({ lower })).toEqual(await of(flat));
    const ramp = await of({ lambda: 2, lambdaSchedule: 'linear', lambdaRampSteps: 2 });
    expect(ramp.map((step) => step['spo/lambda'])).toEqual([0, 1, 2]);
    const messages: string[] = [];
    const hooks = { onMessage: (text: string) => messages.push(text) };
    await of({ lambdaSchedule: 'linear', lambdaRampSteps: 4, hooks });
    expect(messages).toEqual(['lambda does not reach 1: its ramp takes 4 steps and the run 3; the last one has 0.5']);
  });

  it('refuses what the dtype of the loaded model rules out, before anything is computed', async () => {
    using model = await loadModel(path, { lora, dtype: 'bfloat16' });
    for (const [options, text] of [
      [
        { gamma: 0.1, regularizerMethod: 'finite-differences' },
        /^regularizer method finite-differences expected dtype float32 or float64, found bfloat16: .* round away in it; use/,
      ],
      [
        { lower: { solver: 'adam' } },
        /^lower solver adam cannot be had with the first-order form of term \(b\), which dtype bfloat16 takes: .* plain gradient steps/,
      ],
      [{ lowerWarmStart: true }, /^lower warm start cannot be had .* a warm start begins elsewhere; use no lower warm/],
    ] as const)
      expect(await message(spo(model, pairs, options))).toMatch(text);
    const possible = { lowerWarmStart: true, penaltyForm: 'difference', maxSteps: 2 } as const;
    expect(await steps(spo(model, pairs, possible))).toHaveLength(2);
  });

  it('names an op whose gradients cannot be kept apart by sequence', async () => {
    using model = await loadModel(path, { lora });
    const original = model.logProbs.bind(model);
    vi.spyOn(model, 'logProbs').mockImplementation((...args) => {
      const out = original(...args);
      return { ...out, logProbs: tanh(out.logProbs) };
    });
    expect(await message(spo(model, pairs, { gamma: 0.1, maxSteps: 1 }))).toMatch(
      /^\[tanh\] has no rule that keeps the gradients of sequences apart; gamma 0\.1 takes second derivatives .*: use gamma 0, or/,
    );
    expect(await steps(spo(model, pairs, { gamma: 0, maxSteps: 1 }))).toHaveLength(1);
  });

  it('refuses what the command refuses, in the spelling of its options', async () => {
    using model = await loadModel(path, { lora });
    using bare = await loadModel(path);
    expect(await message(dpo(model, pairs, { beta: 0 }))).toBe('beta: expected a number above 0, found 0');
    expect(await message(spo(model, pairs, { normOver: 'adapters' }))).toMatch(/^normOver has no effect with gamma: 0/);
    expect(await message(spo(model, pairs, { lower: { lr: -1 } }))).toMatch(
      /^lowerLearningRate: expected a number above 0/,
    );
    expect(await message(dpo(model, pairs, { betta: 1 } as never))).toBe(
      'betta is no option of keelgrad dpo; did you mean beta?',
    );
    for (const [options, text] of [
      [{ model: path }, /^model is an option of the command alone, not of dpo\(\); pass the loaded model/],
      [{ output: 'x' }, /^output is .* save with saveModel/],
      [{ 'lora-r': 8 }, /^loraR is .* loadModel\(folder, { lora: { r } }\)/],
      [{ adapter: 'x' }, /^adapter is .* loadModel\(folder, { adapter }\)/],
      [{ dtype: 'float64' }, /^dtype is /],
      [{ threads: 1 }, /^threads is .* call setThreads/],
      [{ config: 'x' }, /^config is no option/],
    ] as const)
      expect(await message(dpo(model, pairs, options as never))).toMatch(text);
    expect(await message(dpo(model, []))).toMatch(/no record is left/);
    expect(await message(dpo(model, [{ prompt_ids: [1], chosen_ids: [99], rejected_ids: [2] }]))).toMatch(
      /records:1: token id 99/,
    );
    expect(await message(spo(bare, pairs))).toMatch(
      /no adapters to train, and spo always trains both levels.*; load it with/,
    );
    expect(await message(dpo(bare, pairs, { train: 'lora' }))).toMatch(/no adapters to train/);
  });
});
