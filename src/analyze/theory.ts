// What one step of DPO does to the probability of a sequence: predicted to first order (Theorem 1 and its corollaries,
// arXiv 2507.07723; spo.md §3), and measured by taking the step.
//
// Everything is in logarithms: Δlog π = Δπ/π. Probabilities of whole answers underflow.
import { KeelgradError } from '../errors.js';
import type { CausalLM } from '../models/causal-lm.js';
import type { GroupName } from '../train/task.js';
import { displaced, logProbsOf, type Sequence, SequenceGradient, variableGroups } from './sequences.js';

/** A preference pair with the reference's log-probabilities, and other responses whose change is followed. */
export interface TheoryPair {
  readonly promptIds: Int32Array;
  readonly chosenIds: Int32Array;
  readonly rejectedIds: Int32Array;
  /** Absent: those of the model itself, so that s = 0. */
  readonly refChosenLogp?: number;
  readonly refRejectedLogp?: number;
  readonly others?: readonly Int32Array[];
}

export interface TheoryOptions {
  /** β of DPO. */
  readonly beta: number;
  /** Step sizes η of the one plain gradient step, falling; the error's order is read off neighbouring ones. */
  readonly stepSizes: readonly number[];
  /** Variables that the step moves; all that the model has unless given. */
  readonly groups?: readonly GroupName[];
  readonly signal?: AbortSignal;
  readonly onProgress?: (done: number, total: number) => void;
}

/** One sequence under one step: chosen, rejected, then the others. */
export interface SequenceChange {
  readonly kind: 'chosen' | 'rejected' | 'other';
  readonly logProb: number;
  /** ⟨g_y, g_w⟩ and ⟨g_y, g_l⟩. */
  readonly innerChosen: number;
  readonly innerRejected: number;
  /** Δlog π / η to first order: β(1 - σ(s)) (⟨g_y, g_w⟩ - ⟨g_y, g_l⟩) (Eqs. 2, 3, 57, divided by π). */
  readonly predictedPerStepSize: number;
  /** Measured Δlog π, by step size. */
  readonly measured: readonly number[];
  /** Measured less predicted, by step size. */
  readonly error: readonly number[];
  /** d log|error| / d log η between neighbouring step sizes: 2 where the theory holds. NaN where an error is 0. */
  readonly order: readonly number[];
}

export interface TheoryResult {
  readonly s: number;
  /** β(1 - σ(s)). */
  readonly weight: number;
  readonly normChosen: number;
  readonly normRejected: number;
  /** ⟨g_w, g_l⟩. */
  readonly inner: number;
  readonly cosine: number;
  /** Gradient terms of figure 1b: ‖g_w‖² - ⟨g_w, g_l⟩ and ⟨g_w, g_l⟩ - ‖g_l‖². */
  readonly termChosen: number;
  readonly termRejected: number;
  readonly sequences: readonly SequenceChange[];
  readonly corollary1: Corollary1;
  readonly corollary2: Corollary2;
}

/** Eqs. 4 and 5, divided by π: bounds on Δlog π / η. */
export interface Corollary1Bounds {
  /** Δlog π(y_w)/η is at least this. */
  readonly lowerChosen: number;
  /** Δlog π(y_l)/η is at most this. */
  readonly upperRejected: number;
  /** What the bound's sign promises: the chosen response rises (‖g_w‖ > ‖g_l‖), or the rejected one falls. */
  readonly promises: 'chosen rises' | 'rejected falls' | 'nothing';
}

/** The bounds beside what was measured. */
export interface Corollary1 extends Corollary1Bounds {
  /** Whether the measured changes kept to the bounds, by step size: large steps may break what is of first order. */
  readonly heldChosen: readonly boolean[];
  readonly heldRejected: readonly boolean[];
}

/**
 * Corollary 2 (Eq. 6) in its two forms, in units of ηβ(1 - σ(s)). The log form, Δlog π(y_w) - Δlog π(y_l) = ‖g_w - g_l‖², is
 * exact to first order. The probability form claims Δπ(y_w) - Δπ(y_l) ≥ ‖√π_w g_w - √π_l g_l‖² and can fail; both of its sides
 * are given here divided by max(π_w, π_l), which may be representable where the probabilities are not.
 */
