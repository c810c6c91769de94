// Variants that look inside of a sequence: functions of per-token log-probabilities.
import { KeelgradError } from '../../errors.js';
import { add, div, exp, sub } from '../../ops/elementwise.js';
import { slice } from '../../ops/movement.js';
import type { Tensor } from '../../tensor/tensor.js';
import { sequenceLogProbs } from '../logprobs.js';

/**
 * Weights of tokens of LD-DPO: 1 up to the length of the shorter response of the pair, α beyond. Multiply the log-probabilities
 * of policy and reference by them before summing by sequence; lengths stay the full ones. Liu et al. 2024, arXiv 2409.06411.
 *
 * @param chosenLengths scored tokens of each chosen response; `rejectedLengths` likewise
 * @param alpha in [0, 1]; 1 changes nothing
 * @returns one number for each scored token: those of all chosen responses, then of all rejected
 */
export function lengthDesensitizedWeights(
  chosenLengths: readonly number[],
  rejectedLengths: readonly number[],
  alpha: number,
): Float64Array {
  if (!(alpha >= 0 && alpha <= 1))
    throw new KeelgradError(`[LD-DPO] expected an alpha from 0 to 1, found ${alpha}; 1 changes nothing`);
  if (chosenLengths.length !== rejectedLengths.length)
    throw new KeelgradError(
      `[LD-DPO] expected as many chosen as rejected lengths, found ${chosenLengths.length} and ${rejectedLengths.length}; pass pairs`,
    );
  const weights = (lengths: readonly number[], others: readonly number[]): number[] =>
    lengths.flatMap((n, i) => Array.from({ length: n }, (_, t) => (t < others[i] ? 1 : alpha)));
  return Float64Array.from([...weights(chosenLengths, rejectedLengths), ...weights(rejectedLengths, chosenLengths)]);
}

/**
 * WPO's weight of each pair `[B]`, v_w v_l with v = exp(mean over tokens of (log π(token) - log Σ p²)): how likely the policy is
 * to write these responses itself. Constants: no gradient goes through them. Zhou et al. 2024, arXiv 2406.11827.
 *
 * @param tokens log-probabilities of scored tokens `[N]`
 * @param logSumSquares log of the sum of squared probabilities of the next-token distribution, `[N]`
 * @param sequences int32 `[N]`: the sequence of each token, chosen ones 0 to B-1, rejected ones B to 2B-1
 * @param lengths scored tokens of each sequence, floating `[2B]`
 */
export function wpoWeights(tokens: Tensor, logSumSquares: Tensor, sequences: Tensor, lengths: Tensor): Tensor {
  const pairs = lengths.size / 2;
  const logWeights = div(sequenceLogProbs(sub(tokens.detach(), logSumSquares.detach()), sequences, 2 * pairs), lengths);
  return exp(add(slice(logWeights, 0, 0, pairs), slice(logWeights, 0, pairs, 2 * pairs)));
}
