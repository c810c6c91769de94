// From options and data to the task that the loop runs: what must be known of the data and the reference before training.
import type { LabelledExample, PreferenceExample, PreparedData, SftExample } from '../data/tokenize.js';
import { KeelgradError } from '../errors.js';
import type { CausalLM } from '../models/causal-lm.js';
import { factsOf, type LossFacts } from '../objectives/preference/facts.js';
import { unpairedConflict } from '../objectives/preference/rules.js';
import type { Tensor } from '../tensor/tensor.js';
import { DpoTask } from './dpo-task.js';
import type { TrainHooks } from './hooks.js';
import { LabelledTask } from './labelled-task.js';
import { spoNotices } from './notices.js';
import type { DpoOptions, ResolvedTrainOptions, SftOptions, SpoOptions } from './options.js';
import { labelledReference, type ReferenceOptions, referenceLogProbs } from './reference.js';
import { SftTask } from './sft-task.js';
import { inWords, spoConflict } from './spo-rules.js';
import { SpoTask } from './spo-task.js';
import type { Task, Trainable } from './task.js';

/** What a method trains on. */
export type SessionData = PreparedData<SftExample> | PreparedData<PreferenceExample> | PreparedData<LabelledExample>;

/** Makes the task once the trained parameters have their buffers. */
export type MakeTask = (trainable: Trainable, masters: () => ReadonlyMap<string, Tensor>) => Task;

type Preference = DpoOptions | SpoOptions;

export interface TaskInputs<O extends ResolvedTrainOptions = ResolvedTrainOptions> {
  model: CausalLM;
  data: SessionData;
  options: O;
  /** Positions of the examples that training will see. */
  visited: readonly number[];
  hooks: Pick<TrainHooks, 'signal' | 'onPhase' | 'onMessage'>;
}

/** Whether data are labelled responses without pairs. */
export const isLabelledData = (data: SessionData): data is PreparedData<LabelledExample> =>
  data.examples.length > 0 && 'desirable' in data.examples[0];

/**
 * Checks data against options and computes the reference's log-probabilities.
 * @throws KeelgradError where a loss lacks something in the data
 */
export async function prepareTask(inputs: TaskInputs): Promise<MakeTask> {
  const { options, data } = inputs;
  if (options.method === 'sft') return sftTask(options, data.examples as readonly SftExample[]);
  const preference = inputs as TaskInputs<Preference>;
  return isLabelledData(data) ? labelledTask(preference, data.examples) : pairedTask(preference);
}

function sftTask(options: SftOptions, examples: readonly SftExample[]): MakeTask {
  return (trainable) => {
    const dropout = trainable.groups.includes('adapters') ? (trainable.model.lora?.config.dropout ?? 0) : 0;
    const { sftLoss: loss, sftReduction: reduction, seed, gradientCheckpointing } = options;
    const settings = { loss, reduction, dropout, seed, gradientCheckpointing };
    return new SftTask(trainable, examples, settings);
  };
}

const someLoss = (options: Preference, is: (facts: LossFacts) => unknown): boolean =>
  factsOf(options.lossType).some(is);

function referenceOptions({ options, visited, hooks }: TaskInputs<Preference>): ReferenceOptions {
  return {
    kind: options.reference,
    visited,
    batchSize: options.batchSize,
    ldAlpha: options.ldAlpha,
    mismatched: someLoss(options, (facts) => facts.needsKl) ? { maxLength: options.maxLength } : null,
    signal: hooks.signal,
    onProgress: (done, total) => hooks.onPhase?.('reference log-probabilities', done, total),
  };
}

async function pairedTask(inputs: TaskInputs<Preference>): Promise<MakeTask> {
  const { model, options, visited, hooks } = inputs;
  const examples = inputs.data.examples as readonly PreferenceExample[];
  if (options.method === 'spo') requireSpo(model, options);
  if (someLoss(options, (facts) => facts.needsOffsets)) requireOffsets(examples, visited);
  const reference = await referenceLogProbs(model, examples, referenceOptions(inputs));
  if (options.method === 'dpo') return (trainable) => new DpoTask(trainable, examples, reference, options);
  for (const text of spoNotices(model, options)) hooks.onMessage?.(text);
  return (trainable, masters) => new SpoTask(trainable, examples, reference, options, masters);
}

function requireOffsets(examples: readonly PreferenceExample[], visited: readonly number[]): void {
  const lacking = visited.find((i) => examples[i].offset === undefined);
  if (lacking === undefined) return;
  throw new KeelgradError(
    `line ${examples[lacking].line} of the data: expected a field "offset", by how much odpo is to prefer the chosen response, found none; add it, or use sigmoid`,
  );
}

/** What the dtype of a loaded model rules out. */
function requireSpo({ dtype }: CausalLM, options: SpoOptions): void {
  const conflict = spoConflict({ ...options, dtype }, inWords);
  if (conflict) throw new KeelgradError(conflict);
}

function requireUnpaired(options: Preference): asserts options is DpoOptions {
  if (options.method === 'spo')
    throw new KeelgradError(
      'these records have one response and its label, and spo needs pairs: its lower level learns the chosen responses, its regularizer compares the two; use keelgrad dpo, or pairs',
    );
  const context = { ...options, names: options.lossType, hasReference: options.reference !== 'none' };
  const conflict = unpairedConflict({ ...context, referenceRemedy: 'use reference initial' }, inWords);
  if (conflict) throw new KeelgradError(conflict);
  const ofPairs = options.ldAlpha !== 1 ? 'ldAlpha' : options.wpo ? 'wpo' : undefined;
  if (ofPairs)
    throw new KeelgradError(
      `${inWords.option(ofPairs)} is for pairs, and these records have one response and its label; leave it out`,
    );
}

async function labelledTask(inputs: TaskInputs<Preference>, examples: readonly LabelledExample[]): Promise<MakeTask> {
  const { model, options } = inputs;
  requireUnpaired(options);
  const reference = await labelledReference(model, examples, referenceOptions(inputs));
  return (trainable) => new LabelledTask(trainable, examples, reference, options);
}
