// From options to a loaded model and prepared data: what every command does first.

import { join } from 'node:path';
import {
  type PrepareOptions,
  preparePairedOrLabelledData,
  preparePreferenceData,
  prepareSftData,
} from '../data/tokenize.js';
import { KeelgradError } from '../errors.js';
import { type LoadOptions, loadModel } from '../io/model-folder.js';
import { resolveTargetModules } from '../io/peft.js';
import { loadTokenizer } from '../io/tokenizer.js';
import type { CausalLM } from '../models/causal-lm.js';
import { readModelConfig } from '../models/config.js';
import { linearModules } from '../models/parameters.js';
import { runtimeInfo, setThreads } from '../native/info.js';
import type { Device } from '../tensor/storage.js';
import type { TrainHooks } from './hooks.js';
import type { ResolvedScoreOptions, ResolvedTrainOptions, TrainMethod } from './options.js';
import type { SessionData } from './session.js';

/** The device that `auto`, `cpu` or `cuda` means here: the first GPU that can be used. Says so once where `auto` falls back. */
export function resolveDevice(wanted: 'auto' | 'cpu' | 'cuda', onMessage?: (text: string) => void): Device {
  if (wanted === 'cpu') return 'cpu';
  const { cuda } = runtimeInfo();
  if (cuda.available) return `cuda:${cuda.devices.findIndex((gpu) => gpu.reason === undefined)}`;
  if (wanted === 'cuda') throw new KeelgradError(`--device cuda: not available: ${cuda.reason}; ${cuda.remedy}`);
  onMessage?.(`running on the CPU (CUDA: ${cuda.reason})`);
  return 'cpu';
}

/** Sets the number of compute threads where one was asked for. */
export function applyThreads(threads: number | undefined): void {
  if (threads !== undefined) setThreads(threads);
}

/** The model of a training run, with new adapters or those of `--adapter` where they are trained. */
export async function openModel(options: ResolvedTrainOptions, device: Device): Promise<CausalLM> {
  const settings: LoadOptions = { dtype: options.dtype, device };
  const full = options.method !== 'spo' && options.train === 'full';
  if (options.adapter !== undefined) settings.adapter = options.adapter;
  else if (!full) settings.lora = loraSettings(options);
  return loadModel(options.model, settings);
}

function loraSettings(options: ResolvedTrainOptions): LoadOptions['lora'] {
  const targets =
    options.loraTargets.length === 1 && options.loraTargets[0] === 'all-linear' ? 'all-linear' : options.loraTargets;
  return {
    r: options.loraR,
    alpha: options.loraAlpha,
    dropout: options.loraDropout,
    rslora: options.rslora,
    seed: options.seed,
    targets,
    baseModel: options.model,
  };
}

/** Checks `--lora-targets` against the configuration alone: before anything heavy is loaded. */
export async function checkTargets(options: ResolvedTrainOptions): Promise<void> {
  if (options.adapter !== undefined || (options.method !== 'spo' && options.train === 'full')) return;
  const config = await readModelConfig(join(options.model, 'config.json'));
  const { targets } = loraSettings(options)!;
  resolveTargetModules(targets!, [...linearModules(config).keys()], { source: '--lora-targets' });
}

/** How records are read for a method: labelled responses without pairs are some losses' of the preference methods. */
const preparations: Readonly<
  Record<TrainMethod | 'score', (data: string | readonly object[], options: PrepareOptions) => Promise<SessionData>>
> = {
  sft: prepareSftData,
  dpo: preparePairedOrLabelledData,
  spo: preparePairedOrLabelledData,
  score: preparePreferenceData,
};

/** Reads and tokenizes records for a method; reports what was dropped or cut. */
export async function prepareRecords(
  method: TrainMethod | 'score',
  data: string | readonly object[],
  options: PrepareOptions,
  hooks: Pick<TrainHooks, 'onMessage'>,
): Promise<SessionData> {
  const prepared = await preparations[method](data, options);
  for (const warning of prepared.warnings) hooks.onMessage?.(warning);
  return prepared;
}

/** The records of a data file for a command. */
export const openData = (
  options: Pick<ResolvedTrainOptions | ResolvedScoreOptions, 'method' | 'model' | 'data' | 'maxLength'>,
  vocabSize: number,
  hooks: Pick<TrainHooks, 'onMessage'>,
): Promise<SessionData> => {
  const { method, model, data, maxLength } = options;
  return prepareRecords(method, data, { tokenizer: () => loadTokenizer(model), maxLength, vocabSize }, hooks);
};