export interface Corollary2 {
  readonly logDifference: number;
  readonly probabilityDifference: number;
  readonly claimedBound: number;
  readonly boundHolds: boolean;
  readonly differenceNegative: boolean;
}

const sigmoid = (x: number): number => (x >= 0 ? 1 / (1 + Math.exp(-x)) : 1 - 1 / (1 + Math.exp(x)));

/** Corollary 1 from ‖g_w‖, ‖g_l‖ and β(1 - σ(s)). */
export function corollary1(weight: number, normChosen: number, normRejected: number): Corollary1Bounds {
  const excess = normChosen - normRejected;
  return {
    lowerChosen: weight * normChosen * excess,
    upperRejected: weight * normRejected * excess,
    promises: excess > 0 ? 'chosen rises' : excess < 0 ? 'rejected falls' : 'nothing',
  };
}

/** Corollary 2 from squared norms, the inner product and log-probabilities. */
export function corollary2(parts: {
  squaredChosen: number;
  squaredRejected: number;
  inner: number;
  logProbChosen: number;
  logProbRejected: number;
}): Corollary2 {
  const { squaredChosen, squaredRejected, inner } = parts;
  const largest = Math.max(parts.logProbChosen, parts.logProbRejected);
  const [w, l] = [Math.exp(parts.logProbChosen - largest), Math.exp(parts.logProbRejected - largest)];
  const probabilityDifference = w * (squaredChosen - inner) - l * (inner - squaredRejected);
  const claimedBound = w * squaredChosen - 2 * Math.sqrt(w * l) * inner + l * squaredRejected;
  const slack = 1e-9 * (w * squaredChosen + l * squaredRejected);
  const acute = inner > 1e-9 * Math.sqrt(squaredChosen * squaredRejected);
  return {
    logDifference: squaredChosen - 2 * inner + squaredRejected,
    probabilityDifference,
    claimedBound,
    // The difference less the bound is -(√π_w - √π_l)² ⟨g_w, g_l⟩: its sign, whatever its size.
    boundHolds: !acute || w === l,
    differenceNegative: probabilityDifference < -slack,
  };
}

function orders(errors: readonly number[], stepSizes: readonly number[]): number[] {
  return errors
    .slice(1)
    .map((e, i) => Math.log(Math.abs(errors[i] / e)) / Math.log(stepSizes[i] / stepSizes[i + 1]))
    .map((order) => (Number.isFinite(order) ? order : Number.NaN));
}

const isPositive = (x: number): boolean => x > 0 && Number.isFinite(x);

/** @throws KeelgradError for β or step sizes that are not finite and above 0, and for step sizes that do not fall */
export function checkTheoryOptions({ beta, stepSizes }: Pick<TheoryOptions, 'beta' | 'stepSizes'>): void {
  if (!isPositive(beta)) throw new KeelgradError(`[theory] beta: expected a finite number above 0, found ${beta}`);
  const bad = stepSizes.find((eta) => !isPositive(eta));
  if (stepSizes.length === 0 || bad !== undefined)
    throw new KeelgradError(`[theory] step sizes: expected finite numbers above 0, found ${bad ?? 'none'}`);
  // The last one is what reports call the smallest; two equal ones have no order of the error between them.
  if (stepSizes.some((eta, k) => k > 0 && !(eta < stepSizes[k - 1])))
    throw new KeelgradError(
      `[theory] step sizes: expected different ones in falling order, found ${stepSizes.join(', ')}; ` +
        `try ${[...new Set(stepSizes)].sort((a, b) => b - a).join(', ')}`,
    );
}

/** What the bounds promise beside what was measured, to within the rounding of log π. */
function checkedBounds(
  bounds: Corollary1Bounds,
  [chosen, rejected]: readonly SequenceChange[],
  stepSizes: readonly number[],
  epsilon: number,
): Corollary1 {
  const rounding = ({ logProb }: SequenceChange): number => 8 * epsilon * Math.abs(logProb);
  return {
    ...bounds,
    heldChosen: stepSizes.map((eta, k) => chosen.measured[k] >= eta * bounds.lowerChosen - rounding(chosen)),
    heldRejected: stepSizes.map((eta, k) => rejected.measured[k] <= eta * bounds.upperRejected + rounding(rejected)),
  };
}

