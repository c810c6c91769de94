// Reference log-probabilities: from the records, or computed once before training for the records that will be visited.
import { type PackedBatch, type PairIds, type SequenceIds, sequenceOf } from '../data/packing.js';
import type { LabelledExample, PreferenceExample } from '../data/tokenize.js';
import { KeelgradError } from '../errors.js';
import type { CausalLM } from '../models/causal-lm.js';
import type { ModelParameters } from '../models/parameters.js';
import { type ScoreOptions, scorePairs, scoreSequences } from './batch-source.js';
import { mismatchedPartners } from './mismatch.js';
import { tokenWeightsOf } from './preference-batch.js';

/** `initial`: the policy as it is at the start; `base`: the model without adapters; `none`: no reference. */
export type ReferenceKind = 'initial' | 'base' | 'none';

/** By position in the prepared data; NaN where an example was not visited. */
export interface ReferenceLogProbs {
  chosen: Float64Array;
  rejected: Float64Array;
}

/** The reference of preference losses. */
export interface PreferenceReference extends ReferenceLogProbs {
  /** Prompts with responses to other prompts, where KTO needs them. */
  mismatched?: ReferenceLogProbs & { pairs: readonly PairIds[] };
}

/** The reference of losses of labelled responses, by position. */
export interface LabelledReference {
  logProbs: Float64Array;
  mismatched?: { sequences: readonly SequenceIds[]; logProbs: Float64Array };
}

export interface ReferenceOptions {
  kind: ReferenceKind;
  /** Positions of the examples that training will see. */
  visited: readonly number[];
  batchSize: number;
  /** α of LD-DPO: see Weighting. */
  ldAlpha?: number;
  /** Longest sequence of mismatched prompts and responses, where they are wanted: those of KTO. */
  mismatched?: { maxLength: number } | null;
  signal?: AbortSignal;
  onProgress?: (done: number, total: number) => void;
}

/** One pass of the reference over the data out of several that count together. */
const passOf = (o: ReferenceOptions, before: number, total: number): ScoreOptions => ({
  batchSize: o.batchSize,
  signal: o.signal,
  onBatch: (done) => o.onProgress?.(before + done, total),
});

const parametersOf = (model: CausalLM, kind: ReferenceKind): ModelParameters =>
  kind === 'base' ? { ...model.parameters, adapters: null } : model.parameters;

const empty = (count: number): Float64Array => new Float64Array(count).fill(Number.NaN);

/** The reference's log-probabilities; null for `none`. Records that bring their own are taken at their word. */
export async function referenceLogProbs(
  model: CausalLM,
  examples: readonly PreferenceExample[],
  options: ReferenceOptions,
): Promise<PreferenceReference | null> {
  if (options.kind === 'none') return null;
  const { visited } = options;
  const table: PreferenceReference = { chosen: empty(examples.length), rejected: empty(examples.length) };
  const missing = takeGiven(examples, table, options);
  const pairs = options.mismatched ? mismatchedPairs(examples, options.mismatched.maxLength) : null;
  const total = missing.length + (pairs ? visited.length : 0);
  const weigh = (batch: PackedBatch): Float64Array | null => tokenWeightsOf(batch, options);
  const parameters = parametersOf(model, options.kind);
  const fill = async (into: ReferenceLogProbs, from: readonly PairIds[], at: number[], pass: ScoreOptions) => {
    const scores = await scorePairs(model, parameters, pick(from, at), pass);
    for (const half of ['chosen', 'rejected'] as const) place(into[half], at, scores[half]);
  };
  await fill(table, examples, missing, { ...passOf(options, 0, total), weigh });
  if (!pairs) return table;
  const apart = { chosen: empty(examples.length), rejected: empty(examples.length) };
  await fill(apart, pairs, [...visited], passOf(options, missing.length, total));
  return { ...table, mismatched: { ...apart, pairs } };
}

/** The same for labelled responses. */
export async function labelledReference(
  model: CausalLM,
  examples: readonly LabelledExample[],
  options: ReferenceOptions,
): Promise<LabelledReference> {
  const { visited } = options;
  const parameters = parametersOf(model, options.kind);
  const sequences = options.mismatched ? mismatchedSequences(examples, options.mismatched.maxLength) : null;
  const total = visited.length * (sequences ? 2 : 1);
  const score = async (from: readonly SequenceIds[], before: number): Promise<Float64Array> => {
    const pass = passOf(options, before, total);
    const logProbs = empty(examples.length);
    place(logProbs, visited, await scoreSequences(model, parameters, pick(from, visited), pass));
    return logProbs;
  };
  const logProbs = await score(examples, 0);
  return {
    logProbs,
    ...(sequences && { mismatched: { sequences, logProbs: await score(sequences, visited.length) } }),
  };
}

const pick = <T>(from: readonly T[], at: readonly number[]): T[] => at.map((i) => from[i]);

function place(into: Float64Array, at: readonly number[], values: Float64Array): void {
  at.forEach((i, k) => {
    into[i] = values[k];
  });
}

/** Fills in what records bring along; returns the visited positions that bring nothing. */
function takeGiven(
  examples: readonly PreferenceExample[],
  table: ReferenceLogProbs,
  { visited, ldAlpha = 1 }: ReferenceOptions,
): number[] {
  return visited.filter((i) => {
    const { refChosenLogp, refRejectedLogp, line } = examples[i];
    if (refChosenLogp === undefined || refRejectedLogp === undefined) return true;
    if (ldAlpha !== 1)
      throw new KeelgradError(
        `line ${line} of the data brings reference log-probabilities, which are sums over tokens, and LD-DPO weighs tokens; remove ref_chosen_logps and ref_rejected_logps`,
      );
    table.chosen[i] = refChosenLogp;
    table.rejected[i] = refRejectedLogp;
    return false;
  });
}

/** Each prompt with the responses of its partner, cut to the maximum length. */
function mismatchedPairs(examples: readonly PreferenceExample[], maxLength: number): PairIds[] {
  const partners = mismatchedPartners(examples.map((e) => e.promptIds));
  return examples.map(({ promptIds }, i) => {
    const { chosenIds, rejectedIds } = examples[partners[i]];
    const room = maxLength - promptIds.length;
    return { promptIds, chosenIds: chosenIds.subarray(0, room), rejectedIds: rejectedIds.subarray(0, room) };
  });
}

function mismatchedSequences(examples: readonly LabelledExample[], maxLength: number): SequenceIds[] {
  const prompts = examples.map(({ inputIds, promptLength }) => inputIds.subarray(0, promptLength));
  const partners = mismatchedPartners(prompts);
  return prompts.map((prompt, i) => {
    const { inputIds, promptLength } = examples[partners[i]];
    return sequenceOf(prompt, inputIds.subarray(promptLength).subarray(0, maxLength - prompt.length));
  });
}
