// The passes over a model that a step of SPO is made of (spo.md §2, §5). Each takes some pairs and adds to the gradient
// buffers; none knows the order of the others.
import { DirectionSink } from '../autograd/direction-sinks.js';
import type { SequenceParameter } from '../autograd/sequence-sinks.js';
import { AccumulatingSink, type GradientBuffers } from '../autograd/sinks.js';
import { differentiate } from '../autograd/tape.js';
import { chosenSequences, packSequences, sequenceOf, uploadBatch } from '../data/packing.js';
import type { PreferenceExample } from '../data/tokenize.js';
import type { ModelParameters } from '../models/parameters.js';
import { sequenceLogProbs } from '../objectives/logprobs.js';
import {
  accumulateSequenceGradients,
  type GradientProducts,
  measureSequenceGradients,
  RecordedGradients,
  type SequenceProblem,
} from '../objectives/sequence-gradients.js';
import { type SftReduction, sftLoss } from '../objectives/sft.js';
import { add, mul } from '../ops/elementwise.js';
import type { HeadStatistics } from '../ops/head.js';
import { gatherRows, onesLike, reshape, stack, unsqueeze, zeros } from '../ops/movement.js';
import { sum } from '../ops/reduce.js';
import type { SequenceStreams } from '../ops/streams.js';
import { accumulationDType } from '../tensor/dtype.js';
import { scope } from '../tensor/scope.js';
import { Tensor } from '../tensor/tensor.js';
import { type PreferenceBatch, pairLogProbs, pairsOfTokens } from './preference-batch.js';
import type { PreferenceObjective, PreferenceStep } from './preference-objective.js';
import { pairsOf, rowPerTarget, streamsOf } from './sequence-batch.js';
import { type GroupName, replaceGroups, type Trainable, tensorsOf } from './task.js';

export const both: readonly GroupName[] = ['backbone', 'adapters'];

/** Divisors of the step's L_SFT: of all its pairs together. */
export interface SftTotals {
  tokens: number;
  sequences: number;
}

/** Some pairs of a step: their place among its parts, and the step's loss. */
export interface Part {
  indices: readonly number[];
  micro: number;
  step: PreferenceStep;
  totals: SftTotals;
  /** λ in this step. */
  lambda: number;
}

/** What a main pass measured: shares of the step's losses, and the metrics of its pairs. */
export interface MainPass {
  dpo: Tensor;
  sft: Tensor;
  metrics: Promise<Record<string, number>>;
  /** Tokens of its sequences. */
  tokens: number;
}

/** A pass whose norms are known and whose derivatives wait. Dispose of it. */
export interface RecordedPass {
  /** What it is as a main pass; null where it was none. */
  main: MainPass | null;
  recorded: Pick<RecordedGradients<never>, 'squaredNorms' | 'innerProducts' | 'addSquareGradients'>;
  dispose(): void;
}

interface Scored {
  logProbs: Tensor;
  statistics: HeadStatistics;
}

/** Buffers for ∇L_SFT by name, for the lower level's first step and for measures. */
type Second = ReadonlyMap<string, Tensor> | null;

export interface SpoPassOptions {
  sftReduction: SftReduction;
  /** Whether shared and recorded passes give the adapters λ ∇_φ L_SFT(θ, φ), half of term (b). */
  penalizeAdapters: boolean;
  /** Whether blocks run again in backward; not in recorded passes, whose derivatives need what they computed. */
  checkpointing: boolean;
}

export class SpoPasses {
  private readonly trainable: Trainable;
  private readonly examples: readonly PreferenceExample[];
  private readonly objective: PreferenceObjective;
  private readonly options: SpoPassOptions;

  constructor(
    trainable: Trainable,
    examples: readonly PreferenceExample[],
    objective: PreferenceObjective,
    options: SpoPassOptions,
  ) {
    this.trainable = trainable;
    this.examples = examples;
    this.objective = objective;
    this.options = options;
  }

