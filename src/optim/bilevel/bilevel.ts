// A bilevel optimizer by value-function penalty, for any two objectives over two groups of variables (spo.md §2, Eqs. 7-12):
//
//   min_φ f(θ*(φ), φ)  s.t.  θ*(φ) ∈ argmin_θ g(θ, φ)
//
// is replaced by F = f(θ, φ) + λ [g(θ, φ) - g(θ_K, φ)] + Σ w_j h_j(θ, φ), with θ_K from K steps on g that hold φ, and constant in
// ∇F (Danskin). One step evaluates θ_K, ∇F for both groups, and moves both. θ is never overwritten by the lower level.
//
// SPO on language models is the same method with passes of its own (train/spo-task.ts): they share the lower level.
import { type AccumulatingSink, GradientBuffers } from '../../autograd/sinks.js';
import { differentiate } from '../../autograd/tape.js';
import { KeelgradError } from '../../errors.js';
import { add, mul } from '../../ops/elementwise.js';
import { onesLike, zeros } from '../../ops/movement.js';
import { scope } from '../../tensor/scope.js';
import type { Tensor } from '../../tensor/tensor.js';
import { Optimizer, type OptimizerOptions } from '../optimizer.js';
import { checkLowerLevel, descend, type LowerLevelOptions } from './lower-level.js';
import { WarmStart } from './warm-start.js';

/** Named tensors of one level. */
export type Variables = ReadonlyMap<string, Tensor>;

/** A scalar function of both levels. */
export type BilevelFunction = (variables: { lower: Variables; upper: Variables }) => Tensor;

/** A further term of F, as SPO's regularizer: `weight · value(θ, φ)`, the weight at least 0. */
export interface BilevelTerm {
  readonly name: string;
  readonly weight: number;
  readonly value: BilevelFunction;
}

export interface BilevelProblem {
  /** θ, moved in place. */
  readonly lower: Variables;
  /** φ, moved in place. */
  readonly upper: Variables;
  /** f, minimized over φ at the lower level's solution. */
  readonly upperObjective: BilevelFunction;
  /** g, minimized over θ. */
  readonly lowerObjective: BilevelFunction;
  readonly terms?: readonly BilevelTerm[];
}

export interface BilevelOptions {
  /** λ, or λ by step (from 0): a schedule, as `penaltySchedule` makes them. At least 0. */
  readonly penalty: number | ((step: number) => number);
  readonly lowerLevel: LowerLevelOptions & {
    /** Starts the lower level at its last solution instead of at θ. Off: the restart of Eq. 11. */
    readonly warmStart?: boolean;
  };
  /** Of θ and of φ. */
  readonly learningRates: { readonly lower: number; readonly upper: number };
  /** How both are moved; plain gradient descent unless given. */
  readonly optimizer?: OptimizerOptions;
}

/** What a step evaluated, before its update: scalars on the device, of the caller's scope. */
export interface BilevelStep {
  readonly penalty: number;
  readonly upper: Tensor;
  readonly lower: Tensor;
  /** g(θ_K, φ). */
  readonly lowerOptimum: Tensor;
  readonly terms: ReadonlyMap<string, Tensor>;
  /** F. */
  readonly objective: Tensor;
}

const plain: OptimizerOptions = { kind: 'sgd', momentum: 0, weightDecay: 0 };

export class BilevelOptimizer {
  private readonly problem: BilevelProblem;
  private readonly options: BilevelOptions;
  private readonly gradients: { lower: GradientBuffers; upper: GradientBuffers };
  private readonly optimizer: Optimizer;
  private readonly warm = new WarmStart();
  private count = 0;

  /** @throws KeelgradError for empty groups, rates or weights below 0, and a lower level that makes no sense */
  constructor(problem: BilevelProblem, options: BilevelOptions) {
    checkLowerLevel(options.lowerLevel);
    for (const group of ['lower', 'upper'] as const) {
      if (problem[group].size === 0) throw new KeelgradError(`${group} variables: expected at least one, found none`);
      const rate = options.learningRates[group];
      if (!(rate >= 0 && Number.isFinite(rate)))
        throw new KeelgradError(`${group} learning rate: expected a number of at least 0, found ${rate}`);
    }
    for (const { name, weight } of problem.terms ?? [])
      if (!(weight >= 0 && Number.isFinite(weight)))
        throw new KeelgradError(`weight of the term ${name}: expected a number of at least 0, found ${weight}`);
    this.problem = problem;
    this.options = options;
    this.gradients = { lower: new GradientBuffers(problem.lower), upper: new GradientBuffers(problem.upper) };
    this.optimizer = new Optimizer(
      (['lower', 'upper'] as const).map((name) => ({
        name,
        parameters: problem[name],
        gradients: this.gradients[name].buffers,
      })),
      options.optimizer ?? plain,
    );
  }

