// The demo: DPO and SPO from the same start, on the same pairs in the same order, both measured on the same held-out pairs.
// Owns its output folder: replaces what an earlier demo left there, and nothing else.
import { mkdir, readdir, readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { KeelgradError } from '../errors.js';
import { writeFileAtomic, writeJsonAtomic } from '../io/atomic.js';
import type { TrainHooks } from '../train/hooks.js';
import { type DemoOptions, type ResolvedTrainOptions, resolveOptions } from '../train/options.js';
import { runTraining } from '../train/run.js';
import { packageVersion } from '../train/run-folder.js';
import { curveOf, type MethodResult, toCsv } from './curves.js';
import { HeldOutPairs, type Measurement } from './held-out.js';
import { type Finding, findings, type Results } from './report.js';
import { type DemoMethod, type DemoSettings, demoMethods, paper, trainingOptions } from './settings.js';
import { drawSvg } from './svg.js';

export interface DemoHooks extends TrainHooks {
  /** Before a run's first step. */
  onMethod?(method: DemoMethod, options: ResolvedTrainOptions): void;
  /** After a run. */
  onMethodEnd?(method: DemoMethod): void;
}

export interface DemoOutcome {
  readonly results: Results;
  readonly findings: readonly Finding[];
}

async function isDemoFolder(folder: string): Promise<boolean> {
  try {
    const record: unknown = JSON.parse(await readFile(join(folder, 'demo.json'), 'utf8'));
    return typeof (record as { keelgrad_demo?: unknown } | null)?.keelgrad_demo === 'string';
  } catch {
    return false;
  }
}

/** Takes the folder: new, empty, or an earlier demo's, whose results go; its runs are replaced one by one. */
async function claimFolder(output: string): Promise<void> {
  const entries = await readdir(output).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [];
    throw new KeelgradError(`${output}: expected a folder (${error.message}); name another --output`);
  });
  if (entries.length > 0 && !(await isDemoFolder(output)))
    throw new KeelgradError(
      `${output}: expected a new or empty folder, or an earlier demo's, found ${entries.slice(0, 3).join(', ')}; name another --output`,
    );
  await mkdir(output, { recursive: true });
  await writeDemo(output, { status: 'running' });
  for (const name of ['demo.csv', 'demo.svg']) await rm(join(output, name), { force: true });
}

const writeDemo = (output: string, facts: object): Promise<void> =>
  writeJsonAtomic(join(output, 'demo.json'), { keelgrad_demo: packageVersion(), ...facts });

function optionsOf(method: DemoMethod, options: DemoOptions, settings: DemoSettings): ResolvedTrainOptions {
  const { seed, threads } = options;
  return resolveOptions(method, {
    ...trainingOptions(method, settings),
    seed,
    ...(threads !== undefined && { threads }),
    output: join(options.output, method),
    overwrite: true,
  }) as ResolvedTrainOptions;
}

/** One run with its measurements, `rightBefore` where the start is known; undefined where it was interrupted. */
async function runMethod(
  training: ResolvedTrainOptions,
  heldOut: HeldOutPairs,
  settings: DemoSettings,
  hooks: DemoHooks,
  rightBefore?: readonly boolean[],
): Promise<MethodResult | undefined> {
  const method = training.method as DemoMethod;
  const startedAt = performance.now();
  const points: Measurement[] = [];
  let [before, after] = [rightBefore, [] as readonly boolean[]];
  hooks.onMethod?.(method, training);
  const { interrupted } = await runTraining(training, {
    ...hooks,
    onUpdate: async (model, updates) => {
      if (updates === 0) before ??= await heldOut.rightAnswers(model, hooks);
      if (updates === settings.steps) after = await heldOut.rightAnswers(model, { signal: hooks.signal });
      if (updates === settings.steps || updates % settings.evaluateEvery === 0)
        points.push(await heldOut.measure(model, updates, hooks.signal));
    },
  });
  hooks.onMethodEnd?.(method);
  if (interrupted || hooks.signal?.aborted) return undefined;
  const seconds = (performance.now() - startedAt) / 1000;
  return { method, points, rightBefore: before ?? [], rightAfter: after, seconds };
}

const shareOf = (flags: readonly boolean[]): number => flags.filter(Boolean).length / flags.length;

async function writeResults(
  output: string,
  outcome: DemoOutcome,
  settings: DemoSettings,
  pairs: number,
): Promise<void> {
  const results = demoMethods.map((method) => outcome.results[method]);
  const panels = results.map((result) => ({ title: result.method.toUpperCase(), curve: curveOf(result) }));
  const title = 'Log-probability of held-out answers while training, DPO and SPO from the same start';
  const subtitle = `Means over ${pairs} preference pairs, summed over each answer's tokens; bands: two standard errors`;
  await writeFileAtomic(join(output, 'demo.csv'), toCsv(results));
  await writeFileAtomic(join(output, 'demo.svg'), drawSvg(panels, { title, subtitle }));
  await writeDemo(output, {
    status: 'completed',
    held_out_pairs: pairs,
    paper,
    learning_rate_factor: settings.rateFactor,
    findings: outcome.findings,
    runs: results.map((result) => ({
      method: result.method,
      seconds: result.seconds,
      right_answers_before: shareOf(result.rightBefore),
      right_answers_after: shareOf(result.rightAfter),
      curve: curveOf(result),
    })),
  });
}

async function runBoth(
  options: DemoOptions,
  settings: DemoSettings,
  hooks: DemoHooks,
): Promise<DemoOutcome | undefined> {
  const heldOut = await HeldOutPairs.load(settings.heldOut);
  const results: Partial<Record<DemoMethod, MethodResult>> = {};
  for (const method of demoMethods) {
    if (hooks.signal?.aborted) return undefined;
    const training = optionsOf(method, options, settings);
    const result = await runMethod(training, heldOut, settings, hooks, results.dpo?.rightBefore);
    if (!result) return undefined;
    results[method] = result;
  }
  const both = results as Results;
  const outcome = { results: both, findings: findings(both) };
  await writeResults(options.output, outcome, settings, heldOut.size);
  return outcome;
}

/**
 * Trains by DPO and by SPO and writes runs, curves and chart. Returns undefined when it was interrupted.
 *
 * @throws KeelgradError where the output folder holds something else than an earlier demo
 */
export async function trainBoth(
  options: DemoOptions,
  settings: DemoSettings,
  hooks: DemoHooks = {},
): Promise<DemoOutcome | undefined> {
  await claimFolder(options.output);
  try {
    const outcome = await runBoth(options, settings, hooks);
    if (!outcome) await writeDemo(options.output, { status: 'interrupted' });
    return outcome;
  } catch (error) {
    await writeDemo(options.output, { status: 'failed', error: (error as Error).message });
    throw error;
  }
}
