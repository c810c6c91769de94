// Supervised fine-tuning as a task of the loop.
import { differentiate } from '../autograd/tape.js';
import { type PackedBatch, packSequences, uploadBatch } from '../data/packing.js';
import type { SftExample } from '../data/tokenize.js';
import { sequenceLogProbs } from '../objectives/logprobs.js';
import { dynamicLogProbs, type SftReduction, sftLoss } from '../objectives/sft.js';
import { onesLike } from '../ops/movement.js';
import { accumulationDType } from '../tensor/dtype.js';
import { scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { averageMetrics, readStatistics, sequenceMetrics, type TargetStatistics, total } from './batch-metrics.js';
import { replaceGroups, type StepInput, type StepMeasurement, type Task, type Trainable, tensorsOf } from './task.js';

/** name → what is summed over tokens. */
const sftLosses = {
  /** log p. */
  nll: (logProbs: Tensor): Tensor => logProbs,
  /** Dynamic fine-tuning. */
  dft: dynamicLogProbs,
} as const;

export interface SftTaskOptions {
  loss: keyof typeof sftLosses;
  reduction: SftReduction;
  /** Dropout rate of the adapters' input; 0 is off. */
  dropout: number;
  seed: number;
  /** Blocks run again in backward instead of keeping what they computed. */
  gradientCheckpointing?: boolean;
}

export class SftTask implements Task {
  readonly trainable: Trainable;
  private readonly examples: readonly SftExample[];
  private readonly options: SftTaskOptions;
  private seenTokens = 0;

  constructor(trainable: Trainable, examples: readonly SftExample[], options: SftTaskOptions) {
    this.trainable = trainable;
    this.examples = examples;
    this.options = options;
  }

  records({ microBatches }: StepInput): number[] {
    return microBatches.flat().map((i) => this.examples[i].index);
  }

  accumulate(input: StepInput): StepMeasurement {
    const batches = input.microBatches.map((indices) => packSequences(indices.map((i) => this.examples[i])));
    const tokens = batches.reduce((n, b) => n + b.targetIds.length, 0);
    const sequences = batches.reduce((n, b) => n + b.lengths.length, 0);
    const parts = scope(() =>
      batches.map((batch, micro) => {
        // A seed of its own for every micro-batch of every step: masks differ, and a run can be repeated.
        const seed = this.options.seed + 0x9e37 * (input.step + 1) + 0x51ed * micro;
        return scope(() => this.microBatch(batch, { tokens, sequences }, seed));
      }),
    );
    this.seenTokens += batches.reduce((n, b) => n + b.tokens, 0);
    const losses = parts.map((p) => p.loss);
    const seen = this.seenTokens;
    const metrics = Promise.all([total(losses), Promise.all(parts.map((p) => p.statistics))]).then(
      ([loss, statistics]) => ({
        loss,
        ...averageMetrics(statistics.map((s, i) => sequenceMetrics(batches[i], s))),
        num_tokens: seen,
      }),
    );
    return { losses, metrics };
  }

  /** One micro-batch's share of the step's loss, its gradients accumulated. */
  private microBatch(
    batch: PackedBatch,
    totals: { tokens: number; sequences: number },
    seed: number,
  ): { loss: Tensor; statistics: Promise<TargetStatistics> } {
    const { model, groups, gradients } = this.trainable;
    const { loss, reduction, dropout: rate, gradientCheckpointing: checkpointing } = this.options;
    using layout = batch.layout;
    const tensors = uploadBatch(batch, model.device, accumulationDType(model.dtype));
    const { result } = differentiate(
      tensorsOf(model.parameters, groups),
      (tracked) => {
        const p = replaceGroups(model.parameters, groups, tracked);
        const options = { dropout: { rate, seed }, statistics: true, checkpointing };
        const out = model.logProbs(p, tensors.ids, layout, tensors.targets, options);
        const sums = sequenceLogProbs(sftLosses[loss](out.logProbs), tensors.sequences, batch.lengths.length);
        return { loss: sftLoss(sums, { reduction, ...totals }), statistics: out.statistics! };
      },
      ({ loss }) => [{ tensor: loss, cotangent: onesLike(loss) }],
      { sinks: groups.flatMap((g) => gradients.get(g)!.sinks()) },
    );
    return { loss: result.loss.detach(), statistics: readStatistics(result.statistics) };
  }
}