  /** L_SFT(θ, φ) on the chosen responses, its gradient times `scale` added to the buffers of each group. */
  sft(
    indices: readonly number[],
    parameters: ModelParameters,
    into: { buffers: ReadonlyMap<GroupName, ReadonlyMap<string, Tensor>>; scale: number },
    totals: SftTotals,
  ): Tensor {
    const { model } = this.trainable;
    const groups = [...into.buffers.keys()];
    const buffers = [...into.buffers.values()].flatMap((map) => [...map.values()]);
    const batch = packSequences(chosenSequences(indices.map((i) => this.examples[i])));
    using layout = batch.layout;
    return scope(() => {
      const tensors = uploadBatch(batch, model.device, accumulationDType(model.dtype));
      const { result } = differentiate(
        tensorsOf(parameters, groups),
        (tracked) => {
          const p = replaceGroups(parameters, groups, tracked);
          const { checkpointing } = this.options;
          const { logProbs } = model.logProbs(p, tensors.ids, layout, tensors.targets, { checkpointing });
          const sums = sequenceLogProbs(logProbs, tensors.sequences, batch.lengths.length);
          return sftLoss(sums, { reduction: this.options.sftReduction, ...totals });
        },
        (value) => [{ tensor: value, cotangent: onesLike(value) }],
        { sinks: buffers.map((t) => new AccumulatingSink(t, into.scale)) },
      );
      return result.detach();
    });
  }

  /**
   * Adds scale ∇_φ <∇_θ L_SFT(θ, φ), V> to the adapters' buffers, V constant: the penalty's share of ∇_φ F to first order in
   * the lower level's step, without the difference of two nearly equal gradients.
   */
  firstOrder(
    indices: readonly number[],
    direction: ReadonlyMap<string, Tensor>,
    scale: number,
    totals: SftTotals,
  ): void {
    const { model, gradients } = this.trainable;
    const batch = rowPerTarget(packSequences(chosenSequences(indices.map((i) => this.examples[i]))));
    using layout = batch.layout;
    const sinks = [...direction.values()].map((v) => new DirectionSink(v));
    try {
      scope(() => {
        const tensors = uploadBatch(batch, model.device, accumulationDType(model.dtype));
        using streams = streamsOf(batch, 'sequences', tensors);
        const forward = (theta: readonly Tensor[], phi: readonly Tensor[]): Tensor => {
          const p = replaceGroups(model.parameters, both, [...theta, ...phi]);
          return model.logProbs(p, tensors.ids, layout, tensors.targets).logProbs;
        };
        const divisor = this.sftDivisor(totals);
        differentiate(
          tensorsOf(model.parameters, ['adapters']),
          (phi) => {
            differentiate(
              tensorsOf(model.parameters, ['backbone']),
              (theta) => forward(theta, phi),
              (y) => [{ tensor: y, cotangent: onesLike(y) }],
              { streams, sinks },
            );
            return sinks.flatMap((s) => s.terms);
          },
          (terms) => terms.map((t) => ({ tensor: t, cotangent: mul(onesLike(t), -scale / divisor) })),
          { sinks: gradients.get('adapters')!.sinks() },
        );
      });
    } finally {
      for (const s of sinks) s.dispose();
    }
  }

  private sftDivisor(totals: SftTotals): number {
    return this.options.sftReduction === 'token-mean' ? totals.tokens : totals.sequences;
  }

  /** L_DPO + λ L_SFT at (θ, φ) in one pass: the whole cotangent, nothing kept apart. */
  plain({ indices, micro, step, totals, lambda }: Part): MainPass {
    const { model, groups, gradients } = this.trainable;
    const batch = this.objective.batch(indices);
    using _ = batch.packed.layout;
    const { result } = differentiate(
      tensorsOf(model.parameters, groups),
      (tracked) => {
        const out = pairLogProbs(model, replaceGroups(model.parameters, groups, tracked), batch);
        const dpo = step.loss(micro, out.pairs);
        const sft = this.sftShare(out.pairs.chosenUnweighted ?? out.pairs.chosen, totals);
        return { ...out, dpo, sft, value: add(dpo, mul(sft, lambda)) };
      },
      ({ value }) => [{ tensor: value, cotangent: onesLike(value) }],
      { sinks: groups.flatMap((g) => gradients.get(g)!.sinks()) },
    );
    const metrics = this.objective.metrics(batch, result);
    return { dpo: result.dpo.detach(), sft: result.sft.detach(), metrics, tokens: batch.packed.tokens };
  }

