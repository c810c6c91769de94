// DPO and its family as a task of the loop. Dropout is off.
import { differentiate } from '../autograd/tape.js';
import type { PreferenceExample } from '../data/tokenize.js';
import { onesLike } from '../ops/movement.js';
import { scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { averageMetrics, total } from './batch-metrics.js';
import { pairLogProbs } from './preference-batch.js';
import { PreferenceObjective, type PreferenceSettings, type PreferenceStep } from './preference-objective.js';
import type { PreferenceReference } from './reference.js';
import { replaceGroups, type StepInput, type StepMeasurement, type Task, type Trainable, tensorsOf } from './task.js';

interface MicroBatch {
  loss: Tensor;
  metrics: Promise<Record<string, number>>;
}

export class DpoTask implements Task {
  readonly trainable: Trainable;
  private readonly examples: readonly PreferenceExample[];
  private readonly objective: PreferenceObjective;
  private seenTokens = 0;

  constructor(
    trainable: Trainable,
    examples: readonly PreferenceExample[],
    reference: PreferenceReference | null,
    settings: PreferenceSettings,
  ) {
    this.trainable = trainable;
    this.examples = examples;
    this.objective = new PreferenceObjective(trainable.model, examples, reference, settings);
  }

  records({ microBatches }: StepInput): number[] {
    return microBatches.flat().map((i) => this.examples[i].index);
  }

  accumulate({ microBatches }: StepInput): StepMeasurement {
    // Micro-batches weigh alike whatever their sizes, as in TRL.
    const shares = microBatches.map(() => 1 / microBatches.length);
    let stepMetrics: PreferenceStep['metrics'] | undefined;
    const parts = scope(() => {
      const step = this.objective.begin(microBatches, shares);
      stepMetrics = step.metrics;
      return microBatches.map((indices, micro) => scope(() => this.microBatch(indices, micro, step)));
    });
    const losses = parts.map((p) => p.loss);
    const seen = this.seenTokens;
    const reads = Promise.all([total(losses), stepMetrics, Promise.all(parts.map((p) => p.metrics))]);
    const metrics = reads.then(([loss, ofStep, measured]) => ({
      loss,
      ...averageMetrics(measured),
      ...ofStep,
      num_tokens: seen,
    }));
    return { losses, metrics };
  }

  dispose(): void {
    this.objective.dispose();
  }

  /** One micro-batch's part of the loss, its gradients accumulated. */
  private microBatch(indices: readonly number[], micro: number, step: PreferenceStep): MicroBatch {
    const { trainable, objective } = this;
    const { model, groups } = trainable;
    const batch = objective.batch(indices);
    using _ = batch.packed.layout;
    const { result } = differentiate(
      tensorsOf(model.parameters, groups),
      (tracked) => {
        const out = pairLogProbs(model, replaceGroups(model.parameters, groups, tracked), batch);
        return { ...out, loss: step.loss(micro, out.pairs) };
      },
      ({ loss }) => [{ tensor: loss, cotangent: onesLike(loss) }],
      { sinks: groups.flatMap((g) => trainable.gradients.get(g)!.sinks()) },
    );
    this.seenTokens += batch.packed.tokens;
    return { loss: result.loss.detach(), metrics: objective.metrics(batch, result) };
  }
}
