// Stable Preference Optimization as a task of the loop: Algorithm 1 (spo.md §2), one outer iteration a step.
//
// The batch is the whole batch of the optimizer step: the lower level sees all of it, whatever the accumulation. Dropout is off.
import { UnstreamedOp } from '../autograd/pull-back.js';
import { GradientBuffers } from '../autograd/sinks.js';
import type { PreferenceExample } from '../data/tokenize.js';
import { KeelgradError } from '../errors.js';
import {
  addRegularizer,
  normCoefficients,
  type RegularizerMethod,
  type RegularizerProblem,
  requireDifferences,
} from '../objectives/regularizer.js';
import type { SftReduction } from '../objectives/sft.js';
import { spoObjective } from '../objectives/spo.js';
import { scaleInPlace } from '../ops/elementwise.js';
import { type PenaltyScheduleName, penaltySchedule } from '../optim/bilevel/penalty-schedule.js';
import { collected, scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { averageMetrics, mergePairMetrics, quiet, total } from './batch-metrics.js';
import type { Metrics } from './hooks.js';
import { PreferenceObjective, type PreferenceSettings, type PreferenceStep } from './preference-objective.js';
import type { PreferenceReference } from './reference.js';
import { type LowerStep, SpoLowerLevel, type SpoLowerOptions } from './spo-lower.js';
import { Outcome, type PairProducts, readProducts } from './spo-outcome.js';
import { partsWithin, recordedBudget, recordedBytes } from './spo-parts.js';
import { both, type MainPass, type Part, type SftTotals, SpoPasses, type SpoPassOptions } from './spo-passes.js';
import { checkpointingConflict, inWords, isFirstOrder, type PenaltyForm } from './spo-rules.js';
import { TermMeter } from './spo-terms.js';
import { type GroupName, type StepInput, type StepMeasurement, type Task, type Trainable, tensorsOf } from './task.js';

export type SpoTaskOptions = PreferenceSettings &
  SpoLowerOptions & {
    lambda: number;
    /** How λ gets from 0 to its value over the first steps. */
    lambdaSchedule?: PenaltyScheduleName;
    lambdaRampSteps?: number;
    gamma: number;
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
    penaltyForm?: PenaltyForm;
    /**
     * Reports the norms of terms (c) and (e) as well where they cost a pass over the backbone and a buffer of its size: with gamma
     * above 0, and without a lower level.
     */
    termNorms?: boolean;
    /**
     * Whether to measure the gradients of single sequences (their norms and cosine, R) where gamma does not need it: `auto`,
     * where the main pass forms them anyway; `on`, at the cost of a pass where it does not; `off`.
     */
    gradNorms?: 'auto' | 'on' | 'off';
  };

/** Indices by micro-batch and part. */
type Chunks = readonly (readonly (readonly number[])[])[];
type Buffers = ReadonlyMap<GroupName, GradientBuffers>;

const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);

export class SpoTask implements Task {
  readonly trainable: Trainable;
  private readonly examples: readonly PreferenceExample[];
  private readonly objective: PreferenceObjective;
  private readonly options: SpoTaskOptions;
  private readonly passes: SpoPasses;
  private readonly passOptions: SpoPassOptions;
  private readonly lower: SpoLowerLevel;
  /** λ by step. */
  private readonly lambdaAt: (step: number) => number;
  /** Whether term (b) is taken to first order. */
  private readonly firstOrder: boolean;
  /** Groups that the regularizer's norms run over. */
  private readonly normGroups: ReadonlySet<string>;
  /** Whether the model has an op that cannot keep the gradients of sequences apart. */
  private streamless = false;
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
    const { lambda, lambdaSchedule, lambdaRampSteps, sftReduction, lowerSteps, penaltyForm } = options;
    this.lambdaAt = penaltySchedule({ value: lambda, name: lambdaSchedule, rampSteps: lambdaRampSteps });
    this.firstOrder = isFirstOrder({ dtype: trainable.model.dtype, lowerSteps, penaltyForm });
    const penalizeAdapters = lowerSteps > 0 && !this.firstOrder;
    this.passOptions = { sftReduction, penalizeAdapters, checkpointing: options.gradientCheckpointing ?? false };
    this.passes = new SpoPasses(trainable, examples, this.objective, this.passOptions);
    this.lower = new SpoLowerLevel(trainable, this.passes, options, masters);
    this.normGroups = new Set(options.normOver === 'all' ? both : [options.normOver]);
    requirePossible(trainable, options);
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

