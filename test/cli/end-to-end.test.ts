// The command line over real work: folders in, folders out, on models made on the spot. Bad input leaves nothing behind.
import { EventEmitter } from 'node:events';
import { existsSync, mkdirSync, readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { type CliIo, defaultWork, type Work } from '../../src/cli/io.js';
import { main } from '../../src/cli/program.js';
import { readSafetensorsHeader } from '../../src/io/safetensors.js';
import { memory } from '../../src/tensor/storage.js';
import type { ScoreRecord } from '../../src/train/hooks.js';
import { packageVersion } from '../../src/train/run-folder.js';
import { makeModelFolder } from '../fixtures/make.js';
import { writeToyTokenizer } from '../io/toy-tokenizer.js';
import { fixtureCompletions, fixturePairs, readMetrics, readRun, temporaryFolder } from '../train/support.js';

const folder = temporaryFolder();
let model: string;
let textModel: string;
let pairs: string;
let completions: string;

beforeAll(async () => {
  model = await makeModelFolder(folder.path('llama'), 'llama');
  textModel = await makeModelFolder(folder.path('qwen2'), 'qwen2');
  await writeToyTokenizer(textModel);
  pairs = folder.write('pairs.json', fixturePairs(6));
  completions = folder.write('completions.json', fixtureCompletions(6));
});

interface Ended {
  readonly code: number;
  readonly out: string;
  readonly err: string;
}

/** Runs one command line; `work` may wrap what stands behind it. */
async function keelgrad(
  argv: readonly string[],
  work: Work = defaultWork,
  signals = new EventEmitter(),
): Promise<Ended> {
  let [out, err] = ['', ''];
  const io: CliIo = {
    stdout: { write: (text) => (out += text), columns: 100 },
    stderr: { write: (text) => (err += text) },
    env: {},
    signals,
    exit: (code) => {
      throw new Error(`exited with ${code}`);
    },
  };
  const start = memory().storages;
  const code = await main(argv, io, work);
  expect(signals.eventNames()).toEqual([]);
  expect(memory().storages).toBe(start);
  return { code, out, err };
}

let outputs = 0;
const newOutput = (): string => folder.path('runs', `${outputs++}`);

/** A training command that must succeed; returns its output folder. */
async function trained(method: string, ...argv: string[]): Promise<{ output: string } & Ended> {
  const output = newOutput();
  const ended = await keelgrad([method, '--output', output, ...argv]);
  expect(ended.err.split('\n').filter((line) => line.startsWith('error'))).toEqual([]);
  expect(ended.code).toBe(0);
  return { output, ...ended };
}

async function scored(...argv: string[]): Promise<ScoreRecord[]> {
  const { code, out } = await keelgrad(['score', '--json', ...argv]);
  expect(code).toBe(0);
  return out
    .split('\n')
    .slice(0, -1)
    .map((line) => JSON.parse(line));
}

const json = (...parts: string[]) => JSON.parse(readFileSync(join(...parts), 'utf8'));
const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

const everyStep = ['step', 'loss', 'grad_norm', 'epoch', 'num_tokens', 'entropy', 'mean_token_accuracy'];
const machine = ['tokens_per_second', 'peak_memory'];
const ofPairs = [
  ...['rewards/chosen', 'rewards/rejected', 'rewards/accuracies', 'rewards/margins'],
  ...['logps/chosen', 'logps/rejected', 'logps/chosen_delta', 'logps/rejected_delta'],
  ...['logits/chosen', 'logits/rejected'],
];
const ofLevels = ['grad_norm/backbone', 'grad_norm/adapters', 'learning_rate/backbone', 'learning_rate/adapters'];
const ofSpo = [
  'spo/first_order',
  'spo/lambda',
  'spo/share_a',
  'spo/share_b',
  'spo/share_d',
  'spo/term_a',
  'spo/term_b',
  'spo/term_b_rounding',
  'spo/term_d',
  'spo/dpo',
  'spo/sft',
  'spo/sft_star',
  'spo/sft_gap',
  'spo/regularizer',
];
const ofSequences = ['grad_cosine', 'grad_norm/chosen', 'grad_norm/rejected', 'spo/active_fraction'];
const ofBackbone = ['spo/share_c', 'spo/term_c'];
const ofRegularizer = ['spo/share_e_phi', 'spo/term_e_phi'];

const names = (...lists: string[][]): string[] => lists.flat().sort();

describe('what a run leaves', () => {
  const quick = ['--max-steps', '2', '--batch-size', '2', '--lora-r', '4'];

  it.each([
    ['sft', [], ['adapter'], names(everyStep, machine, ['learning_rate'])],
    ['dpo', [], ['adapter'], names(everyStep, machine, ['learning_rate'], ofPairs)],
    ['dpo', ['--train', 'both'], ['adapter', 'model'], names(everyStep, machine, ['learning_rate'], ofPairs, ofLevels)],
    [
      'spo',
      [],
      ['adapter', 'model'],
      names(everyStep, machine, ['learning_rate'], ofPairs, ofLevels, ofSpo, ofBackbone, ofSequences),
    ],
    [
      'spo',
      ['--gamma', '0.1', '--learning-rate-adapters', '1e-4'],
      ['adapter', 'model'],
      names(everyStep, machine, ofPairs, ofLevels, ofSpo, ofSequences, ofRegularizer),
    ],
  ] as const)('%s %j', async (method, more, folders, metricNames) => {
    const data = method === 'sft' ? completions : pairs;
    const { output, out } = await trained(method, '--model', model, '--data', data, ...quick, ...more);
    expect(readdirSync(output).sort()).toEqual([...folders, 'metrics.jsonl', 'run.json'].sort());
    const metrics = readMetrics(output);
    expect(metrics.map(({ step }) => step)).toEqual([1, 2]);
    for (const step of metrics) expect(Object.keys(step).sort()).toEqual(metricNames);
    for (const step of metrics) expect(Object.values(step).every(Number.isFinite)).toBe(true);
    expect(out).toContain(`${method} finished at step 2`);
    expect(out).toContain(`saved in ${output}`);
    const moved = (folders as readonly string[]).includes('model');
    const adapter = json(output, 'adapter', 'adapter_config.json');
    expect(adapter).toMatchObject({
      peft_type: 'LORA',
      task_type: 'CAUSAL_LM',
      r: 4,
      lora_alpha: 32,
      lora_dropout: method === 'sft' ? 0.05 : 0,
      base_model_name_or_path: moved ? '../model' : model,
    });
    const weights = await readSafetensorsHeader(join(output, 'adapter', 'adapter_model.safetensors'));
    expect(weights.metadata).toEqual({ format: 'pt' });
    expect(weights.tensors.size).toBe(2 * 7 * 2);
    expect([...weights.tensors.values()].every(({ dtype }) => dtype === 'F32')).toBe(true);
    if (moved) expect(json(output, 'model', 'config.json')).toMatchObject({ model_type: 'llama', hidden_size: 24 });
  });

  it('full training leaves a model and no adapter', async () => {
    const { output } = await trained(
      'sft',
      '--model',
      model,
      '--data',
      completions,
      '--train',
      'full',
      '--max-steps',
      '1',
    );
    expect(readdirSync(output).sort()).toEqual(['metrics.jsonl', 'model', 'run.json']);
    expect(readdirSync(join(output, 'model')).sort()).toEqual(['config.json', 'model.safetensors']);
  });

  it('run.json says what was resolved, from the command line and a file', async () => {
    const config = folder.write('config.yaml', 'beta: 0.3\nmax-steps: 5\nlambda: 2\nlora-r: 4\n');
    const { output } = await trained(
      'spo',
      '--model',
      model,
      '--data',
      pairs,
      '--config',
      config,
      '--max-steps',
      '2',
      '--seed',
      '9',
    );
    const run = readRun(output);
    expect(run).toMatchObject({ method: 'spo', status: 'completed', steps: 2, total_steps: 2 });
    expect(run.versions).toMatchObject({ keelgrad: packageVersion(), node: process.versions.node });
    expect(run.options).toMatchObject({
      ...{ model, data: pairs, output, beta: 0.3, lambda: 2, gamma: 0, seed: 9, 'max-steps': 2, 'lora-r': 4 },
      ...{ 'lower-steps': 1, 'lower-learning-rate': 2e-5, 'learning-rate-backbone': 1e-5, 'sft-reduction': 'sum' },
      ...{ dtype: 'float32', 'batch-size': 4, 'max-grad-norm': 1, optimizer: 'adamw', 'save-dtype': 'float32' },
    });
    // What had no part is not there: no epochs beside max-steps, no momentum of adamw, no norms without gamma.
    for (const key of ['epochs', 'momentum', 'norm-over', 'config', 'lora-dropout'])
      expect(run.options).not.toHaveProperty(key);
    expect(run.data).toMatchObject({ path: pairs, sha256: expect.stringMatching(/^[0-9a-f]{64}$/) });
    expect(Object.keys(run.model.files)).toEqual(['config.json', 'model.safetensors']);
    expect(Date.parse(run.ended_at)).toBeGreaterThanOrEqual(Date.parse(run.started_at));
  });

  it('weights are saved in the master dtype, or the one that is asked for', async () => {
    const dtypes = async (...argv: string[]): Promise<(string | undefined)[]> => {
      const { output } = await trained('spo', '--model', model, '--data', pairs, ...quick, ...argv);
      const files = [join(output, 'model', 'model.safetensors'), join(output, 'adapter', 'adapter_model.safetensors')];
      const headers = await Promise.all(files.map(readSafetensorsHeader));
      return headers.map(({ tensors }) => tensors.values().next().value?.dtype);
    };
    expect(await dtypes()).toEqual(['F32', 'F32']);
    expect(await dtypes('--dtype', 'float64')).toEqual(['F64', 'F64']);
    expect(await dtypes('--dtype', 'bfloat16')).toEqual(['F32', 'F32']);
    expect(await dtypes('--save-dtype', 'bfloat16')).toEqual(['BF16', 'BF16']);
  });

  it('--overwrite replaces the earlier run and nothing else', async () => {
    const { output } = await trained('spo', '--model', model, '--data', pairs, ...quick);
    writeFileSync(join(output, 'notes.txt'), 'mine');
    const again = ['--model', model, '--data', completions, '--output', output, ...quick];
    expect((await keelgrad(['sft', ...again])).code).toBe(1);
    expect(existsSync(join(output, 'model'))).toBe(true);
    expect((await keelgrad(['sft', ...again, '--overwrite'])).code).toBe(0);
    expect(readdirSync(output).sort()).toEqual(['adapter', 'metrics.jsonl', 'notes.txt', 'run.json']);
    expect(readRun(output)).toMatchObject({ method: 'sft', status: 'completed' });
  });
});

describe('text records', () => {
  const rows = [
    { prompt: 'ab:', chosen: ' ab c', rejected: ' c' },
    { prompt: 'c:', chosen: ' a', rejected: ' b b' },
    {
      prompt: [{ role: 'user', content: 'ab' }],
      chosen: [{ role: 'assistant', content: 'c' }],
      rejected: [{ role: 'assistant', content: 'b' }],
    },
  ];
  const lines = (values: readonly object[]): string => values.map((value) => `${JSON.stringify(value)}\n`).join('');

  it('train and score through the tokenizer, which goes along with the model', async () => {
    const data = folder.write('text.jsonl', lines(rows));
    const { output } = await trained('spo', '--model', textModel, '--data', data, '--max-steps', '2');
    expect(readdirSync(join(output, 'model')).sort()).toEqual([
      'config.json',
      'model.safetensors',
      'tokenizer.json',
      'tokenizer_config.json',
    ]);
    const found = await scored('--model', join(output, 'model'), '--adapter', join(output, 'adapter'), '--data', data);
    // " ab" is [" a", "b"]; both answers end in <eos>, the chat's in <eos> and a newline.
    expect(found.map((r) => [r.chosen_tokens, r.rejected_tokens])).toEqual([
      [5, 3],
      [2, 5],
      [3, 3],
    ]);
  });

  it('sft takes text, prompt with completion, and messages', async () => {
    const records = [
      { text: 'ab: c' },
      { prompt: 'ab:', completion: ' c' },
      {
        messages: [
          { role: 'user', content: 'a' },
          { role: 'assistant', content: 'b' },
        ],
      },
    ];
    const data = folder.write('sft.jsonl', lines(records));
    const { output } = await trained('sft', '--model', textModel, '--data', data, '--batch-size', '3', '--epochs', '1');
    expect(readMetrics(output)).toHaveLength(1);
  });

  it('need a tokenizer', async () => {
    const data = folder.write('text.jsonl', lines(rows));
    const output = newOutput();
    const { code, err } = await keelgrad(['dpo', '--model', model, '--data', data, '--output', output]);
    expect(code).toBe(1);
    expect(err).toMatch(/^error: .*tokenizer.*\n$/);
    expect(existsSync(output)).toBe(false);
  });
});

describe('score', () => {
  const steady = ['--batch-size', '6', '--no-shuffle', '--lr-schedule', 'constant', '--learning-rate', '1e-3'];

  it.each([
    ['dpo', ['--train', 'lora', '--lora-r', '4'], (o: string) => ['--model', model, '--adapter', join(o, 'adapter')]],
    ['dpo', ['--train', 'full'], (o: string) => ['--model', join(o, 'model')]],
    [
      'dpo',
      ['--train', 'both', '--lora-r', '4'],
      (o: string) => ['--model', join(o, 'model'), '--adapter', join(o, 'adapter')],
    ],
    ['spo', ['--lora-r', '4'], (o: string) => ['--model', join(o, 'model'), '--adapter', join(o, 'adapter')]],
  ] as const)('of what %s %j saved is what its next step measures', async (method, more, saved) => {
    const options = ['--model', model, '--data', pairs, ...steady, ...more];
    const two = await trained(method, ...options, '--max-steps', '2');
    const three = await trained(method, ...options, '--max-steps', '3');
    const metrics = readMetrics(three.output);
    for (const [step, from] of [
      [1, ['--model', model]],
      [3, saved(two.output)],
    ] as const) {
      const records = await scored(...from, '--data', pairs, '--batch-size', '4');
      expect(mean(records.map((r) => r.chosen_logps))).toBe(metrics[step - 1]['logps/chosen']);
      expect(mean(records.map((r) => r.rejected_logps))).toBe(metrics[step - 1]['logps/rejected']);
    }
  });

  it('an adapter carries its base model along with its options', async () => {
    const first = await trained(
      'sft',
      '--model',
      model,
      '--data',
      completions,
      '--max-steps',
      '2',
      '--lora-r',
      '3',
      '--rslora',
    );
    const adapter = join(first.output, 'adapter');
    const next = await trained(
      'dpo',
      '--model',
      model,
      '--adapter',
      adapter,
      '--data',
      pairs,
      '--max-steps',
      '1',
      '--learning-rate',
      '0',
    );
    expect(json(next.output, 'adapter', 'adapter_config.json')).toMatchObject({
      r: 3,
      use_rslora: true,
      base_model_name_or_path: model,
    });
    expect(readFileSync(join(next.output, 'adapter', 'adapter_model.safetensors'))).toEqual(
      readFileSync(join(adapter, 'adapter_model.safetensors')),
    );
    expect(readRun(next.output).adapter.path).toBe(adapter);
    expect(readRun(next.output).options).not.toHaveProperty('lora-r');
  });

  it('--json prints one object a record, in order, by position in the file', async () => {
    const rows = fixturePairs(4) as { prompt_ids: number[] }[];
    rows[1] = { ...rows[1], prompt_ids: Array(12).fill(5) };
    const data = folder.write('long.json', rows);
    const { code, out, err } = await keelgrad([
      'score',
      '--model',
      model,
      '--data',
      data,
      '--json',
      '--max-length',
      '12',
    ]);
    expect(code).toBe(0);
    const records: ScoreRecord[] = out
      .split('\n')
      .slice(0, -1)
      .map((line) => JSON.parse(line));
    expect(records.map(({ index }) => index)).toEqual([0, 2, 3]);
    for (const r of records) {
      expect(Object.keys(r)).toEqual([
        'index',
        'chosen_logps',
        'rejected_logps',
        'chosen_tokens',
        'rejected_tokens',
        'margin',
      ]);
      expect(r.margin).toBe(r.chosen_logps - r.rejected_logps);
    }
    expect(err).toContain('dropped 1 records whose prompt alone fills max length 12');
    expect(await scored('--model', model, '--data', data)).toHaveLength(4);
  });

  it('prints a table without --json', async () => {
    const { code, out } = await keelgrad(['score', '--model', model, '--data', pairs]);
    expect(code).toBe(0);
    expect(out).toMatch(/^ +record +chosen +tokens/);
    expect(out.split('\n').filter((line) => /^ +\d+ /.test(line))).toHaveLength(6);
    expect(out).toMatch(/accuracy +\d/);
  });
});

describe('steps', () => {
  it('--max-steps takes exactly so many, cycling over the data', async () => {
    const { output } = await trained(
      'sft',
      '--model',
      model,
      '--data',
      completions,
      '--max-steps',
      '7',
      '--batch-size',
      '4',
    );
    const metrics = readMetrics(output);
    expect(metrics).toHaveLength(7);
    expect(metrics.at(-1)!.epoch).toBe(3.5);
  });

  it('only the records that are visited get a reference', async () => {
    const phases: number[] = [];
    const work: Work = {
      ...defaultWork,
      runTraining: (options, hooks) =>
        defaultWork.runTraining(options, { ...hooks, onPhase: (_, done, total) => phases.push(done, total) }),
    };
    const output = newOutput();
    await keelgrad(
      ['dpo', '--model', model, '--data', pairs, '--output', output, '--max-steps', '1', '--batch-size', '2'],
      work,
    );
    expect(phases).toEqual([2, 2]);
  });

  it('Ctrl-C ends after the current step with everything saved', async () => {
    const signals = new EventEmitter();
    const work: Work = {
      ...defaultWork,
      runTraining: (options, hooks) =>
        defaultWork.runTraining(options, {
          ...hooks,
          onStep: (step) => {
            hooks.onStep?.(step);
            if (step.step === 2) signals.emit('SIGINT');
          },
        }),
    };
    const output = newOutput();
    const argv = [
      'spo',
      '--model',
      model,
      '--data',
      pairs,
      '--output',
      output,
      '--max-steps',
      '50',
      '--batch-size',
      '1',
    ];
    const { code, out, err } = await keelgrad(argv, work, signals);
    expect(code).toBe(130);
    expect(err).toContain('stopping after the current step');
    expect(out).toMatch(/spo stopped after step [23]/);
    const run = readRun(output);
    expect(run).toMatchObject({ status: 'interrupted', total_steps: 50 });
    expect(readMetrics(output)).toHaveLength(run.steps);
    expect(run.steps).toBeLessThanOrEqual(3);
    expect(
      await scored('--model', join(output, 'model'), '--adapter', join(output, 'adapter'), '--data', pairs),
    ).toHaveLength(6);
  });

  it('long prompts are dropped and counted, responses cut', async () => {
    const rows = fixturePairs(4) as { prompt_ids: number[]; chosen_ids: number[] }[];
    rows[2] = { ...rows[2], prompt_ids: Array(9).fill(5) };
    rows[3] = { ...rows[3], chosen_ids: Array(20).fill(6) };
    const data = folder.write('mixed.json', rows);
    const { output, err } = await trained(
      'dpo',
      '--model',
      model,
      '--data',
      data,
      '--max-length',
      '9',
      '--epochs',
      '1',
      '--batch-size',
      '1',
    );
    expect(err).toContain('dropped 1 records whose prompt alone fills max length 9');
    expect(err).toContain('cut 1 records to max length 9');
    expect(readMetrics(output)).toHaveLength(3);
  });

  it('a loss that is not finite is an error with step and records; what was good is saved', async () => {
    const rows = fixturePairs(3).map((pair, i) => ({
      ...pair,
      ref_chosen_logps: i === 1 ? 1e300 : -3,
      ref_rejected_logps: -3,
    }));
    const output = newOutput();
    const data = folder.write('infinite.json', rows);
    const { code, err } = await keelgrad([
      'dpo',
      '--model',
      model,
      '--data',
      data,
      '--output',
      output,
      '--batch-size',
      '1',
      '--no-shuffle',
    ]);
    expect(code).toBe(1);
    expect(err).toMatch(/^error: step 2: loss is Infinity \(records 1\); .*\n/m);
    expect(err).not.toContain('    at ');
    expect(readdirSync(output).sort()).toEqual(['adapter', 'metrics.jsonl', 'run.json']);
    expect(readRun(output)).toMatchObject({ status: 'failed', steps: 1 });
  });
});

describe('bad input', () => {
  const first = fixturePairs(1)[0] as Record<string, unknown>;
  const pairFile = (...rows: object[]): string =>
    folder.write('bad.jsonl', rows.map((row) => `${JSON.stringify(row)}\n`).join(''));

  async function copy(name: string, change: (path: string) => unknown): Promise<string> {
    const path = await makeModelFolder(folder.path(name), 'llama');
    await change(path);
    return path;
  }

  const cases: readonly (readonly [string, () => string[] | Promise<string[]>, RegExp])[] = [
    ['a missing model folder', () => ['--model', folder.path('nowhere')], /nowhere.*(no such file|cannot be read)/],
    [
      'a folder without weights',
      async () => {
        mkdirSync(folder.path('empty'), { recursive: true });
        writeFileSync(folder.path('empty', 'config.json'), readFileSync(join(model, 'config.json')));
        return ['--model', folder.path('empty')];
      },
      /empty.*safetensors/,
    ],
    [
      'truncated weights',
      async () => ['--model', await copy('short', (p) => truncateSync(join(p, 'model.safetensors'), 9000))],
      /model\.safetensors/,
    ],
    [
      'an unknown architecture',
      async () => {
        const change = (p: string) =>
          writeFileSync(
            join(p, 'config.json'),
            JSON.stringify({ ...json(p, 'config.json'), model_type: 'mamba', architectures: ['MambaForCausalLM'] }),
          );
        return ['--model', await copy('mamba', change)];
      },
      /config\.json.*(mamba|Mamba).*(llama|qwen2)/i,
    ],
    [
      'a missing data file',
      () => ['--data', folder.path('nowhere.jsonl')],
      /nowhere\.jsonl: cannot be read: no such file/,
    ],
    [
      'a broken line',
      () => ['--data', folder.write('broken.jsonl', `${JSON.stringify(first)}\n{"prompt_ids": [1,\n`)],
      /broken\.jsonl:2: not valid JSON/,
    ],
    ['an empty response', () => ['--data', pairFile(first, { ...first, chosen_ids: [] })], /bad\.jsonl:2: .*chosen.*/],
    ['a missing field', () => ['--data', pairFile({ prompt_ids: [1], chosen_ids: [2] })], /bad\.jsonl:1: .*rejected/],
    [
      'ids beyond the vocabulary',
      () => ['--data', pairFile(first, { ...first, rejected_ids: [61] })],
      /bad\.jsonl:2: token id 61 is outside of the model's vocabulary of 61/,
    ],
    [
      'half a reference',
      () => ['--data', pairFile({ ...first, ref_chosen_logps: -1 })],
      /bad\.jsonl:1: .*ref_(chosen|rejected)_logps/,
    ],
    [
      'only prompts that are too long',
      () => ['--max-length', '2', '--data', pairFile({ ...first, prompt_ids: [4, 5, 6] })],
      /no record is left to train on: dropped 1 records/,
    ],
    [
      'an empty file',
      () => ['--data', folder.write('empty.jsonl', '\n')],
      /empty\.jsonl: expected at least one record, found none/,
    ],
    [
      'a file that is none of JSON',
      () => ['--data', folder.write('text.txt', 'hello')],
      /text\.txt: expected JSON lines or a JSON array/,
    ],
    ['a beta of 0', () => ['--beta', '0'], /--beta: expected a number above 0, found 0/],
    ['a negative lambda', () => ['--lambda', '-1'], /--lambda: expected a number of at least 0, found -1/],
    ['a batch of nothing', () => ['--batch-size', '0'], /--batch-size: expected a whole number of at least 1, found 0/],
    ['a rank that is none', () => ['--lora-r', '2.5'], /--lora-r: expected a whole number of at least 1, found 2.5/],
    [
      'a target that the model has not',
      () => ['--lora-targets', 'model.layers.7.self_attn.q_proj'],
      /--lora-targets.*model\.layers\.7/,
    ],
    [
      'an option of another command',
      () => ['--sft-loss', 'dft'],
      /--sft-loss is an option of keelgrad sft, not of keelgrad spo/,
    ],
    ['an option that would do nothing', () => ['--norm-over', 'adapters'], /--norm-over has no effect with --gamma 0/],
    ['a missing adapter', () => ['--adapter', folder.path('nowhere')], /nowhere/],
    ['a GPU that is not there', () => ['--device', 'cuda'], /--device cuda: not available/],
    [
      'a missing config file',
      () => ['--config', folder.path('nowhere.yaml')],
      /--config .*nowhere\.yaml: cannot be read \(no such file\)/,
    ],
    [
      'a config file with an unknown key',
      () => ['--config', folder.write('typo.yaml', 'betta: 1\n')],
      /typo\.yaml: "betta" is no option of keelgrad spo; did you mean "beta"\?/,
    ],
  ];

  it.each(cases)('%s: one message, exit code 1, nothing written', async (_, argv, message) => {
    if (message.source.includes('cuda') && (await defaultWork.runtimeInfo()).cuda.available) return;
    const output = newOutput();
    const given = await argv();
    const defaults = [
      ['--model', model],
      ['--data', pairs],
    ]
      .filter(([flag]) => !given.includes(flag))
      .flat();
    const { code, out, err } = await keelgrad(['spo', '--output', output, ...defaults, ...given]);
    expect(err).toMatch(/^error: [^\n]+\n$/);
    expect(err).toMatch(message);
    expect([code, out]).toEqual([1, '']);
    expect(existsSync(output)).toBe(false);
  });

  it('a folder in use is refused, and stays as it is', async () => {
    const output = newOutput();
    mkdirSync(output, { recursive: true });
    writeFileSync(join(output, 'notes.txt'), 'mine');
    const { code, err } = await keelgrad(['spo', '--model', model, '--data', pairs, '--output', output]);
    expect(code).toBe(1);
    expect(err).toMatch(/expected a new or empty folder, found notes\.txt; .*--overwrite/);
    expect(readdirSync(output)).toEqual(['notes.txt']);
  });

  it('the model may not be replaced by what it becomes', async () => {
    const { output } = await trained('spo', '--model', model, '--data', pairs, '--max-steps', '1');
    const own = ['--model', join(output, 'model'), '--data', pairs, '--output', output, '--overwrite'];
    const { code, err } = await keelgrad(['spo', ...own]);
    expect(code).toBe(1);
    expect(err).toMatch(/is read by this run and would be replaced by it/);
    expect(existsSync(join(output, 'model', 'model.safetensors'))).toBe(true);
  });

  it('weights that are NaN stop at the first step', async () => {
    const broken = await copy('nan', (p) => {
      const bytes = readFileSync(join(p, 'model.safetensors'));
      bytes.writeFloatLE(Number.NaN, bytes.length - 4);
      writeFileSync(join(p, 'model.safetensors'), bytes);
    });
    const output = newOutput();
    const { code, err } = await keelgrad(['spo', '--model', broken, '--data', pairs, '--output', output]);
    expect(code).toBe(1);
    expect(err).toMatch(/^error: step 1: loss is NaN \(records [\d, ]+\)/m);
    expect(readMetrics(output)).toEqual([]);
  });
});
