// Supervised fine-tuning loss (spo.md §2, Eq. 72).
import { exp, mul, neg } from '../ops/elementwise.js';
import { mean, sum } from '../ops/reduce.js';
import type { Tensor } from '../tensor/tensor.js';

export type SftReduction = 'sum' | 'token-mean';

/**
 * L_SFT from sequence log-probabilities `[B]`. `sum`: the mean over sequences of -log π(y|x) (the paper's formula).
 * `token-mean`: -Σ log π / number of scored tokens (what SFT trainers do).
 *
 * @param options.tokens scored tokens to divide by with token-mean: of the batch, or of all micro-batches of a step
 * @param options.sequences sequences to divide by with sum; those of `logProbs` by default
 */
export function sftLoss(
  logProbs: Tensor,
  options: { reduction: SftReduction; tokens: number; sequences?: number },
): Tensor {
  if (options.reduction === 'token-mean') return mul(sum(logProbs), -1 / options.tokens);
  return options.sequences === undefined ? neg(mean(logProbs)) : mul(sum(logProbs), -1 / options.sequences);
}

/**
 * p log p of each token, its probability p a constant weight, so that unlikely tokens pull less: what dynamic fine-tuning sums
 * in place of log p. Wu et al. 2025, arXiv 2508.05629.
 *
 * @param logProbs token log-probabilities `[N]`
 */
export const dynamicLogProbs = (logProbs: Tensor): Tensor => mul(logProbs, exp(logProbs.detach()));

/**
 * Dynamic fine-tuning: -Σ p log p / number of scored tokens (see dynamicLogProbs).
 *
 * @param options.tokens scored tokens to divide by: of the batch, or of all micro-batches of a step
 */
export const dftLoss = (logProbs: Tensor, options: { tokens: number }): Tensor =>
  mul(sum(dynamicLogProbs(logProbs)), -1 / options.tokens);