  async accumulate({ step: number, microBatches }: StepInput): Promise<StepMeasurement> {
    const lambda = this.lambdaAt(number);
    const totals = this.sftTotals(microBatches);
    const lower = { microBatches, totals, lambda };
    const chunks = microBatches.map((pairs) => (this.recording ? this.recordedParts(pairs) : [pairs]));
    const begun = this.begin(chunks.flat());
    const step = begun.result;
    const parts = chunks.flat().map((indices, micro): Part => ({ indices, micro, step, totals, lambda }));
    const done = new Outcome();
    try {
      await this.takePasses(parts, lower, done);
    } catch (error) {
      done.dispose();
      throw error instanceof UnstreamedOp ? this.explained(error) : error;
    } finally {
      begun.release();
    }
    return { losses: done.losses, metrics: quiet(this.metrics(done, step, chunks, lambda)) };
  }

  dispose(): void {
    this.objective.dispose();
    this.lower.dispose();
  }

  /** The step's loss over its parts, which holds tensors until it is released. */
  private begin(parts: readonly (readonly number[])[]): { result: PreferenceStep; release(): void } {
    const pairs = parts.flat().length;
    const shares = parts.map((indices) => indices.length / pairs);
    return collected(() => this.objective.begin(parts, shares));
  }

  private async takePasses(parts: readonly Part[], lower: LowerStep, done: Outcome): Promise<void> {
    if (this.apart) return this.passesApart(parts, lower, done);
    try {
      await this.passesShared(parts, lower, done);
    } catch (error) {
      // Nothing is lost but that one pass does the work of several; the first part is where it shows.
      const canDoWithout = !this.recording && this.options.gradNorms !== 'on' && done.losses.length === 0;
      if (!(error instanceof UnstreamedOp && canDoWithout)) throw error;
      this.streamless = true;
      this.trainable.zeroGradients();
      await this.passesApart(parts, lower, done);
    }
  }

  /** What an op that cannot keep the gradients of sequences apart rules out, and what to do instead. */
  private explained({ op }: UnstreamedOp): UnstreamedOp {
    const { gamma } = this.options;
    if (this.recording)
      return new UnstreamedOp(
        op,
        `gamma ${gamma} takes second derivatives of each sequence's log-probability through it: use gamma 0, or the regularizer method finite-differences`,
      );
    if (this.options.gradNorms === 'on') return new UnstreamedOp(op, 'grad norms on needs one: use grad norms off');
    return new UnstreamedOp(
      op,
      "the first-order form of the penalty's gradient (term b) needs one: use penalty form difference, or lambda 0",
    );
  }

  /** Whether L_SFT has passes of its own, the order of Algorithm 1, instead of a share in the main pass. */
  private get apart(): boolean {
    const { ldAlpha = 1, lambda, gamma } = this.options;
    // LD-DPO weighs the tokens of a response: its gradient is none of the sequences'. DPO itself has its own bits.
    return ldAlpha !== 1 || (lambda === 0 && gamma === 0) || this.streamless;
  }

  /** Whether the gradients of single sequences are measured: R needs it; elsewhere by what it costs, or as asked for. */
  private get measures(): boolean {
    const { gamma, gradNorms = 'auto', lowerSteps } = this.options;
    if (gamma > 0 || gradNorms === 'on') return !this.streamless;
    // The main pass with a lower level forms these gradients anyway.
    return gradNorms === 'auto' && lowerSteps > 0 && !this.apart;
  }

