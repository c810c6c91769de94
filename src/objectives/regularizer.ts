// The gradient-norm regularizer R = max(0, ‖g_w‖ - ‖g_l‖) and its exact gradient (spo.md §2, Corollary 1, Eqs. 77-84),
// one sequence at a time, of any function: exact by differentiating the gradient, or by finite differences. Batches of
// language models take the pass of sequence-gradients.ts; this is its independent check.
//
// ∇R = 1[‖g_w‖ > ‖g_l‖] (H_w v_w - H_l v_l), v = g/‖g‖ on the chosen set of variables and 0 elsewhere; H covers all variables.
import { AccumulatingSink } from '../autograd/sinks.js';
import { differentiate } from '../autograd/tape.js';
import { KeelgradError } from '../errors.js';
import { add, mul } from '../ops/elementwise.js';
import { cast, onesLike } from '../ops/movement.js';
import { sumOfSquares } from '../optim/clip.js';
import { scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import type { RegularizerMethod } from './regularizer-methods.js';

export type { RegularizerMethod } from './regularizer-methods.js';

/** log π(y|x) of sequence i as a function of all variables, in the order of the variables. A scalar. */
export type SequenceFunction = (variables: readonly Tensor[], sequence: number) => Tensor;

export interface RegularizerProblem {
  /** θ and φ: everything that ∇R is taken for. */
  variables: readonly Tensor[];
  /** Which of them the norms run over. */
  normOver: readonly boolean[];
  logProb: SequenceFunction;
}

/**
 * ‖g_i‖² over the chosen variables for sequences 0..count-1: float64 `[1]` each, enqueued, not read.
 * @throws KeelgradError where no variable is chosen
 */
export function squaredGradientNorms(problem: RegularizerProblem, count: number): Tensor[] {
  const { variables, normOver, logProb } = problem;
  if (!normOver.includes(true))
    throw new KeelgradError('normOver: expected at least one variable to take the norms over, found none');
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

/**
 * The length of a difference's step relative to that of the variables: where the error of the difference (the step squared)
 * meets that of rounding (one over the step).
 */
const relativeSteps: Partial<Record<Tensor['dtype'], number>> = { float64: 5e-7, float32: 5e-5 };

/** @throws KeelgradError for dtypes in which a step that changes anything is too long for a derivative */
export function requireDifferences(dtype: Tensor['dtype']): void {
  if (relativeSteps[dtype] === undefined)
    throw new KeelgradError(
      `regularizer by finite differences: expected float32 or float64 weights, found ${dtype}: steps short enough for a difference round away in it; use the exact method, or --dtype float32`,
    );
}

/**
 * Adds `coefficient · H_i v_i` by central differences of the gradient: [∇log π(x + r v) - ∇log π(x - r v)] / 2r (Zhao et al.
 * 2022). Memory: the variables twice.
 *
 * @throws KeelgradError with bfloat16 variables
 */
export function addNormGradientByDifferences(
  problem: RegularizerProblem,
  sequence: number,
  norm: number,
  coefficient: number,
  buffers: readonly Tensor[],
): void {
  const { variables, normOver, logProb } = problem;
  for (const t of variables) requireDifferences(t.dtype);
  scope(() => {
    const size = Math.sqrt(sumOfSquares(variables.map((t) => cast(t, 'float64'))).item());
    const step = relativeSteps[variables[0].dtype]! * Math.max(1, size);
    const direction = gradientsOf(problem, variables, sequence, normOver);
    for (const sign of [1, -1]) {
      const moved = variables.map((t, i) => {
        const v = direction[i];
        return v ? add(t, mul(v, (sign * step) / norm)) : t;
      });
      differentiate(
        moved,
        (tracked) => logProb(tracked, sequence),
        (y) => [{ tensor: y, cotangent: onesLike(y) }],
        { sinks: buffers.map((t) => new AccumulatingSink(t, (sign * coefficient) / (2 * step))) },
      );
    }
  });
}

/** ∇ log π of a sequence for the chosen variables; null for the others. */
function gradientsOf(
  { logProb }: RegularizerProblem,
  variables: readonly Tensor[],
  sequence: number,
  chosen: readonly boolean[],
): (Tensor | null)[] {
  const { gradients } = differentiate(
    variables.filter((_, i) => chosen[i]),
    (tracked) => logProb(merge(variables, chosen, tracked), sequence),
    (y) => [{ tensor: y, cotangent: onesLike(y) }],
  );
  let at = 0;
  return chosen.map((c) => (c ? gradients[at++] : null));
}

const derivatives = {
  exact: addNormGradient,
  'finite-differences': addNormGradientByDifferences,
} as const satisfies Record<RegularizerMethod, unknown>;

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

export interface RegularizerOptions {
  method?: RegularizerMethod;
  /** What each norm is divided by, for norms by token: the lengths of sequences; 1 by default. */
  divisors?: readonly number[];
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
  { method = 'exact', divisors }: RegularizerOptions = {},
): Promise<RegularizerValue> {
  const norms: number[] = [];
  for (let i = 0; i < 2 * pairs; i++) {
    using squared = squaredGradientNorms({ ...problem, logProb: (v) => problem.logProb(v, i) }, 1)[0];
    norms.push(Math.sqrt((await squared.data())[0]));
  }
  const scaled = norms.map((n, i) => n / (divisors?.[i] ?? 1));
  const result = regularizerValue(scaled.slice(0, pairs), scaled.slice(pairs));
  const coefficients = normCoefficients(scaled, pairs, weight);
  norms.forEach((norm, i) => {
    const coefficient = coefficients[i] / (divisors?.[i] ?? 1);
    if (coefficient !== 0 && norm > 0) derivatives[method](problem, i, norm, coefficient, buffers);
  });
  return result;
}

/** The derivative of weight · R for each norm, chosen first: ±weight/B where ‖g_w‖ > ‖g_l‖, else 0. */
export function normCoefficients(norms: readonly number[], pairs: number, weight: number): number[] {
  return norms.map((_, s) => {
    if (!(norms[s % pairs] > norms[pairs + (s % pairs)])) return 0;
    return ((s < pairs ? 1 : -1) * weight) / pairs;
  });
}
