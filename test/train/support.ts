// What the tests of training share: runs from files to files, recorded trajectories, distances between sets of tensors.
// Contains no training of its own: every run goes through runTraining.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect } from 'vitest';
import { KeelgradError } from '../../src/errors.js';
import type { Metrics, ScoreRecord, ScoreSummary, TrainHooks, TrainResult } from '../../src/train/hooks.js';
import { type ResolvedTrainOptions, resolveOptions, type TrainMethod } from '../../src/train/options.js';
import { runTraining } from '../../src/train/run.js';
import { scoreFile } from '../../src/train/score.js';
import { readRecorded } from '../models/support.js';
import { readSharedJson, sharedPath } from '../shared.js';

/** A folder for the tests of one file, removed after them. */
export function temporaryFolder(): {
  path: (...parts: string[]) => string;
  write: (name: string, value: unknown) => string;
} {
  let root = '';
  beforeAll(() => {
    root = mkdtempSync(join(tmpdir(), 'keelgrad-train-'));
  });
  afterAll(() => rmSync(root, { recursive: true, force: true }));
  const path = (...parts: string[]): string => join(root, ...parts);
  return {
    path,
    write: (name, value) => {
      writeFileSync(path(name), typeof value === 'string' ? value : JSON.stringify(value));
      return path(name);
    },
  };
}

export type Given = Readonly<Record<string, unknown>>;

export interface Run {
  readonly result: TrainResult;
  /** The lines of metrics.jsonl. */
  readonly metrics: Metrics[];
  // biome-ignore lint/suspicious/noExplicitAny: run.json
  readonly record: any;
  readonly messages: string[];
}

/** The lines of a run's metrics.jsonl. */
export const readMetrics = (output: string): Metrics[] =>
  readFileSync(join(output, 'metrics.jsonl'), 'utf8')
    .split('\n')
    .slice(0, -1)
    .map((line) => JSON.parse(line));

// biome-ignore lint/suspicious/noExplicitAny: run.json
export const readRun = (output: string): any => JSON.parse(readFileSync(join(output, 'run.json'), 'utf8'));

let outputs = 0;

/** One training run into a folder of its own (or the given one), options as in a config file. */
export async function train(method: TrainMethod, given: Given, hooks: TrainHooks = {}): Promise<Run> {
  const output = (given.output as string | undefined) ?? `${given.data}.out${outputs++}`;
  const options = resolveOptions(method, { ...given, output }) as ResolvedTrainOptions;
  const messages: string[] = [];
  const result = await runTraining(options, { onMessage: (text) => messages.push(text), ...hooks });
  return { result, metrics: readMetrics(output), record: readRun(output), messages };
}

/** `keelgrad score` without its printing. */
export async function score(
  given: Given,
  signal?: AbortSignal,
): Promise<{ records: ScoreRecord[]; summary: ScoreSummary }> {
  const records: ScoreRecord[] = [];
  const options = resolveOptions('score', given);
  const summary = await scoreFile(options, { onRecord: (record) => records.push(record), signal });
  return { records, summary };
}

/** Metrics without those that time and memory decide. */
export const stable = (metrics: readonly Metrics[]): Metrics[] =>
  metrics.map(({ tokens_per_second: _, peak_memory: __, ...rest }) => rest);

/** The message of the KeelgradError that ends a run. */
export async function refusal(work: Promise<unknown>): Promise<string> {
  const error = await work.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(KeelgradError);
  return (error as Error).message;
}

/** Named tensors on the host. */
export type Tensors = ReadonlyMap<string, Float64Array>;

/** The tensors of a safetensors file, those under `prefix` with it taken off. */
export async function readTensors(path: string, prefix = ''): Promise<Tensors> {
  const found = new Map<string, Float64Array>();
  for (const [name, { values }] of await readRecorded(path))
    if (name.startsWith(prefix)) found.set(name.slice(prefix.length), values);
  return found;
}

export const savedModel = (output: string): Promise<Tensors> => readTensors(join(output, 'model', 'model.safetensors'));
export const savedAdapter = (output: string): Promise<Tensors> =>
  readTensors(join(output, 'adapter', 'adapter_model.safetensors'));

/** a - b, name by name; both must have the names of b. */
export function difference(a: Tensors, b: Tensors): Tensors {
  expect([...a.keys()].sort()).toEqual([...b.keys()].sort());
  return new Map([...b].map(([name, values]) => [name, values.map((x, i) => a.get(name)![i] - x)]));
}

/** The joint 2-norm of some tensors. */
export function norm(tensors: Tensors): number {
  let total = 0;
  for (const values of tensors.values()) for (const x of values) total += x * x;
  return Math.sqrt(total);
}

/** ‖found - expected‖ / ‖expected - start‖: how far off a run ended, by how far it went. */
export const errorOfMove = (found: Tensors, expected: Tensors, start: Tensors): number =>
  norm(difference(found, expected)) / norm(difference(expected, start));

/** ‖found - expected‖ / ‖expected‖ over the names of `expected`; NaN where a name is missing. */
export function relativeError(found: Tensors, expected: Tensors): number {
  const part = new Map([...expected.keys()].map((name) => [name, found.get(name) ?? new Float64Array([Number.NaN])]));
  return norm(difference(part, expected)) / norm(expected);
}

export const GOLDEN_TRAINING = 'golden/training';
export const golden = (...parts: string[]): string => sharedPath(GOLDEN_TRAINING, ...parts);