async function analyzePair(model: CausalLM, pair: TheoryPair, options: TheoryOptions): Promise<TheoryResult> {
  const groups = options.groups ?? variableGroups(model);
  const { promptIds } = pair;
  const responses = [pair.chosenIds, pair.rejectedIds, ...(pair.others ?? [])];
  const sequences: Sequence[] = responses.map((responseIds) => ({ promptIds, responseIds }));
  using chosen = SequenceGradient.of(model, sequences[0], groups);
  using rejected = SequenceGradient.of(model, sequences[1], groups);
  const [squaredChosen, squaredRejected] = [await chosen.squaredNorm(), await rejected.squaredNorm()];
  const inner = await chosen.dot(rejected);
  const inners: [number, number][] = [
    [squaredChosen, inner],
    [inner, squaredRejected],
  ];
  for (const other of sequences.slice(2)) {
    using g = SequenceGradient.of(model, other, groups);
    inners.push([await g.dot(chosen), await g.dot(rejected)]);
  }
  const before = await logProbsOf(model, model.parameters, sequences);
  const [refChosen, refRejected] = [pair.refChosenLogp ?? before[0], pair.refRejectedLogp ?? before[1]];
  const s = options.beta * (before[0] - refChosen - (before[1] - refRejected));
  const weight = options.beta * sigmoid(-s);
  const after: number[][] = [];
  for (const eta of options.stepSizes) {
    const step = eta * weight; // -η ∇L = ηβ(1 - σ(s)) (g_w - g_l) (Eq. 27)
    const moves = [
      { step, along: chosen },
      { step: -step, along: rejected },
    ];
    after.push(await displaced(model, groups, moves, (moved) => logProbsOf(model, moved, sequences)));
  }
  const kinds = ['chosen', 'rejected'] as const;
  const changes = sequences.map((_, i): SequenceChange => {
    const predictedPerStepSize = weight * (inners[i][0] - inners[i][1]);
    const measured = after.map((values) => values[i] - before[i]);
    const error = measured.map((change, k) => change - options.stepSizes[k] * predictedPerStepSize);
    return {
      kind: kinds[i] ?? 'other',
      logProb: before[i],
      innerChosen: inners[i][0],
      innerRejected: inners[i][1],
      predictedPerStepSize,
      measured,
      error,
      order: orders(error, options.stepSizes),
    };
  });
  const [normChosen, normRejected] = [Math.sqrt(squaredChosen), Math.sqrt(squaredRejected)];
  const epsilon = model.dtype === 'float64' ? Number.EPSILON : 2 ** -23;
  return {
    s,
    weight,
    normChosen,
    normRejected,
    inner,
    cosine: inner / (normChosen * normRejected),
    termChosen: squaredChosen - inner,
    termRejected: inner - squaredRejected,
    sequences: changes,
    corollary1: checkedBounds(corollary1(weight, normChosen, normRejected), changes, options.stepSizes, epsilon),
    corollary2: corollary2({
      squaredChosen,
      squaredRejected,
      inner,
      logProbChosen: before[0],
      logProbRejected: before[1],
    }),
  };
}

/**
 * Theorem 1 and its corollaries on pairs, one at a time: gradients, first-order predictions, and the changes that one plain
 * gradient step of every size brings. The model's weights are not touched. Memory: four times the variables.
 *
 * @throws KeelgradError as checkTheoryOptions does, and in bfloat16, whose rounding hides such steps
 */
export async function analyzeTheory(
  model: CausalLM,
  pairs: readonly TheoryPair[],
  options: TheoryOptions,
): Promise<TheoryResult[]> {
  checkTheoryOptions(options);
  if (model.dtype !== 'float32' && model.dtype !== 'float64')
    throw new KeelgradError(
      `[theory] expected a model in float32 or float64, found ${model.dtype}, whose rounding hides small steps; load it in float64`,
    );
  const results: TheoryResult[] = [];
  for (const pair of pairs) {
    if (options.signal?.aborted) break;
    results.push(await analyzePair(model, pair, options));
    options.onProgress?.(results.length, pairs.length);
  }
  return results;
}
