// The lower level of a step of SPO (spo.md §2, Eq. 11): θ_K on the whole batch of the step, and what of it enters ∇_φ F.
// Never writes θ. Owns the last solution where the next step starts from it.
import { GradientBuffers } from '../autograd/sinks.js';
import { mul } from '../ops/elementwise.js';
import { firstStep } from '../optim/bilevel/first-step.js';
import { descend, type LowerSolver } from '../optim/bilevel/lower-level.js';
import { type StartingPoint, WarmStart } from '../optim/bilevel/warm-start.js';
import { sumOfSquares } from '../optim/clip.js';
import { detachFromScope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import type { SftTotals, SpoPasses } from './spo-passes.js';
import type { GroupName, StepInput, Trainable } from './task.js';

export interface SpoLowerOptions {
  lowerSteps: number;
  lowerLearningRate: number;
  /** How the lower level steps; its state is fresh in every outer step. Plain gradient descent unless given. */
  lowerSolver?: LowerSolver;
  /** Starts the lower level at its last solution instead of at θ. */
  lowerWarmStart?: boolean;
}

/** The step that the lower level serves. */
export interface LowerStep {
  microBatches: StepInput['microBatches'];
  totals: SftTotals;
  /** λ. */
  lambda: number;
}

type Theta = Map<string, Tensor>;

export class SpoLowerLevel {
  private readonly trainable: Trainable;
  private readonly passes: SpoPasses;
  private readonly options: SpoLowerOptions;
  private readonly masters: () => ReadonlyMap<string, Tensor>;
  private readonly warm = new WarmStart();

  constructor(
    trainable: Trainable,
    passes: SpoPasses,
    options: SpoLowerOptions,
    masters: () => ReadonlyMap<string, Tensor>,
  ) {
    this.trainable = trainable;
    this.passes = passes;
    this.options = options;
    this.masters = masters;
  }

  /**
   * Steps 1 and 2 of Algorithm 1: L*_SFT(φ) = L_SFT(θ_K, φ) by micro-batch, with -λ ∇_φ of it added to the adapters' buffers.
   * @param buffers of the backbone; overwritten
   * @param known whether they hold ∇_θ L_SFT(θ, φ) of the step already
   */
  optimum(buffers: GradientBuffers, known: boolean, step: LowerStep): Tensor[] {
    const point = this.warm.point;
    const { lowerSolver = 'gradient' } = this.options;
    if (known && !point && lowerSolver === 'gradient') return this.optimumFromFirstStep(buffers, step);
    const start = point ?? { theta: this.trainable.model.backbone, masters: this.masters() };
    const isKnown = known && !point;
    return this.descended(start, step, (theta, k) =>
      isKnown && k === 0 ? buffers.buffers : this.gradient(theta, buffers, step),
    );
  }

  /** θ_1 takes the memory of the gradient of the first step. */
  private optimumFromFirstStep({ buffers }: GradientBuffers, step: LowerStep): Tensor[] {
    const { model } = this.trainable;
    const { lowerSteps, lowerLearningRate } = this.options;
    const first = firstStep(buffers, this.masters(), model.backbone, lowerLearningRate);
    try {
      if (lowerSteps === 1) return this.evaluate(first, step);
      const next = new GradientBuffers(model.backbone);
      try {
        return this.descended(first, step, (theta) => this.gradient(theta, next, step), lowerSteps - 1);
      } finally {
        next.dispose();
      }
    } finally {
      first.release();
    }
  }

  private descended(
    start: StartingPoint,
    step: LowerStep,
    gradient: (theta: Theta, k: number) => ReadonlyMap<string, Tensor>,
    steps = this.options.lowerSteps,
  ): Tensor[] {
    const { lowerLearningRate: learningRate, lowerSolver: solver } = this.options;
    const solution = descend(start.theta, start.masters, gradient, { steps, learningRate, solver });
    try {
      return this.evaluate(solution, step);
    } finally {
      solution.release();
    }
  }

  /** L_SFT(θ_K, φ) and -λ ∇_φ of it. */
  private evaluate(solution: StartingPoint, { microBatches, totals, lambda }: LowerStep): Tensor[] {
    const { model, gradients } = this.trainable;
    const parameters = { ...model.parameters, backbone: new Map(solution.theta) };
    const into = { buffers: new Map([['adapters', gradients.get('adapters')!.buffers]] as const), scale: -lambda };
    const values = microBatches.map((indices) => this.passes.sft(indices, parameters, into, totals));
    if (this.options.lowerWarmStart) this.warm.keep(solution);
    return values;
  }

  /** Whether the next step starts where the last one ended, not at θ. */
  get isWarm(): boolean {
    return this.warm.point !== null;
  }

  /** ∇_θ L_SFT(θ, φ) of the whole step, and ∇_φ where there are buffers for it, into buffers that are zeroed first. */
  gradient(
    theta: Theta,
    buffers: GradientBuffers,
    { microBatches, totals }: LowerStep,
    phi?: GradientBuffers,
  ): ReadonlyMap<string, Tensor> {
    const parameters = { ...this.trainable.model.parameters, backbone: theta };
    const into = {
      buffers: new Map<GroupName, ReadonlyMap<string, Tensor>>([['backbone', buffers.buffers]]),
      scale: 1,
    };
    buffers.zero();
    phi?.zero();
    if (phi) into.buffers.set('adapters', phi.buffers);
    for (const indices of microBatches) this.passes.sft(indices, parameters, into, totals).dispose();
    return buffers.buffers;
  }

  /**
   * Adds λ [∇_φ L_SFT(θ, φ) - ∇_φ L_SFT(θ_K, φ)] ≈ λ α K ∇²_φθ L_SFT ∇_θ L_SFT, pair by pair; returns L_SFT(θ) - L_SFT(θ_K) ≈
   * α K |∇_θ L_SFT|² (spo.md §6).
   */
  firstOrder(gradient: ReadonlyMap<string, Tensor>, { microBatches, totals, lambda }: LowerStep): Tensor {
    const { lowerSteps, lowerLearningRate } = this.options;
    const distance = lowerLearningRate * lowerSteps;
    const gap = mul(sumOfSquares(gradient.values()), distance);
    if (lambda > 0)
      for (const index of microBatches.flat()) this.passes.firstOrder([index], gradient, lambda * distance, totals);
    return detachFromScope(gap);
  }

  dispose(): void {
    this.warm.dispose();
  }
}