/** One recorded optimizer step: numbers under the names of the metrics, and details. */
export type RecordedStep = Readonly<Record<string, unknown>>;

/** Everything a recorded step logs that is a metric. */
const notMetrics = ['micro_batches', 'num_items_in_batch'];

/** How far found and recorded metrics are apart, by name: the largest over the steps, relative to max(1, |recorded|). */
export function metricErrors(found: readonly Metrics[], steps: readonly RecordedStep[]): Record<string, number> {
  expect(found).toHaveLength(steps.length);
  const worst: Record<string, number> = {};
  steps.forEach((step, i) => {
    for (const [name, expected] of Object.entries(step)) {
      if (notMetrics.includes(name)) continue;
      expect(found[i], `step ${i + 1}`).toHaveProperty([name]);
      const error = Math.abs(found[i][name] - (expected as number)) / Math.max(1, Math.abs(expected as number));
      worst[name] = Math.max(worst[name] ?? 0, Number.isNaN(error) ? Number.POSITIVE_INFINITY : error);
    }
  });
  return worst;
}

// biome-ignore lint/suspicious/noExplicitAny: a recorded configuration
export const readConfig = (name: string): any => readSharedJson(GOLDEN_TRAINING, name, 'config.json');

// biome-ignore lint/suspicious/noExplicitAny: a recorded configuration
function lossOptions(config: any): Given {
  if (config.trainer === 'SFTTrainer') return {};
  return {
    beta: config.beta,
    'loss-type': config.loss_type,
    ...(config.loss_weights && { 'loss-weights': config.loss_weights }),
    ...(config.label_smoothing > 0 && { 'label-smoothing': config.label_smoothing }),
  };
}

/** Our options for a recorded trajectory; `data` is a file to be written with its rows. */
export function optionsFor(name: string, data: string): Given {
  const config = readConfig(name);
  const warmup = config.warmup_steps_given;
  return {
    model: golden('model'),
    data,
    ...(config.adapter_init ? { train: 'lora', adapter: golden(name, config.adapter_init) } : { train: 'full' }),
    ...lossOptions(config),
    'learning-rate': config.learning_rate,
    'weight-decay': config.weight_decay,
    'max-grad-norm': config.max_grad_norm,
    'lr-schedule': config.lr_scheduler_type,
    ...(warmup < 1 ? { 'warmup-ratio': warmup } : { 'warmup-steps': warmup }),
    'batch-size': config.per_device_train_batch_size,
    'gradient-accumulation-steps': config.gradient_accumulation_steps,
    ...(config.max_steps ? { 'max-steps': config.max_steps } : { epochs: config.num_train_epochs }),
    'max-length': config.max_length,
    'no-shuffle': true,
    dtype: 'float64',
  };
}

/** The rows of a recorded token-level trajectory. */
export function rowsFor(name: string): object[] {
  const config = readConfig(name);
  const file = config.trainer === 'SFTTrainer' ? 'data_sft.json' : 'data_preference.json';
  return readSharedJson(GOLDEN_TRAINING, file).slice(...config.rows);
}

interface Summary {
  readonly shape: readonly number[];
  readonly sum: number;
  readonly l2: number;
  readonly first: number;
  readonly last: number;
}

/** Compares tensors with what a summary says of them; its names may carry PEFT's adapter name. */
export function expectSummary(found: Tensors, summary: Readonly<Record<string, Summary>>, tolerance: number): void {
  const named = Object.entries(summary).map(([name, s]) => [name.replace('.default.', '.'), s] as const);
  expect([...found.keys()].sort()).toEqual(named.map(([name]) => name).sort());
  for (const [name, s] of named) {
    const values = found.get(name)!;
    const scale = tolerance * Math.max(s.l2, 1e-3);
    expect(values.length).toBe(s.shape.reduce((n, m) => n * m, 1));
    expect(Math.abs(norm(new Map([[name, values]])) - s.l2), `${name} l2`).toBeLessThan(scale);
    expect(Math.abs(values.reduce((a, b) => a + b, 0) - s.sum), `${name} sum`).toBeLessThan(
      scale * Math.sqrt(values.length),
    );
    expect(Math.abs(values[0] - s.first), `${name} first`).toBeLessThan(scale);
    expect(Math.abs(values[values.length - 1] - s.last), `${name} last`).toBeLessThan(scale);
  }
}

/** Preference pairs as token ids that fit every fixture model: a fixed list of `count`, prompts and responses of mixed lengths. */
export const fixturePairs = (count: number): object[] =>
  Array.from({ length: count }, (_, i) => {
    const word = (salt: number, length: number): number[] =>
      Array.from({ length }, (_, k) => 4 + ((i * 31 + salt * 17 + k * k * 7 + k * 3) % 56));
    return {
      prompt_ids: word(1, 1 + (i % 4)),
      chosen_ids: [...word(2, 1 + ((i * 2) % 5)), 2],
      rejected_ids: [...word(3, 1 + ((i * 3) % 4)), 2],
    };
  });

/** The chosen halves of fixturePairs as SFT records. */
export const fixtureCompletions = (count: number): object[] =>
  fixturePairs(count).map((pair) => {
    const { prompt_ids, chosen_ids } = pair as { prompt_ids: number[]; chosen_ids: number[] };
    return { prompt_ids, completion_ids: chosen_ids };
  });
