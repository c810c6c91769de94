// One training run from files to files: what `keelgrad sft|dpo|spo` calls.

import { join } from 'node:path';
import { KeelgradError } from '../errors.js';
import { writeFolderAtomic } from '../io/atomic.js';
import { hashFile, hashModelFolder } from '../io/hash.js';
import { saveAdapter, saveModel } from '../io/model-folder.js';
import type { CausalLM } from '../models/causal-lm.js';
import { readModelConfig } from '../models/config.js';
import { resetPeakMemory } from '../tensor/storage.js';
import type { Metrics, TrainHooks, TrainResult } from './hooks.js';
import { describeOptions, type ResolvedTrainOptions } from './options.js';
import { checkOutput, RunFolder } from './run-folder.js';
import { openSession, type Session } from './session.js';
import { applyThreads, checkTargets, openData, openModel, resolveDevice } from './setup.js';

/**
 * Trains as the options say and writes the output folder. Resolves when everything is saved, also after an interruption.
 *
 * @throws KeelgradError for bad input (nothing written then), or a non-finite loss (the last finite weights are saved)
 */
export async function runTraining(options: ResolvedTrainOptions, hooks: TrainHooks = {}): Promise<TrainResult> {
  const inputs = [options.model, options.data, ...(options.adapter ? [options.adapter] : [])];
  const settings = { overwrite: options.overwrite, inputs };
  await checkOutput(options.output, settings);
  await checkTargets(options);
  applyThreads(options.threads);
  const notes: string[] = []; // said once the inputs are known good: bad input gets one message
  const device = resolveDevice(options.device, (text) => notes.push(text));
  const config = await readModelConfig(join(options.model, 'config.json'));
  const data = await openData(options, config.vocabSize, hooks);
  const facts = await fingerprints(options);
  using model = await openModel(options, device);
  for (const note of notes) hooks.onMessage?.(note);
  resetPeakMemory(device);
  const session = await openSession(model, data, options, hooks);
  try {
    const folder = await RunFolder.begin(options.output, { ...facts, totalSteps: session.plan.totalSteps }, settings);
    hooks.onStart?.({
      totalSteps: session.plan.totalSteps,
      examples: data.examples.length,
      dropped: data.dropped.promptTooLong + data.dropped.noTarget,
      trainableParameters: session.trainableParameters,
      device,
    });
    return await drive(model, session, folder, options, hooks);
  } finally {
    session.dispose();
  }
}

async function drive(
  model: CausalLM,
  session: Session,
  folder: RunFolder,
  options: ResolvedTrainOptions,
  hooks: TrainHooks,
): Promise<TrainResult> {
  let steps = 0;
  let lastMetrics: Metrics = {};
  let failure: Error | null = null;
  try {
    for await (const step of session.steps()) {
      steps = step.step;
      lastMetrics = step.metrics;
      folder.appendMetrics({ step: step.step, ...step.metrics });
      hooks.onStep?.(step);
    }
  } catch (error) {
    failure = error as Error;
  }
  try {
    await save(model, session, folder, options);
  } catch (error) {
    failure = failure ? alsoNotSaved(failure, error as Error) : (error as Error);
  }
  if (failure) {
    await folder.finish('failed', steps, failure.message);
    throw failure;
  }
  const interrupted = steps < session.plan.totalSteps;
  await folder.finish(interrupted ? 'interrupted' : 'completed', steps);
  return { output: options.output, steps, interrupted, lastMetrics };
}

/** The cause comes first; that its weights were lost as well must not hide it. */
const alsoNotSaved = (failure: Error, saving: Error): KeelgradError =>
  new KeelgradError(`${failure.message}; and the weights could not be saved: ${saving.message}`, { cause: failure });

async function save(
  model: CausalLM,
  session: Session,
  folder: RunFolder,
  options: ResolvedTrainOptions,
): Promise<void> {
  const dtype = options.saveDtype;
  const moved = session.groups.includes('backbone');
  if (moved) {
    const backbone = new Map(session.masters('backbone'));
    await writeFolderAtomic(folder.modelPath, (path) =>
      saveModel(model, path, { dtype, backbone, from: options.model }),
    );
  }
  if (session.groups.includes('adapters')) {
    const adapters = new Map(session.masters('adapters'));
    const baseModel = moved ? '../model' : options.model;
    await writeFolderAtomic(folder.adapterPath, (path) => saveAdapter(model, path, { dtype, adapters, baseModel }));
  }
}

async function fingerprints(options: ResolvedTrainOptions) {
  const [model, data, adapter] = await Promise.all([
    hashModelFolder(options.model),
    hashFile(options.data),
    options.adapter ? hashModelFolder(options.adapter) : undefined,
  ]);
  return {
    method: options.method,
    options: describeOptions(options),
    model: { path: options.model, ...model },
    data: { path: options.data, sha256: data },
    ...(adapter && options.adapter ? { adapter: { path: options.adapter, ...adapter } } : {}),
  };
}
