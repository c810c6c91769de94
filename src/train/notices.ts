// What a user should hear before a run starts: what it will need, and what its settings cannot do.
import type { PreferenceExample } from '../data/tokenize.js';
import type { CausalLM } from '../models/causal-lm.js';
import { countParameters } from '../models/parameters.js';
import { accumulationDType, dtypes } from '../tensor/dtype.js';
import type { SpoOptions } from './options.js';

/**
 * Peak memory in bytes of the regularizer's gradient for one sequence, beside weights and gradient buffers: the second-order
 * tape of the ops' definitions. The coefficients are a least-squares fit to exact allocation counters over 16 model shapes,
 * which it meets within 3 %.
 */
export function regularizerBytes(model: CausalLM, tokens: number, targets: number): number {
  const { layers, heads, kvHeads, headDim, hiddenSize, intermediateSize, vocabSize } = model.config;
  const parameters = countParameters(model.backbone) + countParameters(model.adapters);
  const perToken = 18.2 * hiddenSize + 16.3 * intermediateSize + 27 * kvHeads * headDim;
  const elements =
    2 * parameters + layers * tokens * perToken + 7.8 * layers * heads * tokens ** 2 + 3.5 * targets * vocabSize;
  return elements * dtypes[accumulationDType(model.dtype)].size;
}

const inWords = (bytes: number): string =>
  bytes < 2 ** 30 ? `${Math.ceil(bytes / 2 ** 20)} MiB` : `${(bytes / 2 ** 30).toFixed(1)} GiB`;

/** Lines to print before SPO trains on `examples`. */
export function spoNotices(model: CausalLM, examples: readonly PreferenceExample[], options: SpoOptions): string[] {
  const notices: string[] = [];
  if (options.gamma > 0) {
    const worst = examples.reduce((most, e) => {
      const targets = Math.max(e.chosenIds.length, e.rejectedIds.length);
      return Math.max(most, regularizerBytes(model, e.promptIds.length + targets, targets));
    }, 0);
    notices.push(
      `the regularizer differentiates twice through one sequence at a time: up to ${inWords(worst)} for the longest one, beside weights, gradients and optimizer`,
    );
  }
  if (model.dtype === 'bfloat16' && options.lowerSteps > 0 && options.lambda > 0)
    notices.push(
      'with bfloat16 a lower-level step this small mostly rounds away, and the adapters see little of the penalty (term b); use --dtype float32 to keep it',
    );
  return notices;
}
