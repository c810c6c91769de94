// Stable Preference Optimization as a task of the loop: Algorithm 1 (spo.md §2), one outer iteration a step.
//
// The batch is the whole batch of the optimizer step: the lower level sees all of it, whatever the accumulation. Dropout is off.
import { differentiate } from '../autograd/tape.js';
import { chosenSequences, packSequences, sequenceOf, uploadBatch } from '../data/packing.js';
import type { PreferenceExample } from '../data/tokenize.js';
import type { ModelParameters } from '../models/parameters.js';
import { sequenceLogProbs } from '../objectives/logprobs.js';
import { addRegularizer, type RegularizerProblem, type RegularizerValue } from '../objectives/regularizer.js';
import { type SftReduction, sftLoss } from '../objectives/sft.js';
import { spoObjective } from '../objectives/spo.js';
import { add, mul } from '../ops/elementwise.js';
import { onesLike } from '../ops/movement.js';
import { sum } from '../ops/reduce.js';
import { descend } from '../optim/bilevel/lower-level.js';
import { accumulationDType } from '../tensor/dtype.js';
import { scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { averageMetrics, quiet, total } from './batch-metrics.js';
import type { Metrics } from './hooks.js';
import { pairLogProbs } from './preference-batch.js';
import { PreferenceObjective, type PreferenceSettings, type PreferenceStep } from './preference-objective.js';
import type { PreferenceReference } from './reference.js';
import {
  type GroupName,
  replaceGroups,
  type StepInput,
  type StepMeasurement,
  type Task,
  type Trainable,
  tensorsOf,
} from './task.js';

export type SpoTaskOptions = PreferenceSettings & {
  lambda: number;
  gamma: number;
  lowerSteps: number;
  lowerLearningRate: number;
  normOver: 'all' | GroupName;
  sftReduction: SftReduction;
};

/** Divisors of the step's L_SFT: of all micro-batches together. */
interface SftTotals {
  tokens: number;
  sequences: number;
}

const both: readonly GroupName[] = ['backbone', 'adapters'];

export class SpoTask implements Task {
  readonly trainable: Trainable;
  private readonly examples: readonly PreferenceExample[];
  private readonly objective: PreferenceObjective;
  private readonly options: SpoTaskOptions;
  private readonly masters: () => ReadonlyMap<string, Tensor>;
  private seenTokens = 0;

  /** @param masters the backbone in its master dtype: where the lower level starts from */
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
  }

  records({ microBatches }: StepInput): number[] {
    return microBatches.flat().map((i) => this.examples[i].index);
  }

  async accumulate({ microBatches }: StepInput): Promise<StepMeasurement> {
    const { lambda, gamma, lowerSteps } = this.options;
    const pairs = microBatches.flat().length;
    const totals = this.sftTotals(microBatches);
    // Without steps θ_K is θ: term (b) vanishes by the same route. With λ = 0 as well there is nothing to compute.
    const shares = microBatches.map((indices) => indices.length / pairs);
    let stepMetrics: PreferenceStep['metrics'] | undefined;
    const { optimum, parts } = scope(() => {
      const step = this.objective.begin(microBatches, shares);
      stepMetrics = step.metrics;
      return {
        optimum: lowerSteps > 0 || lambda > 0 ? this.lowerLevel(microBatches, totals) : null,
        parts: microBatches.map((indices, micro) => scope(() => this.upperLevel(indices, micro, step, totals))),
      };
    });
    const dpo = parts.map((p) => p.dpo);
    const sft = parts.map((p) => p.sft);
    const losses = [...dpo, ...sft, ...(optimum ?? [])];
    const seen = this.seenTokens;
    const sums = [total(dpo), total(sft), total(optimum ?? sft)];
    const reads = quiet(Promise.all([Promise.all(sums), stepMetrics, Promise.all(parts.map((p) => p.metrics))]));
    let regularizer: RegularizerValue | null = null;
    try {
      regularizer = gamma > 0 ? await this.regularizer(microBatches.flat()) : null;
    } catch (error) {
      for (const t of losses) t.dispose();
      throw error;
    }
    const metrics = reads.then(([[dpoValue, sftValue, sftStar], ofStep, measured]): Metrics => {
      const values = { dpo: dpoValue, sft: sftValue, sftStar, regularizer: regularizer?.value ?? 0 };
      return {
        loss: spoObjective(values, { lambda, gamma }),
        'spo/dpo': dpoValue,
        'spo/sft': sftValue,
        'spo/sft_star': sftStar,
        'spo/sft_gap': sftValue - sftStar,
        'spo/regularizer': values.regularizer,
        ...(regularizer ? regularizerMetrics(regularizer) : {}),
        ...averageMetrics(measured),
        ...ofStep,
        num_tokens: seen,
      };
    });
    return { losses, metrics };
  }

  dispose(): void {
    this.objective.dispose();
  }

  private sftTotals(microBatches: StepInput['microBatches']): SftTotals {
    const indices = microBatches.flat();
    const scored = (i: number): number =>
      this.examples[i].chosenIds.length - (this.examples[i].promptIds.length === 0 ? 1 : 0);
    return { tokens: indices.reduce((n, i) => n + scored(i), 0), sequences: indices.length };
  }

  /** One micro-batch's share of L_SFT(θ, φ) on the chosen responses, its gradient for `groups` times `scale` accumulated. */
  private sftGradient(
    indices: readonly number[],
    parameters: ModelParameters,
    groups: readonly GroupName[],
    scale: number,
    totals: SftTotals,
  ): Tensor {
    const { trainable } = this;
    const { model } = trainable;
    const batch = packSequences(chosenSequences(indices.map((i) => this.examples[i])));
    using layout = batch.layout;
    return scope(() => {
      const tensors = uploadBatch(batch, model.device, accumulationDType(model.dtype));
      const { result } = differentiate(
        tensorsOf(parameters, groups),
        (tracked) => {
          const p = replaceGroups(parameters, groups, tracked);
          const { logProbs } = model.logProbs(p, tensors.ids, layout, tensors.targets);
          const sums = sequenceLogProbs(logProbs, tensors.sequences, batch.lengths.length);
          return sftLoss(sums, { reduction: this.options.sftReduction, ...totals });
        },
        (value) => [{ tensor: value, cotangent: onesLike(value) }],
        { sinks: groups.flatMap((g) => trainable.gradients.get(g)!.sinks(scale)) },
      );
      return result.detach();
    });
  }

  /**
   * Steps 1 and 2 of Algorithm 1: θ̂ by gradient steps on L_SFT, then -λ ∇_φ L_SFT(θ̂, φ) into the adapters' buffers. Leaves
   * the backbone's buffers zeroed; returns the micro-batches' shares of L*_SFT.
   */
  private lowerLevel(microBatches: StepInput['microBatches'], totals: SftTotals): Tensor[] {
    const { model, gradients } = this.trainable;
    const { lambda, lowerSteps: steps, lowerLearningRate: learningRate } = this.options;
    const backbone = gradients.get('backbone')!;
    const solution = descend(
      model.backbone,
      this.masters(),
      (theta) => {
        backbone.zero();
        const parameters = { ...model.parameters, backbone: theta };
        for (const indices of microBatches) this.sftGradient(indices, parameters, ['backbone'], 1, totals).dispose();
        return backbone.buffers;
      },
      { steps, learningRate },
    );
    try {
      const parameters = { ...model.parameters, backbone: solution.theta };
      return microBatches.map((indices) => this.sftGradient(indices, parameters, ['adapters'], -lambda, totals));
    } finally {
      solution.release();
      backbone.zero();
    }
  }

  /** Step 3: L_DPO + λ L_SFT of one micro-batch at (θ, φ) from one forward pass, gradients of both groups accumulated. */
  private upperLevel(
    indices: readonly number[],
    micro: number,
    step: PreferenceStep,
    totals: SftTotals,
  ): { dpo: Tensor; sft: Tensor; metrics: Promise<Record<string, number>> } {
    const { trainable, options, objective } = this;
    const { model, groups } = trainable;
    const batch = objective.batch(indices);
    using _ = batch.packed.layout;
    const { result } = differentiate(
      tensorsOf(model.parameters, groups),
      (tracked) => {
        const out = pairLogProbs(model, replaceGroups(model.parameters, groups, tracked), batch);
        const dpo = step.loss(micro, out.pairs);
        const chosen = out.pairs.chosenUnweighted ?? out.pairs.chosen;
        const sft = sftLoss(chosen, { reduction: options.sftReduction, ...totals });
        return { ...out, dpo, sft, value: add(dpo, mul(sft, options.lambda)) };
      },
      ({ value }) => [{ tensor: value, cotangent: onesLike(value) }],
      { sinks: groups.flatMap((g) => trainable.gradients.get(g)!.sinks()) },
    );
    this.seenTokens += batch.packed.tokens;
    const metrics = objective.metrics(batch, result);
    return { dpo: result.dpo.detach(), sft: result.sft.detach(), metrics };
  }

  /** Step 4: γ ∇R into the buffers of both groups. */
  private regularizer(indices: readonly number[]): Promise<RegularizerValue> {
    const { model, gradients } = this.trainable;
    const { gamma, normOver } = this.options;
    const variables = tensorsOf(model.parameters, both);
    const inBackbone = model.backbone.size;
    const problem: RegularizerProblem = {
      variables,
      normOver: variables.map((_, i) => normOver === 'all' || (normOver === 'backbone') === i < inBackbone),
      logProb: (values, sequence) => this.sequenceLogProb(indices, values, sequence),
    };
    const buffers = both.flatMap((g) => [...gradients.get(g)!.buffers.values()]);
    return addRegularizer(problem, indices.length, gamma, buffers);
  }

  private sequenceLogProb(indices: readonly number[], variables: readonly Tensor[], sequence: number): Tensor {
    const { model } = this.trainable;
    const { promptIds, chosenIds, rejectedIds } = this.examples[indices[sequence % indices.length]];
    const batch = packSequences([sequenceOf(promptIds, sequence < indices.length ? chosenIds : rejectedIds)]);
    using layout = batch.layout;
    const tensors = uploadBatch(batch, model.device, accumulationDType(model.dtype));
    const p = replaceGroups(model.parameters, both, variables);
    return sum(model.logProbs(p, tensors.ids, layout, tensors.targets).logProbs);
  }
}

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

function regularizerMetrics(r: RegularizerValue): Record<string, number> {
  return {
    'spo/active_fraction': r.activeFraction,
    'grad_norm/chosen': mean(r.chosenNorms),
    'grad_norm/rejected': mean(r.rejectedNorms),
  };
}
