// How many pairs a recorded pass of SPO takes at a time: the derivatives of their norms need all of their activations, those of
// the backward pass included. Estimates of memory, no more.
import type { CausalLM } from '../models/causal-lm.js';
import { accumulationDType, dtypes } from '../tensor/dtype.js';

/**
 * Numbers that a recorded pass keeps for a row of a block, in widths of the hidden states and of the feed-forward layer: as
 * measured for SmolLM2-135M's shape, 0.76 GiB in float32 for a pair of 128 + 128 tokens.
 */
const kept = { hidden: 11, intermediate: 4.5 };

/** What a recorded pass keeps for so many rows of sequences: estimated. */
export function recordedBytes({ config, dtype }: CausalLM, rows: number): number {
  const { layers, hiddenSize, intermediateSize } = config;
  return rows * layers * (kept.hidden * hiddenSize + kept.intermediate * intermediateSize) * dtypes[dtype].size;
}

/** What it may keep: as much as weights, gradients and the optimizer's state take anyway; with a small model more. */
export function recordedBudget({ backbone, dtype }: CausalLM): number {
  const weights = [...backbone.values()].reduce((n, t) => n + t.size, 0);
  return Math.max(4 * weights * dtypes[accumulationDType(dtype)].size, 2 ** 28);
}

/** Neighbours together as long as they stay within the budget; at least one. */
export function partsWithin<T>(items: readonly T[], cost: (item: T) => number, budget: number): T[][] {
  const parts: T[][] = [];
  let left = 0;
  for (const item of items) {
    const own = cost(item);
    if (parts.length === 0 || own > left) {
      parts.push([]);
      left = budget;
    }
    parts[parts.length - 1].push(item);
    left -= own;
  }
  return parts;
}
