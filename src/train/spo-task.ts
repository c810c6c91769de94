// Stable Preference Optimization as a task of the loop: Algorithm 1 (spo.md §2), one outer iteration a step.
//
// The batch is the whole batch of the optimizer step: the lower level sees all of it, whatever the accumulation. Dropout is off.
import { GradientBuffers } from '../autograd/sinks.js';
import type { PreferenceExample } from '../data/tokenize.js';
import { KeelgradError } from '../errors.js';
import {
  addRegularizer,
  normCoefficients,
  type RegularizerMethod,
  type RegularizerProblem,
  regularizerValue,
  requireDifferences,
} from '../objectives/regularizer.js';
import type { SftReduction } from '../objectives/sft.js';
import { spoObjective } from '../objectives/spo.js';
import { mul } from '../ops/elementwise.js';
import { firstStep } from '../optim/bilevel/first-step.js';
import { descend } from '../optim/bilevel/lower-level.js';
import { sumOfSquares } from '../optim/clip.js';
import { collected, detachFromScope, scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { averageMetrics, quiet, total } from './batch-metrics.js';
import type { Metrics } from './hooks.js';
import { PreferenceObjective, type PreferenceSettings, type PreferenceStep } from './preference-objective.js';
import type { PreferenceReference } from './reference.js';
import { both, type MainPass, type Part, type SftTotals, SpoPasses, type SpoPassOptions } from './spo-passes.js';
import { TermMeter } from './spo-terms.js';
import { type GroupName, type StepInput, type StepMeasurement, type Task, type Trainable, tensorsOf } from './task.js';

export type SpoTaskOptions = PreferenceSettings & {
  lambda: number;
  gamma: number;
  lowerSteps: number;
  lowerLearningRate: number;
  /** Whose gradients the regularizer's norms run over. */
  normOver: 'all' | GroupName;
  sftReduction: SftReduction;
  /** The regularizer's norms divided by the length of the response: for losses that are normalized by length. */
  normPerToken?: boolean;
  /** How ∇R is found: exactly, or by finite differences, one sequence at a time (float32 and float64 only). */
  regularizerMethod?: RegularizerMethod;
  /**
   * How ∇_φ of the penalty (term b) is found: as the difference of the gradients at θ and θ_K, or to first order in the lower
   * level's step, which nothing cancels in. By default first-order with bfloat16 compute, where the difference drowns in
   * rounding, else the difference.
   */
  penaltyForm?: 'difference' | 'first-order';
  /** Reports the norms of terms (c) and (e) as well, which cost a pass over the backbone and a buffer of its size. */
  termNorms?: boolean;
};

/** Pairs that a recorded pass keeps in memory at a time: the derivatives of their norms need all of their activations. */
const PAIRS_AT_A_TIME = 1;

export class SpoTask implements Task {
  readonly trainable: Trainable;
  private readonly examples: readonly PreferenceExample[];
  private readonly objective: PreferenceObjective;
  private readonly options: SpoTaskOptions;
  private readonly masters: () => ReadonlyMap<string, Tensor>;
  private readonly passes: SpoPasses;
  private readonly passOptions: SpoPassOptions;
  /** Groups that the regularizer's norms run over. */
  private readonly normGroups: ReadonlySet<string>;
  private seenTokens = 0;

  /**
   * @param masters the backbone in its master dtype: where the lower level starts from
   * @throws KeelgradError where the regularizer's norms would run over no parameters
   */
  constructor(
    trainable: Trainable,
    examples: readonly PreferenceExample[],
    reference: PreferenceReference | null,
    options: SpoTaskOptions,
    masters: () => ReadonlyMap<string, Tensor>,
  ) {
    this.trainable = trainable;
    this.examples = examples;
    this.objective = new PreferenceObjective(trainable.model, examples, reference, options);
    this.options = options;
    this.masters = masters;
    const { lambda, sftReduction } = options;
    this.passOptions = { lambda, sftReduction, penalizeAdapters: options.lowerSteps > 0 && !this.firstOrder };
    this.passes = new SpoPasses(trainable, examples, this.objective, this.passOptions);
    this.normGroups = new Set(options.normOver === 'all' ? both : [options.normOver]);
    if (options.gamma > 0 && [...this.normGroups].every((g) => !trainable.gradients.get(g as GroupName)?.buffers.size))
      throw new KeelgradError(
        `norm over ${options.normOver}: expected parameters to take the regularizer's norms over, found none; use all, or gamma 0`,
      );
    if (options.gamma > 0 && options.regularizerMethod === 'finite-differences')
      requireDifferences(trainable.model.dtype);
  }

  records({ microBatches }: StepInput): number[] {
    return microBatches.flat().map((i) => this.examples[i].index);
  }

  async accumulate({ microBatches }: StepInput): Promise<StepMeasurement> {
    const { lambda, gamma, regularizerMethod } = this.options;
    const totals = this.sftTotals(microBatches);
    const chunks = this.recording ? microBatches.map((m) => chunked(m, PAIRS_AT_A_TIME)) : microBatches.map((m) => [m]);
    const begun = this.begin(chunks.flat());
    const step = begun.result;
    const parts = chunks.flat().map((indices, micro): Part => ({ indices, micro, step, totals }));
    const done = new Outcome();
    try {
      // LD-DPO weighs the tokens of a response: its gradient is none of the sequences'. DPO itself has its own bits.
      const apart = (this.options.ldAlpha ?? 1) !== 1 || (lambda === 0 && gamma === 0);
      if (apart) await this.passesApart(parts, microBatches, totals, done);
      else await this.passesShared(parts, microBatches, totals, done);
      if (gamma > 0 && regularizerMethod === 'finite-differences') await this.differences(microBatches.flat(), done);
    } catch (error) {
      done.dispose();
      throw error;
    } finally {
      begun.release();
    }
    return { losses: done.losses, metrics: quiet(this.metrics(done, step, chunks)) };
  }

  dispose(): void {
    this.objective.dispose();
  }

  /** The step's loss over its parts, which holds tensors until it is released. */
  private begin(parts: readonly (readonly number[])[]): { result: PreferenceStep; release(): void } {
    const pairs = parts.flat().length;
    const shares = parts.map((indices) => indices.length / pairs);
    return collected(() => this.objective.begin(parts, shares));
  }

  /** L_DPO, L_SFT, the first step of the lower level and the norms from one pass a part; then L*_SFT. */
  private async passesShared(
    parts: readonly Part[],
    microBatches: StepInput['microBatches'],
    totals: SftTotals,
    done: Outcome,
  ): Promise<void> {
    if (this.options.lowerSteps === 0) return this.mainPasses(parts, null, null, done);
    const { model } = this.trainable;
    using theta = new Disposable(new GradientBuffers(model.backbone));
    using phi = new Disposable(new GradientBuffers(model.adapters));
    for (const buffers of [theta.of, phi.of]) buffers.zero();
    const second = new Map([...theta.of.buffers, ...phi.of.buffers]);
    const meter = new TermMeter(
      this.trainable,
      { ...this.passOptions, all: this.options.termNorms ?? false },
      this.recording,
    );
    try {
      await this.mainPasses(parts, second, meter, done);
      meter.finishMain(second);
      const gradient = theta.of.buffers;
      if (this.firstOrder) scope(() => this.penaltyToFirstOrder(gradient, microBatches, totals, done));
      else scope(() => this.lowerLevelFrom(gradient, microBatches, totals, done));
      meter.finishStep();
      done.terms = quiet(meter.metrics().finally(() => meter.dispose()));
    } catch (error) {
      meter.dispose();
      throw error;
    }
  }

  private async mainPasses(
    parts: readonly Part[],
    second: ReadonlyMap<string, Tensor> | null,
    meter: TermMeter | null,
    done: Outcome,
  ): Promise<void> {
    for (const part of parts) {
      if (this.recording)
        await this.regularized(part, second, { accumulate: true, regularizer: meter?.regularizer }, done);
      else done.add(scope(() => this.passes.shared(part, second)));
    }
  }

  /** The order of Algorithm 1: θ̂ and L*_SFT first, then one pass a part with the whole cotangent. */
  private async passesApart(
    parts: readonly Part[],
    microBatches: StepInput['microBatches'],
    totals: SftTotals,
    done: Outcome,
  ): Promise<void> {
    const { lowerSteps, lambda } = this.options;
    if (lowerSteps > 0 || lambda > 0) scope(() => this.lowerLevel(microBatches, totals, done));
    for (const part of parts) done.add(scope(() => this.passes.plain(part)));
    if (this.recording) for (const part of parts) await this.regularized(part, null, { accumulate: false }, done);
  }

  /** Whether the main pass is recorded, for exact derivatives of norms. */
  private get recording(): boolean {
    const { gamma, regularizerMethod } = this.options;
    return gamma > 0 && regularizerMethod !== 'finite-differences';
  }

  private get firstOrder(): boolean {
    const { penaltyForm, lowerSteps } = this.options;
    const form = penaltyForm ?? (this.trainable.model.dtype === 'bfloat16' ? 'first-order' : 'difference');
    return lowerSteps > 0 && form === 'first-order';
  }

  // ---- lower level --------------------------------------------------------------------------------------------------

  /** ∇_θ L_SFT(θ, φ) of the whole step into zeroed buffers. */
  private lowerGradient(
    theta: Map<string, Tensor>,
    buffers: GradientBuffers,
    microBatches: StepInput['microBatches'],
    totals: SftTotals,
  ): ReadonlyMap<string, Tensor> {
    const parameters = { ...this.trainable.model.parameters, backbone: theta };
    const into = { buffers: buffers.buffers, scale: 1 };
    buffers.zero();
    for (const indices of microBatches) this.passes.sft(indices, parameters, 'backbone', into, totals).dispose();
    return buffers.buffers;
  }

  /** θ̂ from the gradient of its first step, which is overwritten; then step 2 of Algorithm 1. */
  private lowerLevelFrom(
    gradient: ReadonlyMap<string, Tensor>,
    microBatches: StepInput['microBatches'],
    totals: SftTotals,
    done: Outcome,
  ): void {
    const { model } = this.trainable;
    const { lowerSteps, lowerLearningRate: learningRate } = this.options;
    const first = firstStep(gradient, this.masters(), model.backbone, learningRate);
    using _ = new Disposable({ dispose: () => first.release() });
    if (lowerSteps === 1) {
      this.lowerOptimum(first.theta, microBatches, totals, done);
      return;
    }
    using buffers = new Disposable(new GradientBuffers(model.backbone));
    const next = (theta: Map<string, Tensor>): ReadonlyMap<string, Tensor> =>
      this.lowerGradient(theta, buffers.of, microBatches, totals);
    const solution = descend(first.theta, first.masters, next, { steps: lowerSteps - 1, learningRate });
    using _solution = new Disposable({ dispose: () => solution.release() });
    this.lowerOptimum(solution.theta, microBatches, totals, done);
  }

  /**
   * λ [∇_φ L_SFT(θ, φ) - ∇_φ L_SFT(θ_K, φ)] ≈ λ α K ∇²_φθ L_SFT ∇_θ L_SFT, and L_SFT(θ) - L_SFT(θ_K) ≈ α K |∇_θ L_SFT|² (spo.md
   * §6).
   */
  private penaltyToFirstOrder(
    gradient: ReadonlyMap<string, Tensor>,
    microBatches: StepInput['microBatches'],
    totals: SftTotals,
    done: Outcome,
  ): void {
    const { lambda, lowerSteps, lowerLearningRate } = this.options;
    const distance = lowerLearningRate * lowerSteps;
    done.gap = detachFromScope(mul(sumOfSquares(gradient.values()), distance));
    if (lambda === 0) return;
    for (const indices of chunked(microBatches.flat(), PAIRS_AT_A_TIME))
      this.passes.firstOrder(indices, gradient, lambda * distance, totals);
  }

  /** Steps 1 and 2 of Algorithm 1 by themselves; leaves the backbone's buffers zeroed. */
  private lowerLevel(microBatches: StepInput['microBatches'], totals: SftTotals, done: Outcome): void {
    const { model, gradients } = this.trainable;
    const { lowerSteps: steps, lowerLearningRate: learningRate } = this.options;
    const buffers = gradients.get('backbone')!;
    const next = (theta: Map<string, Tensor>): ReadonlyMap<string, Tensor> =>
      this.lowerGradient(theta, buffers, microBatches, totals);
    const solution = descend(model.backbone, this.masters(), next, { steps, learningRate });
    using _ = new Disposable({ dispose: () => solution.release() });
    buffers.zero();
    this.lowerOptimum(solution.theta, microBatches, totals, done);
  }

  /** L*_SFT(φ) = L_SFT(θ_K, φ), with -λ ∇_φ of it added to the adapters' buffers. */
  private lowerOptimum(
    theta: Map<string, Tensor>,
    microBatches: StepInput['microBatches'],
    totals: SftTotals,
    done: Outcome,
  ): void {
    const { model, gradients } = this.trainable;
    const parameters = { ...model.parameters, backbone: theta };
    const into = { buffers: gradients.get('adapters')!.buffers, scale: -this.options.lambda };
    for (const indices of microBatches) done.star(this.passes.sft(indices, parameters, 'adapters', into, totals));
  }

  // ---- regularizer --------------------------------------------------------------------------------------------------

  /** A pass with norms; only where a pair is active, γ ∇R of it is added to the buffers. */
  private async regularized(
    part: Part,
    second: ReadonlyMap<string, Tensor> | null,
    options: Parameters<SpoPasses['recorded']>[2],
    done: Outcome,
  ): Promise<void> {
    const pass = scope(() => this.passes.recorded(part, second, options));
    try {
      if (options.accumulate) done.add(pass);
      else for (const t of [pass.dpo, pass.sft]) t.dispose();
      const groups = [...pass.recorded.squaredNorms].filter(([group]) => this.normGroups.has(group));
      const squares = await Promise.all(groups.map(([, t]) => t.data()));
      const norms = Array.from(squares[0], (_, s) => Math.sqrt(squares.reduce((n, values) => n + values[s], 0)));
      const inner = [...pass.recorded.innerProducts].filter(([group]) => this.normGroups.has(group));
      const products = await Promise.all(inner.map(([, t]) => t.data()));
      if (inner.length > 0)
        done.cosine(
          products.reduce((n, [value]) => n + value, 0),
          norms,
        );
      const coefficients = this.normCoefficients(part, norms, done);
      if (coefficients.some((c) => c !== 0)) pass.recorded.addSquareGradients(coefficients, this.normGroups);
    } finally {
      pass.dispose();
    }
  }

  /** Of the squared norms in γ R, by ∇‖g‖ = ∇‖g‖² / 2‖g‖. */
  private normCoefficients({ indices, totals }: Part, norms: readonly number[], done: Outcome): number[] {
    const count = indices.length;
    const divisors = this.normDivisors(indices);
    const scaled = norms.map((n, s) => n / divisors[s]);
    done.norms(norms, scaled);
    const weight = (this.options.gamma * count) / totals.sequences;
    return normCoefficients(scaled, count, weight).map((c, s) => (norms[s] > 0 ? c / (divisors[s] * 2 * norms[s]) : 0));
  }

  /** What the norms of sequences, chosen first, are divided by. */
  private normDivisors(indices: readonly number[]): number[] {
    const scored = (of: 'chosenIds' | 'rejectedIds') => (i: number) =>
      this.examples[i][of].length - (this.examples[i].promptIds.length === 0 ? 1 : 0);
    const lengths = [...indices.map(scored('chosenIds')), ...indices.map(scored('rejectedIds'))];
    return this.options.normPerToken ? lengths : lengths.map(() => 1);
  }

  /** γ ∇R of the whole step by finite differences. */
  private async differences(indices: readonly number[], done: Outcome): Promise<void> {
    const { model, gradients } = this.trainable;
    const variables = tensorsOf(model.parameters, both);
    const groups = both.flatMap((g) => [...gradients.get(g)!.buffers.keys()].map(() => g));
    const problem: RegularizerProblem = {
      variables,
      normOver: groups.map((g) => this.normGroups.has(g)),
      logProb: (values, sequence) => this.passes.sequenceLogProb(indices, values, sequence),
    };
    const buffers = both.flatMap((g) => [...gradients.get(g)!.buffers.values()]);
    const divisors = this.normDivisors(indices);
    const options = { method: 'finite-differences', divisors } as const;
    const { chosenNorms, rejectedNorms } = await addRegularizer(
      problem,
      indices.length,
      this.options.gamma,
      buffers,
      options,
    );
    const scaled = [...chosenNorms, ...rejectedNorms];
    done.norms(
      scaled.map((n, s) => n * divisors[s]),
      scaled,
    );
  }

  // ---- metrics ------------------------------------------------------------------------------------------------------

  private sftTotals(microBatches: StepInput['microBatches']): SftTotals {
    const indices = microBatches.flat();
    const scored = (i: number): number =>
      this.examples[i].chosenIds.length - (this.examples[i].promptIds.length === 0 ? 1 : 0);
    return { tokens: indices.reduce((n, i) => n + scored(i), 0), sequences: indices.length };
  }

  private metrics(done: Outcome, step: PreferenceStep, chunks: readonly (readonly unknown[])[]): Promise<Metrics> {
    const { lambda, gamma } = this.options;
    this.seenTokens += done.tokens;
    const seen = this.seenTokens;
    const { dpo, sft, optimum, gap } = done;
    const starOf = optimum.length > 0 ? optimum : sft;
    const sums = Promise.all([total(dpo), total(sft), total(starOf), gap ? total([gap]) : 0]);
    const parts = Promise.all(done.measured);
    const regularizer = gamma > 0 ? done.regularizerMetrics() : { 'spo/regularizer': 0 };
    return Promise.all([sums, step.metrics, parts, done.terms]).then(([values, ofStep, measured, terms]) => {
      const [dpoValue, sftValue, star, gapValue] = values;
      const sftStar = star - gapValue;
      const parts = { dpo: dpoValue, sft: sftValue, sftStar, regularizer: regularizer['spo/regularizer'] };
      let at = 0;
      const byMicroBatch = chunks.map((c) => {
        at += c.length;
        return averageMetrics(measured.slice(at - c.length, at));
      });
      return {
        loss: spoObjective(parts, { lambda, gamma }),
        'spo/dpo': dpoValue,
        'spo/sft': sftValue,
        'spo/sft_star': sftStar,
        'spo/sft_gap': gap ? gapValue : sftValue - sftStar,
        'spo/first_order': Number(this.firstOrder),
        ...regularizer,
        ...terms,
        ...averageMetrics(byMicroBatch),
        ...ofStep,
        num_tokens: seen,
      };
    });
  }
}

/** What a step's passes leave behind. */
class Outcome {
  readonly dpo: Tensor[] = [];
  readonly sft: Tensor[] = [];
  readonly optimum: Tensor[] = [];
  /** L_SFT(θ) - L_SFT(θ_K) where it was found to first order. */
  gap: Tensor | null = null;
  /** Norms of the terms of the gradient. */
  terms: Promise<Record<string, number>> = Promise.resolve({});
  readonly measured: Promise<Record<string, number>>[] = [];
  tokens = 0;
  /** Norms of chosen and rejected gradients, and the same as R compares them. */
  private readonly plain: [number[], number[]] = [[], []];
  private readonly compared: [number[], number[]] = [[], []];
  private readonly cosines: number[] = [];

  add(pass: MainPass): void {
    this.dpo.push(pass.dpo);
    this.sft.push(pass.sft);
    this.measured.push(quiet(pass.metrics));
    this.tokens += pass.tokens;
  }

  star(value: Tensor): void {
    this.optimum.push(detachFromScope(value));
  }

  /** Of some pairs, chosen first. */
  norms(plain: readonly number[], compared: readonly number[]): void {
    const half = plain.length / 2;
    for (const [into, norms] of [
      [this.plain, plain],
      [this.compared, compared],
    ] as const)
      for (const side of [0, 1]) into[side].push(...norms.slice(side * half, (side + 1) * half));
  }

  /** Of one pair's gradients. */
  cosine(inner: number, [chosen, rejected]: readonly number[]): void {
    this.cosines.push(chosen * rejected > 0 ? inner / (chosen * rejected) : 0);
  }

  regularizerMetrics(): Record<string, number> {
    const { value, activeFraction } = regularizerValue(...this.compared);
    return {
      'spo/regularizer': value,
      'spo/active_fraction': activeFraction,
      'grad_norm/chosen': mean(this.plain[0]),
      'grad_norm/rejected': mean(this.plain[1]),
      ...(this.cosines.length > 0 && { grad_cosine: mean(this.cosines) }),
    };
  }

  get losses(): Tensor[] {
    return [...this.dpo, ...this.sft, ...this.optimum, ...(this.gap ? [this.gap] : [])];
  }

  dispose(): void {
    for (const t of this.losses) t.dispose();
  }
}

/** Something to be disposed of at the end of a block. */
class Disposable<T extends { dispose(): void }> {
  readonly of: T;
  constructor(of: T) {
    this.of = of;
  }
  [Symbol.dispose](): void {
    this.of.dispose();
  }
}

function chunked<T>(items: readonly T[], size: number): T[][] {
  const chunks: T[][] = [];
  for (let i = 0; i < items.length; i += size) chunks.push(items.slice(i, i + size));
  return chunks;
}

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;
