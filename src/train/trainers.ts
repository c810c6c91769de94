// The trainers as library calls: `for await (const step of spo(model, pairs, { ... }))`. What they are made of is loaded with
// the first call, so that importing keelgrad for its tensors stays cheap.
import { KeelgradError } from '../errors.js';
import type { Tokenizer } from '../io/tokenizer.js';
import type { CausalLM } from '../models/causal-lm.js';
import type { LowerSolver } from '../optim/bilevel/lower-level.js';
import type { RunStep, TrainHooks } from './hooks.js';
import type { GivenOptions, ResolvedTrainOptions, TrainMethod } from './options.js';

/** Options of the commands that a library call has no part for, with what to do instead. */
const notHere = {
  model: 'pass the loaded model as the first argument',
  data: 'pass a file or records as the second argument',
  output: 'save with saveModel and saveAdapter',
  overwrite: 'save with saveModel and saveAdapter',
  saveDtype: 'save with saveModel and saveAdapter',
  adapter: 'load the model with loadModel(folder, { adapter })',
  device: 'load the model with loadModel(folder, { device })',
  dtype: 'load the model with loadModel(folder, { dtype })',
  threads: 'call setThreads',
  loraR: 'load the model with loadModel(folder, { lora: { r } })',
  loraAlpha: 'load the model with loadModel(folder, { lora: { alpha } })',
  loraDropout: 'load the model with loadModel(folder, { lora: { dropout } })',
  loraTargets: 'load the model with loadModel(folder, { lora: { targets } })',
  rslora: 'load the model with loadModel(folder, { lora: { rslora } })',
} as const;

/** Options of a trainer: those of the command, in camelCase, less what belongs to files and to the loaded model. */
export type TrainerOptions<M extends TrainMethod> = Omit<GivenOptions<M>, keyof typeof notHere> & {
  /** For records that are not token ids already. */
  tokenizer?: Tokenizer;
  hooks?: Pick<TrainHooks, 'signal' | 'onPhase' | 'onMessage'>;
} & (M extends 'spo'
    ? { lower?: { steps?: number; lr?: number; solver?: LowerSolver; warmStart?: boolean } }
    : unknown);

/** A data file (JSON lines or an array), or records in the same form. */
export type TrainerData = string | readonly object[];

function refuseFileOptions(method: TrainMethod, given: Readonly<Record<string, unknown>>): void {
  const key = Object.keys(given).find((one): one is keyof typeof notHere => Object.hasOwn(notHere, one));
  if (key) throw new KeelgradError(`${key} is an option of the command alone, not of ${method}(); ${notHere[key]}`);
}

async function resolve<M extends TrainMethod>(
  method: M,
  model: CausalLM,
  options: TrainerOptions<M>,
): Promise<ResolvedTrainOptions> {
  const { libraryNaming, normalizeKeys, resolveOptions } = await import('./options.js');
  const { tokenizer: _, hooks: __, lower, ...given } = options as TrainerOptions<'spo'>;
  refuseFileOptions(method, normalizeKeys(method, given));
  const flat = {
    ...given,
    ...(lower?.steps !== undefined && { lowerSteps: lower.steps }),
    ...(lower?.lr !== undefined && { lowerLearningRate: lower.lr }),
    ...(lower?.solver !== undefined && { lowerSolver: lower.solver }),
    ...(lower?.warmStart !== undefined && { lowerWarmStart: lower.warmStart }),
    ...(method !== 'spo' && !model.lora && { train: (given as { train?: string }).train ?? 'full' }),
  };
  return resolveOptions(method, flat as GivenOptions<M>, {
    naming: libraryNaming,
    requirePaths: false,
  }) as ResolvedTrainOptions;
}

async function* run<M extends TrainMethod>(
  method: M,
  model: CausalLM,
  data: TrainerData,
  options: TrainerOptions<M>,
): AsyncGenerator<RunStep, void, void> {
  const [{ prepareRecords }, { openSession }] = await Promise.all([import('./setup.js'), import('./session.js')]);
  const resolved = await resolve(method, model, options);
  const tokenizer = async (): Promise<Tokenizer> => {
    if (options.tokenizer) return options.tokenizer;
    throw new KeelgradError(
      `[${method}] expected a tokenizer for text records; pass { tokenizer: await loadTokenizer(folder) }`,
    );
  };
  const reading = { tokenizer, maxLength: resolved.maxLength, vocabSize: model.config.vocabSize };
  const prepared = await prepareRecords(method, data, reading, options.hooks ?? {});
  const session = await openSession(model, prepared, resolved, options.hooks);
  try {
    yield* session.steps();
  } finally {
    session.dispose();
  }
}

/**
 * Supervised fine-tuning of a loaded model, in place: its adapters, or all of it when it has none. Yields every optimizer
 * step's metrics. The step after the one that is yielded may have been taken already.
 */
export const sft = (
  model: CausalLM,
  data: TrainerData,
  options: TrainerOptions<'sft'> = {},
): AsyncGenerator<RunStep, void, void> => run('sft', model, data, options);

/** Direct Preference Optimization (Rafailov et al. 2023) and its kin, by `lossType`: see `sft` and `preferenceLosses`. */
export const dpo = (
  model: CausalLM,
  data: TrainerData,
  options: TrainerOptions<'dpo'> = {},
): AsyncGenerator<RunStep, void, void> => run('dpo', model, data, options);

/** Stable Preference Optimization (arXiv 2507.07723, Algorithm 1): trains the backbone and the adapters. See `sft`. */
export const spo = (
  model: CausalLM,
  data: TrainerData,
  options: TrainerOptions<'spo'> = {},
): AsyncGenerator<RunStep, void, void> => run('spo', model, data, options);