  /**
   * The same with ∇_θ L_SFT added to `second`, from one pass seeded with 1 for each sequence; with what the gradients of its
   * sequences measure where that is asked for.
   */
  shared(part: Part, second: Second, norms: boolean): MainPass & { products: GradientProducts | null } {
    const batch = this.batch(part.indices, norms);
    using _ = batch.packed.layout;
    const problem = this.problem(batch, part, { first: true, second, norms });
    using _streams = problem.streams;
    const measured = norms ? measureSequenceGradients(problem) : null;
    const result = measured?.result ?? accumulateSequenceGradients(problem);
    return { ...this.mainPass(batch, problem, result, part), products: measured };
  }

  /** What the gradients of the sequences measure, nothing accumulated. */
  measured(part: Part): GradientProducts {
    const batch = this.batch(part.indices, true);
    using _ = batch.packed.layout;
    const problem = this.problem(batch, part, { first: false, second: null, norms: true });
    using _streams = problem.streams;
    return measureSequenceGradients(problem);
  }

  /**
   * As `shared`, recorded: the squared norms of the sequences' gradients, and their derivatives later, into buffers of their
   * own where `regularizer` has some. With `accumulate` off it is no main pass: nothing else is added to any buffer.
   */
  recorded(
    part: Part,
    second: Second,
    options: { accumulate: boolean; regularizer?: ReadonlyMap<GroupName, GradientBuffers> },
  ): RecordedPass {
    const { gradients } = this.trainable;
    const { accumulate, regularizer } = options;
    const batch = this.batch(part.indices, true);
    const problem = this.problem(batch, part, { first: accumulate, second, norms: true });
    const close = (): void => {
      problem.streams.dispose();
      batch.packed.layout.dispose();
    };
    try {
      const sinks = both.flatMap((g) => (regularizer?.get(g) ?? gradients.get(g)!).sinks());
      const recorded = new RecordedGradients(problem, sinks);
      const dispose = (): void => {
        recorded.dispose();
        close();
      };
      const main = accumulate ? this.mainPass(batch, problem, recorded.result, part) : null;
      return { main, recorded, dispose };
    } catch (error) {
      close();
      throw error;
    }
  }

  /** log π of one sequence of some pairs (all chosen, then all rejected) as a function of all variables. */
  sequenceLogProb(indices: readonly number[], variables: readonly Tensor[], sequence: number): Tensor {
    const { model } = this.trainable;
    const { promptIds, chosenIds, rejectedIds } = this.examples[indices[sequence % indices.length]];
    const batch = packSequences([sequenceOf(promptIds, sequence < indices.length ? chosenIds : rejectedIds)]);
    using layout = batch.layout;
    const tensors = uploadBatch(batch, model.device, accumulationDType(model.dtype));
    const p = replaceGroups(model.parameters, both, variables);
    return sum(model.logProbs(p, tensors.ids, layout, tensors.targets).logProbs);
  }

  private sftShare(chosen: Tensor, totals: SftTotals): Tensor {
    return sftLoss(chosen, { reduction: this.options.sftReduction, ...totals });
  }

  /** With a row of the head for each target; by pair where inner products of their gradients are wanted. */
  private batch(indices: readonly number[], byPair: boolean): PreferenceBatch {
    const { model } = this.trainable;
    const batch = this.objective.batch(indices);
    const packed = rowPerTarget(batch.packed, byPair ? pairsOf(batch.packed).flat() : undefined);
    return { ...batch, packed, tensors: uploadBatch(packed, model.device, accumulationDType(model.dtype)) };
  }

