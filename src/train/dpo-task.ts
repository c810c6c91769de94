// DPO and its family as a task of the loop. Dropout is off.
import { differentiate } from '../autograd/tape.js';
import type { PreferenceExample } from '../data/tokenize.js';
import { type PreferenceLossOptions, preferenceLoss } from '../objectives/preference.js';
import { mul } from '../ops/elementwise.js';
import { onesLike } from '../ops/movement.js';
import { scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { averageMetrics, total } from './batch-metrics.js';
import { pairLogProbs, preferenceBatch, readPairMetrics } from './preference-batch.js';
import type { ReferenceLogProbs } from './reference.js';
import { replaceGroups, type StepInput, type StepMeasurement, type Task, type Trainable, tensorsOf } from './task.js';

export class DpoTask implements Task {
  readonly trainable: Trainable;
  private readonly examples: readonly PreferenceExample[];
  private readonly reference: ReferenceLogProbs | null;
  private readonly options: PreferenceLossOptions;
  private seenTokens = 0;

  constructor(
    trainable: Trainable,
    examples: readonly PreferenceExample[],
    reference: ReferenceLogProbs | null,
    options: PreferenceLossOptions,
  ) {
    this.trainable = trainable;
    this.examples = examples;
    this.reference = reference;
    this.options = options;
  }

  records({ microBatches }: StepInput): number[] {
    return microBatches.flat().map((i) => this.examples[i].index);
  }

  accumulate({ microBatches }: StepInput): StepMeasurement {
    const share = 1 / microBatches.length;
    const parts = scope(() => microBatches.map((indices) => scope(() => this.microBatch(indices, share))));
    const losses = parts.map((p) => p.loss);
    const seen = this.seenTokens;
    const metrics = Promise.all([total(losses), Promise.all(parts.map((p) => p.metrics))]).then(([loss, measured]) => ({
      loss,
      ...averageMetrics(measured),
      num_tokens: seen,
    }));
    return { losses, metrics };
  }

  /** The mean loss of one micro-batch times `share`, its gradients accumulated. */
  private microBatch(
    indices: readonly number[],
    share: number,
  ): { loss: Tensor; metrics: Promise<Record<string, number>> } {
    const { trainable, options } = this;
    const { model, groups } = trainable;
    const batch = preferenceBatch(model, this.examples, indices, this.reference);
    using _ = batch.packed.layout;
    const { result } = differentiate(
      tensorsOf(model.parameters, groups),
      (tracked) => {
        const out = pairLogProbs(model, replaceGroups(model.parameters, groups, tracked), batch);
        return { ...out, loss: mul(preferenceLoss(out.pairs, options), share) };
      },
      ({ loss }) => [{ tensor: loss, cotangent: onesLike(loss) }],
      { sinks: groups.flatMap((g) => trainable.gradients.get(g)!.sinks()) },
    );
    this.seenTokens += batch.packed.tokens;
    const metrics = readPairMetrics(batch, result.pairs, result.statistics, options.beta);
    return { loss: result.loss.detach(), metrics };
  }
}