  /** L_DPO, L_SFT, the first step of the lower level and the norms from one pass a part; then L*_SFT. */
  private async passesShared(parts: readonly Part[], lower: LowerStep, done: Outcome): Promise<void> {
    const { lowerSteps, termNorms = false } = this.options;
    if (lowerSteps === 0 && !termNorms) {
      await this.metered(done, lower, async (meter) => {
        await this.mainPasses(parts, null, meter, done);
        meter.finishMain(null);
        meter.finishStep();
      });
      return;
    }
    const { model } = this.trainable;
    using theta = new Disposable(new GradientBuffers(model.backbone));
    using phi = new Disposable(new GradientBuffers(model.adapters));
    for (const buffers of [theta.of, phi.of]) buffers.zero();
    const second = new Map([...theta.of.buffers, ...phi.of.buffers]);
    await this.metered(done, lower, async (meter) => {
      await this.mainPasses(parts, second, meter, done);
      meter.finishMain(second);
      if (this.firstOrder) scope(() => this.penaltyToFirstOrder(theta.of, lower, done));
      else if (lowerSteps > 0) scope(() => done.star(this.lower.optimum(theta.of, true, lower)));
      meter.finishStep();
    });
  }

  /** Runs passes beside a meter of the terms, whose reading goes into the outcome. */
  private async metered(done: Outcome, lower: LowerStep, passes: (meter: TermMeter) => Promise<void>): Promise<void> {
    const { lowerSteps, gamma, termNorms = false } = this.options;
    const weights = { ...this.passOptions, lambda: lower.lambda, all: termNorms, lower: lowerSteps > 0 };
    const meter = new TermMeter(this.trainable, weights, gamma > 0);
    try {
      await passes(meter);
      done.terms = quiet(meter.metrics().finally(() => meter.dispose()));
    } catch (error) {
      meter.dispose();
      throw error;
    }
  }

  private async mainPasses(
    parts: readonly Part[],
    second: ReadonlyMap<string, Tensor> | null,
    { regularizer }: TermMeter,
    done: Outcome,
  ): Promise<void> {
    for (const part of parts) {
      if (this.recording) await this.regularized(part, second, { accumulate: true, regularizer }, done);
      else done.add(scope(() => this.sharedPass(part, second, done)));
    }
    await this.differences(parts, regularizer, done);
  }

  private sharedPass(part: Part, second: ReadonlyMap<string, Tensor> | null, done: Outcome): MainPass {
    const { products, ...pass } = this.passes.shared(part, second, this.measures);
    if (products) this.notePairs(part, readProducts(products, this.normGroups), done);
    return pass;
  }

  private notePairs({ indices }: Part, products: PairProducts, done: Outcome): void {
    done.pairs(products, this.normDivisors(indices));
  }

  /** The order of Algorithm 1: θ̂ and L*_SFT first, then one pass a part with the whole cotangent. */
  private async passesApart(parts: readonly Part[], lower: LowerStep, done: Outcome): Promise<void> {
    const { lambda, lowerSteps } = this.options;
    const known = lowerSteps === 0 || lambda === 0 || this.firstOrder || !this.lower.isWarm;
    await this.metered(done, lower, async (meter) => {
      scope(() => this.lowerApart(lower, meter, done));
      const rest = this.firstOrder ? parts.map((part) => ({ ...part, lambda: 0 })) : parts;
      for (const part of rest) done.add(scope(() => this.passes.plain(part)));
      for (const part of this.measures ? parts : []) {
        if (this.recording)
          await this.regularized(part, null, { accumulate: false, regularizer: meter.regularizer }, done);
        else scope(() => this.notePairs(part, readProducts(this.passes.measured(part), this.normGroups), done));
      }
      await this.differences(parts, meter.regularizer, done);
      meter.finishApart(known, lambda > 0);
    });
  }

