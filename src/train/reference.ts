// Reference log-probabilities: from the records, or computed once before training for the records that will be visited.
import type { PackedBatch, PairIds } from '../data/packing.js';
import type { PreferenceExample } from '../data/tokenize.js';
import { KeelgradError } from '../errors.js';
import type { CausalLM } from '../models/causal-lm.js';
import type { ModelParameters } from '../models/parameters.js';
import { scorePairs } from './batch-source.js';
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

/** The model that stands for the reference. */
export const referenceParameters = (model: CausalLM, kind: ReferenceKind): ModelParameters =>
  kind === 'base' ? { ...model.parameters, adapters: null } : model.parameters;

const emptyTable = (count: number): ReferenceLogProbs => ({
  chosen: new Float64Array(count).fill(Number.NaN),
  rejected: new Float64Array(count).fill(Number.NaN),
});

/** The reference's log-probabilities; null for `none`. Records that bring their own are taken at their word. */
export async function referenceLogProbs(
  model: CausalLM,
  examples: readonly PreferenceExample[],
  options: ReferenceOptions,
): Promise<PreferenceReference | null> {
  if (options.kind === 'none') return null;
  const table = emptyTable(examples.length);
  const missing = takeGiven(examples, table, options);
  const mismatched = options.mismatched ? mismatchedPairs(examples, options.mismatched.maxLength) : null;
  const total = missing.length + (mismatched ? options.visited.length : 0);
  const fill = async (
    into: ReferenceLogProbs,
    pairs: readonly PairIds[],
    positions: readonly number[],
    before: number,
    weigh?: (batch: PackedBatch) => Float64Array | null,
  ): Promise<void> => {
    if (positions.length === 0) return;
    const scores = await scorePairs(
      model,
      referenceParameters(model, options.kind),
      positions.map((i) => pairs[i]),
      {
        batchSize: options.batchSize,
        weigh,
        signal: options.signal,
        onBatch: (done) => options.onProgress?.(before + done, total),
      },
    );
    positions.forEach((i, k) => {
      into.chosen[i] = scores.chosen[k];
      into.rejected[i] = scores.rejected[k];
    });
  };
  await fill(table, examples, missing, 0, (batch) => tokenWeightsOf(batch, options));
  if (!mismatched) return table;
  const apart = emptyTable(examples.length);
  await fill(apart, mismatched, options.visited, missing.length);
  return { ...table, mismatched: { ...apart, pairs: mismatched } };
}

/** Fills in what records bring along; returns the visited positions that bring nothing. */
function takeGiven(
  examples: readonly PreferenceExample[],
  table: ReferenceLogProbs,
  { visited, ldAlpha = 1 }: ReferenceOptions,
): number[] {
  return visited.filter((i) => {
    const { refChosenLogp, refRejectedLogp, index } = examples[i];
    if (refChosenLogp === undefined || refRejectedLogp === undefined) return true;
    if (ldAlpha !== 1)
      throw new KeelgradError(
        `record ${index} brings reference log-probabilities, which are sums over tokens, and LD-DPO weighs tokens; remove ref_chosen_logps and ref_rejected_logps`,
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
