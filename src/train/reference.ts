// Reference log-probabilities: from the records, or computed once before training for the records that will be visited.
import type { PreferenceExample } from '../data/tokenize.js';
import type { CausalLM } from '../models/causal-lm.js';
import { scorePairs } from './batch-source.js';

/** `initial`: the policy as it is at the start; `base`: the model without adapters; `none`: no reference. */
export type ReferenceKind = 'initial' | 'base' | 'none';

/** By position in the prepared data; NaN where an example was not visited. */
export interface ReferenceLogProbs {
  chosen: Float64Array;
  rejected: Float64Array;
}

export interface ReferenceOptions {
  kind: ReferenceKind;
  /** Positions of the examples that training will see. */
  visited: readonly number[];
  batchSize: number;
  signal?: AbortSignal;
  onProgress?: (done: number, total: number) => void;
}

/** The reference's log-probabilities; null for `none`. Records that bring their own are taken at their word. */
export async function referenceLogProbs(
  model: CausalLM,
  examples: readonly PreferenceExample[],
  options: ReferenceOptions,
): Promise<ReferenceLogProbs | null> {
  if (options.kind === 'none') return null;
  const table = {
    chosen: new Float64Array(examples.length).fill(Number.NaN),
    rejected: new Float64Array(examples.length).fill(Number.NaN),
  };
  const missing: number[] = [];
  for (const i of options.visited) {
    const { refChosenLogp, refRejectedLogp } = examples[i];
    if (refChosenLogp === undefined || refRejectedLogp === undefined) missing.push(i);
    else {
      table.chosen[i] = refChosenLogp;
      table.rejected[i] = refRejectedLogp;
    }
  }
  if (missing.length === 0) return table;
  const parameters = options.kind === 'base' ? { ...model.parameters, adapters: null } : model.parameters;
  const scores = await scorePairs(
    model,
    parameters,
    missing.map((i) => examples[i]),
    {
      batchSize: options.batchSize,
      signal: options.signal,
      onBatch: (done) => options.onProgress?.(done, missing.length),
    },
  );
  missing.forEach((i, k) => {
    table.chosen[i] = scores.chosen[k];
    table.rejected[i] = scores.rejected[k];
  });
  return table;
}