  /** L*_SFT with its share of the adapters' gradient, before everything else. */
  private lowerApart(lower: LowerStep, meter: TermMeter, done: Outcome): void {
    const { lowerSteps, lambda } = this.options;
    const { model, gradients } = this.trainable;
    const buffers = gradients.get('backbone')!;
    if (this.firstOrder) {
      this.lower.gradient(model.backbone, buffers, lower);
      this.penaltyToFirstOrder(buffers, lower, done);
      // What is left in the buffers is ∇_θ L_SFT: term (d), which the main passes then leave out.
      for (const t of buffers.buffers.values()) scaleInPlace(t, lower.lambda);
      meter.noteD(buffers.buffers, 1);
      meter.startApart(null);
    } else if (lowerSteps > 0 && lambda > 0 && !this.lower.isWarm) {
      using phi = new Disposable(new GradientBuffers(model.adapters));
      this.lower.gradient(model.backbone, buffers, lower, phi.of);
      meter.noteD(buffers.buffers);
      done.star(this.lower.optimum(buffers, true, lower));
      meter.startApart(phi.of.buffers);
      buffers.zero();
    } else if (lowerSteps > 0 || lambda > 0) {
      done.star(this.lower.optimum(buffers, false, lower));
      buffers.zero();
    }
  }

  private penaltyToFirstOrder(gradient: GradientBuffers, lower: LowerStep, done: Outcome): void {
    done.gap = this.lower.firstOrder(gradient.buffers, lower);
  }

  /** Whether the main pass is recorded, for exact derivatives of norms. */
  private get recording(): boolean {
    const { gamma, regularizerMethod } = this.options;
    return gamma > 0 && regularizerMethod !== 'finite-differences';
  }

