// The gradient-norm regularizer R = max(0, ‖g_w‖ - ‖g_l‖) and its exact gradient (spo.md §2, Corollary 1, Eqs. 77-84),
// one sequence at a time through the ops' definitions.
//
// ∇R = 1[‖g_w‖ > ‖g_l‖] (H_w v_w - H_l v_l), v = g/‖g‖ on the chosen set of variables and 0 elsewhere; H covers all variables.
import { AccumulatingSink } from '../autograd/sinks.js';
import { differentiate } from '../autograd/tape.js';
import { mul } from '../ops/elementwise.js';
import { onesLike } from '../ops/movement.js';
import { sumOfSquares } from '../optim/clip.js';
import { scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';

/** log π(y|x) of sequence i as a function of all variables, in the order of the variables. A scalar. */
export type SequenceFunction = (variables: readonly Tensor[], sequence: number) => Tensor;

export interface RegularizerProblem {
  /** θ and φ: everything that ∇R is taken for. */
  variables: readonly Tensor[];
  /** Which of them the norms run over. */
  normOver: readonly boolean[];
  logProb: SequenceFunction;
}

/** ‖g_i‖² over the chosen variables for sequences 0..count-1: float64 `[1]` each, enqueued, not read. */
export function squaredGradientNorms(problem: RegularizerProblem, count: number): Tensor[] {
  const { variables, normOver, logProb } = problem;
  const wanted = variables.filter((_, i) => normOver[i]);
  return Array.from({ length: count }, (_, sequence) =>
    scope(() => {
      const { gradients } = differentiate(
        wanted,
        (tracked) => logProb(merge(variables, normOver, tracked), sequence),
        (y) => [{ tensor: y, cotangent: onesLike(y) }],
      );
      return sumOfSquares(gradients.filter((g) => g !== null));
    }),
  );
}

function merge(variables: readonly Tensor[], chosen: readonly boolean[], replacement: readonly Tensor[]): Tensor[] {
  let at = 0;
  return variables.map((t, i) => (chosen[i] ? replacement[at++] : t));
}

/**
 * Adds `coefficient · H_i v_i` to accumulation buffers: the gradient of ‖g_i‖ for every variable, by differentiating the
 * gradient. Memory: the sequence's whole second-order tape.
 *
 * @param norm ‖g_i‖ over the chosen variables, > 0
 */
export function addNormGradient(
  problem: RegularizerProblem,
  sequence: number,
  norm: number,
  coefficient: number,
  buffers: readonly Tensor[],
): void {
  const { variables, normOver, logProb } = problem;
  scope(() => {
    differentiate(
      variables,
      (outer) => {
        const wanted = outer.filter((_, i) => normOver[i]);
        const { gradients } = differentiate(
          wanted,
          (tracked) => logProb(merge(outer, normOver, tracked), sequence),
          (y) => [{ tensor: y, cotangent: onesLike(y) }],
        );
        return gradients.filter((g): g is Tensor => g !== null);
      },
      (gradients) => gradients.map((g) => ({ tensor: g, cotangent: mul(g.detach(), 1 / norm) })),
      { sinks: buffers.map((t) => new AccumulatingSink(t, coefficient)) },
    );
  });
}

export interface RegularizerValue {
  /** Mean over pairs of max(0, ‖g_w‖ - ‖g_l‖). */
  value: number;
  /** Share of pairs with ‖g_w‖ > ‖g_l‖. */
  activeFraction: number;
  chosenNorms: number[];
  rejectedNorms: number[];
}

/** R and its parts from the norms of B chosen and B rejected gradients. */
export function regularizerValue(chosenNorms: number[], rejectedNorms: number[]): RegularizerValue {
  const excess = chosenNorms.map((n, i) => n - rejectedNorms[i]);
  const active = excess.filter((e) => e > 0);
  const count = excess.length;
  return {
    value: active.reduce((a, b) => a + b, 0) / count,
    activeFraction: active.length / count,
    chosenNorms,
    rejectedNorms,
  };
}

/**
 * R of a batch of B pairs (sequences 0..B-1 chosen, B..2B-1 rejected), its gradient times `weight` added to the buffers.
 * The norms are read on the host: only active pairs pay for second derivatives.
 */
export async function addRegularizer(
  problem: RegularizerProblem,
  pairs: number,
  weight: number,
  buffers: readonly Tensor[],
): Promise<RegularizerValue> {
  const norms: number[] = [];
  for (let i = 0; i < 2 * pairs; i++) {
    using squared = squaredGradientNorms({ ...problem, logProb: (v) => problem.logProb(v, i) }, 1)[0];
    norms.push(Math.sqrt((await squared.data())[0]));
  }
  const result = regularizerValue(norms.slice(0, pairs), norms.slice(pairs));
  for (let i = 0; i < pairs; i++) {
    if (!(norms[i] > norms[pairs + i])) continue;
    addNormGradient(problem, i, norms[i], weight / pairs, buffers);
    if (norms[pairs + i] > 0) addNormGradient(problem, pairs + i, norms[pairs + i], -weight / pairs, buffers);
  }
  return result;
}