  private mainPass(batch: PreferenceBatch, problem: Problem, result: Scored, { totals }: Part): MainPass {
    const pairs = pairsOfTokens(batch, result.logProbs.detach(), result.statistics);
    const metrics = this.objective.metrics(batch, { pairs, statistics: result.statistics });
    const sft = this.sftShare(pairs.chosenUnweighted ?? pairs.chosen, totals);
    return { dpo: problem.loss!, sft, metrics, tokens: batch.packed.tokens };
  }

  private problem(
    batch: PreferenceBatch,
    part: Part,
    into: { first: boolean; second: Second; norms: boolean },
  ): Problem {
    const { model } = this.trainable;
    const { packed, tensors } = batch;
    const options = { statistics: true, checkpointing: this.options.checkpointing };
    const problem: Problem = {
      loss: null,
      variables: tensorsOf(model.parameters, both),
      parameters: this.parameters(into),
      streams: streamsOf(packed, 'pairs', tensors, into.norms ? pairsOf(packed) : undefined),
      secondCount: batch.pairs,
      forward: (values) => {
        const p = replaceGroups(model.parameters, both, values);
        const out = model.logProbs(p, tensors.ids, packed.layout, tensors.targets, options);
        return { logProbs: out.logProbs, statistics: out.statistics! };
      },
      coefficients: (result) => {
        if (!into.first && !into.second) return this.noCoefficients(result.logProbs, packed.lengths.length);
        const { loss, byGroup } = this.coefficients(batch, problem.streams, part, result);
        problem.loss = loss;
        return byGroup;
      },
    };
    return problem;
  }

  private parameters({ first, second }: { first: boolean; second: Second }): SequenceParameter[] {
    const { gradients } = this.trainable;
    return both.flatMap((group) =>
      [...gradients.get(group)!.buffers].map(([name, buffer]) => ({
        name,
        group,
        first: first ? buffer : null,
        second: second?.get(name) ?? null,
      })),
    );
  }

  private noCoefficients({ dtype, device }: Tensor, sequences: number): ReadonlyMap<GroupName, Tensor> {
    return new Map(both.map((group) => [group, zeros([2, sequences], { dtype, device })]));
  }

  /** The derivatives of L_DPO + λ L_SFT and of L_SFT for the log-probability of each sequence, `[2, S]` by group. */
  private coefficients(
    batch: PreferenceBatch,
    streams: SequenceStreams,
    { micro, step, totals, lambda }: Part,
    { logProbs, statistics }: Scored,
  ): { loss: Tensor; byGroup: ReadonlyMap<GroupName, Tensor> } {
    const { device, dtype } = logProbs;
    const { loss, tokens } = this.objective.coefficients(step, micro, batch, logProbs.detach(), statistics);
    const lengths = batch.packed.lengths;
    const ofSft = Float64Array.from(lengths, (_, s) => (s < batch.pairs ? -1 / this.sftDivisor(totals) : 0));
    const sft = Tensor.from(ofSft, { dtype, device });
    // Tokens of a sequence weigh alike: its first one speaks for it.
    const firsts = Int32Array.from(streams.sequences, ({ targets }) => Math.min(targets.start, tokens.size - 1));
    const preference = reshape(gatherRows(unsqueeze(tokens, 1), Tensor.from(firsts, { device })), [lengths.length]);
    const penalized = add(preference, mul(sft, lambda));
    const rows = (first: Tensor): Tensor => stack([first, sft]);
    return {
      loss,
      byGroup: new Map([
        ['backbone', rows(penalized)],
        ['adapters', rows(this.options.penalizeAdapters ? penalized : preference)],
      ]),
    };
  }
}

interface Problem extends SequenceProblem<Scored> {
  /** The part's share of L_DPO, known after the forward pass. */
  loss: Tensor | null;
}