  /** Steps taken. */
  get steps(): number {
    return this.count;
  }

  /** ∇F of the last step, by group and name: overwritten by the next. */
  get gradientBuffers(): { lower: Variables; upper: Variables } {
    return { lower: this.gradients.lower.buffers, upper: this.gradients.upper.buffers };
  }

  /** One outer iteration: evaluates F and ∇F at (θ, φ), then moves both. */
  step(): BilevelStep {
    const result = this.evaluate();
    const { lower, upper } = this.options.learningRates;
    scope(() => {
      const skip = zeros([1], { dtype: 'float64', device: [...this.problem.lower.values()][0].device });
      this.optimizer.step([lower, upper], { factor: add(skip, 1), skip });
    });
    this.count++;
    return result;
  }

  /** F and its gradient at (θ, φ), left in `gradientBuffers`; nothing moves. */
  evaluate(): BilevelStep {
    const penalty = this.penalty();
    this.gradients.lower.zero();
    this.gradients.upper.zero();
    const lowerOptimum = this.solveLowerLevel(penalty);
    return { ...this.evaluateUpperLevel(penalty, lowerOptimum), penalty, lowerOptimum };
  }

  private penalty(): number {
    const { penalty } = this.options;
    const value = typeof penalty === 'number' ? penalty : penalty(this.count);
    if (!(value >= 0 && Number.isFinite(value)))
      throw new KeelgradError(
        `penalty (lambda): expected a number of at least 0, found ${value} at step ${this.count}`,
      );
    return value;
  }

  /** θ_K; adds -λ ∇_φ g(θ_K, φ), leaves θ's buffers zeroed, returns g(θ_K, φ). */
  private solveLowerLevel(penalty: number): Tensor {
    const { lower, upper, lowerObjective } = this.problem;
    const { lower: buffers, upper: upperBuffers } = this.gradients;
    const { warmStart, ...level } = this.options.lowerLevel;
    const start = this.warm.point?.theta ?? lower;
    const gradient = (theta: Variables): Variables => {
      buffers.zero();
      differentiateInto(theta, buffers.sinks(), (tracked) => lowerObjective({ lower: tracked, upper })).dispose();
      return buffers.buffers;
    };
    const solution = descend(start, start, gradient, level);
    try {
      const optimum = differentiateInto(upper, upperBuffers.sinks(-penalty), (tracked) =>
        lowerObjective({ lower: solution.theta, upper: tracked }),
      );
      if (warmStart) this.warm.keep(solution);
      return optimum;
    } finally {
      solution.release();
      buffers.zero();
    }
  }

  /** f + λ g + Σ w h at (θ, φ) in one pass. */
  private evaluateUpperLevel(penalty: number, lowerOptimum: Tensor): Omit<BilevelStep, 'penalty' | 'lowerOptimum'> {
    const { lower, upper, upperObjective, lowerObjective, terms = [] } = this.problem;
    const names = [...lower.keys(), ...upper.keys()];
    return scope(() => {
      const { result } = differentiate(
        [...lower.values(), ...upper.values()],
        (tracked) => {
          const map = (from: number, to: number): Variables =>
            new Map(names.slice(from, to).map((name, i) => [name, tracked[from + i]]));
          const variables = { lower: map(0, lower.size), upper: map(lower.size, names.length) };
          const f = upperObjective(variables);
          const g = lowerObjective(variables);
          const extra = terms.map((term) => ({ ...term, tensor: term.value(variables) }));
          const objective = extra.reduce(
            (total, term) => add(total, mul(term.tensor, term.weight)),
            add(f, mul(g, penalty)),
          );
          return { f, g, extra, objective };
        },
        ({ objective }) => [{ tensor: objective, cotangent: onesLike(objective) }],
        { sinks: [...this.gradients.lower.sinks(), ...this.gradients.upper.sinks()] },
      );
      const { f, g, extra, objective } = result;
      return {
        upper: f.detach(),
        lower: g.detach(),
        terms: new Map(extra.map(({ name, tensor }) => [name, tensor.detach()])),
        objective: add(objective.detach(), mul(lowerOptimum, -penalty)),
      };
    });
  }

  dispose(): void {
    this.optimizer.dispose();
    this.gradients.lower.dispose();
    this.gradients.upper.dispose();
    this.warm.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}

/** f(variables) with its gradient added to the sinks. */
function differentiateInto(
  variables: Variables,
  sinks: readonly AccumulatingSink[],
  f: (tracked: Variables) => Tensor,
): Tensor {
  const names = [...variables.keys()];
  return scope(() => {
    const { result } = differentiate(
      [...variables.values()],
      (tracked) => f(new Map(names.map((name, i) => [name, tracked[i]]))),
      (value) => [{ tensor: value, cotangent: onesLike(value) }],
      { sinks },
    );
    return result.detach();
  });
}