  /** The pairs of a micro-batch by recorded pass. */
  private recordedParts(pairs: readonly number[]): number[][] {
    const rows = ({ promptIds, chosenIds, rejectedIds }: PreferenceExample): number =>
      2 * promptIds.length + chosenIds.length + rejectedIds.length;
    return partsWithin(
      pairs,
      (i) => recordedBytes(this.trainable.model, rows(this.examples[i])),
      recordedBudget(this.trainable.model),
    );
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
      if (pass.main) done.add(pass.main);
      const products = readProducts(pass.recorded, this.normGroups);
      this.notePairs(part, products, done);
      // The one read that a step waits for: which pairs are active.
      const coefficients = this.normCoefficients(part, Array.from(await products.squares, Math.sqrt));
      if (coefficients.some((c) => c !== 0)) pass.recorded.addSquareGradients(coefficients, this.normGroups);
    } finally {
      pass.dispose();
    }
  }

  /** Of the squared norms in γ R, by ∇‖g‖ = ∇‖g‖² / 2‖g‖. */
  private normCoefficients({ indices, totals }: Part, norms: readonly number[]): number[] {
    const count = indices.length;
    const divisors = this.normDivisors(indices);
    const scaled = norms.map((n, s) => n / divisors[s]);
    const weight = (this.options.gamma * count) / totals.sequences;
    return normCoefficients(scaled, count, weight).map((c, s) => (norms[s] > 0 ? c / (divisors[s] * 2 * norms[s]) : 0));
  }

  /** What the norms of sequences, chosen first, are divided by. */
  private normDivisors(indices: readonly number[]): number[] {
    const lengths = (['chosenIds', 'rejectedIds'] as const).flatMap((of) => indices.map((i) => this.scored(i, of)));
    return this.options.normPerToken ? lengths : lengths.map(() => 1);
  }

  /** γ ∇R of the whole step by finite differences, where they were asked for; into `into` where it has a group's buffers. */
  private async differences(parts: readonly Part[], into: Buffers | undefined, done: Outcome): Promise<void> {
    const { gamma, regularizerMethod } = this.options;
    if (!(gamma > 0 && regularizerMethod === 'finite-differences')) return;
    const { model, gradients } = this.trainable;
    const indices = parts.flatMap((part) => part.indices);
    const groups = both.flatMap((g) => [...gradients.get(g)!.buffers.keys()].map(() => g));
    const problem: RegularizerProblem = {
      variables: tensorsOf(model.parameters, both),
      normOver: groups.map((g) => this.normGroups.has(g)),
      logProb: (values, sequence) => this.passes.sequenceLogProb(indices, values, sequence),
    };
    const buffers = both.flatMap((g) => [...(into?.get(g) ?? gradients.get(g)!).buffers.values()]);
    const divisors = this.normDivisors(indices);
    const options = { method: 'finite-differences', divisors } as const;
    const found = await addRegularizer(problem, indices.length, gamma, buffers, options);
    if (done.hasPairs) return;
    const norms = [...found.chosenNorms, ...found.rejectedNorms].map((n, s) => n * divisors[s]);
    done.pairs({ squares: Promise.resolve(norms.map((n) => n * n)), inner: null }, divisors);
  }

  // ---- metrics ------------------------------------------------------------------------------------------------------

  private sftTotals(microBatches: StepInput['microBatches']): SftTotals {
    const indices = microBatches.flat();
    return { tokens: sum(indices.map((i) => this.scored(i, 'chosenIds'))), sequences: indices.length };
  }

  /** Tokens of a response that have a log-probability: without a prompt, all but the first. */
  private scored(i: number, of: 'chosenIds' | 'rejectedIds'): number {
    const { promptIds, [of]: ids } = this.examples[i];
    return ids.length - (promptIds.length === 0 ? 1 : 0);
  }

  /** One set of metrics a micro-batch, of the parts that it was taken in. */
  private merged(measured: readonly Record<string, number>[], chunks: Chunks): Record<string, number>[] {
    const { nllReduction = 'token-mean' } = this.options;
    let at = 0;
    return chunks.map((parts) => {
      at += parts.length;
      const sizes = parts.map((indices) => ({
        pairs: indices.length,
        chosen: sum(indices.map((i) => this.scored(i, 'chosenIds'))),
        rejected: sum(indices.map((i) => this.scored(i, 'rejectedIds'))),
      }));
      return mergePairMetrics(measured.slice(at - parts.length, at), sizes, nllReduction === 'token-mean');
    });
  }

  private metrics(done: Outcome, step: PreferenceStep, chunks: Chunks, lambda: number): Promise<Metrics> {
    const { gamma } = this.options;
    this.seenTokens += done.tokens;
    const seen = this.seenTokens;
    const { dpo, sft, optimum, gap } = done;
    const starOf = optimum.length > 0 ? optimum : sft;
    const sums = Promise.all([total(dpo), total(sft), total(starOf), gap ? total([gap]) : 0]);
    const parts = Promise.all(done.measured);
    const reads = Promise.all([sums, step.metrics, parts, done.terms, done.gradientMetrics()]);
    return reads.then(([values, ofStep, measured, terms, gradients]) => {
      const [dpoValue, sftValue, star, gapValue] = values;
      const sftStar = star - gapValue;
      const parts = { dpo: dpoValue, sft: sftValue, sftStar, regularizer: gradients['spo/regularizer'] ?? 0 };
      return {
        loss: spoObjective(parts, { lambda, gamma }),
        'spo/lambda': lambda,
        'spo/dpo': dpoValue,
        'spo/sft': sftValue,
        'spo/sft_star': sftStar,
        'spo/sft_gap': gap ? gapValue : sftValue - sftStar,
        'spo/first_order': Number(this.firstOrder),
        ...gradients,
        ...terms,
        ...averageMetrics(this.merged(measured, chunks)),
        ...ofStep,
        num_tokens: seen,
      };
    });
  }
}

/** @throws KeelgradError for a lower level without a variable, and for passes that exclude each other */
function requirePossible(trainable: Trainable, options: SpoTaskOptions): void {
  const { gamma, lowerSteps, gradientCheckpointing, regularizerMethod } = options;
  if (lowerSteps > 0 && !trainable.groups.includes('backbone'))
    throw new KeelgradError(
      `lower steps ${lowerSteps}: expected a trained backbone, the variable of the lower level, found it frozen; use lower steps 0`,
    );
  const conflict = checkpointingConflict({ gamma, gradientCheckpointing, regularizerMethod }, inWords);
  if (conflict) throw new KeelgradError(conflict);
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
