// Losses of single responses, labelled desirable or not, as a task of the loop: KTO and its kin on data without pairs.
// Dropout is off.
import { differentiate } from '../autograd/tape.js';
import { type PackedBatch, packSequences, uploadBatch } from '../data/packing.js';
import type { LabelledExample } from '../data/tokenize.js';
import { sequenceLogProbs } from '../objectives/logprobs.js';
import { factsOf } from '../objectives/preference/facts.js';
import { implicitReward, type PreferenceLossOptions, type Reward, responseLoss } from '../objectives/preference.js';
import { mul } from '../ops/elementwise.js';
import { onesLike } from '../ops/movement.js';
import { accumulationDType } from '../tensor/dtype.js';
import { scope } from '../tensor/scope.js';
import { Tensor } from '../tensor/tensor.js';
import { labelledMetrics, quiet, type ResponseValues, readStatistics, total } from './batch-metrics.js';
import { klEstimate } from './mismatch.js';
import type { PassSettings } from './preference-batch.js';
import type { LabelledReference } from './reference.js';
import { replaceGroups, type StepInput, type StepMeasurement, type Task, type Trainable, tensorsOf } from './task.js';

interface MicroBatch {
  loss: Tensor;
  values: Promise<ResponseValues>;
}

export class LabelledTask implements Task {
  readonly trainable: Trainable;
  private readonly examples: readonly LabelledExample[];
  private readonly reference: LabelledReference;
  private readonly options: PreferenceLossOptions & PassSettings;
  private readonly reward: Reward;
  private readonly needsKl: boolean;
  private seenTokens = 0;

  constructor(
    trainable: Trainable,
    examples: readonly LabelledExample[],
    reference: LabelledReference,
    options: PreferenceLossOptions & PassSettings,
  ) {
    this.trainable = trainable;
    this.examples = examples;
    this.reference = reference;
    this.options = options;
    this.reward = implicitReward(options);
    this.needsKl = factsOf([options.lossType ?? 'sigmoid'].flat()).some((facts) => facts.needsKl);
  }

  records({ microBatches }: StepInput): number[] {
    return microBatches.flat().map((i) => this.examples[i].index);
  }

  accumulate({ microBatches }: StepInput): StepMeasurement {
    const share = 1 / microBatches.length;
    let klRead: Promise<Record<string, number>> = Promise.resolve({});
    const parts = scope(() => {
      const kl = this.needsKl ? this.klEstimate(microBatches) : undefined;
      if (kl) klRead = quiet(kl.data().then(([value]) => ({ kl: value })));
      return microBatches.map((indices) => scope(() => this.microBatch(indices, share, kl)));
    });
    const losses = parts.map((p) => p.loss);
    const seen = this.seenTokens;
    const reads = Promise.all([total(losses), klRead, Promise.all(parts.map((p) => p.values))]);
    const metrics = reads.then(([loss, ofStep, values]) => ({
      loss,
      ...labelledMetrics(values, this.reward),
      ...ofStep,
      num_tokens: seen,
    }));
    return { losses, metrics };
  }

  /** One micro-batch's part of the loss, its gradients accumulated. */
  private microBatch(indices: readonly number[], share: number, kl: Tensor | undefined): MicroBatch {
    const { trainable, options } = this;
    const { model, groups } = trainable;
    const examples = indices.map((i) => this.examples[i]);
    const packed = packSequences(examples);
    using layout = packed.layout;
    const dtype = accumulationDType(model.dtype);
    const upload = (values: readonly number[]): Tensor =>
      Tensor.from(Float64Array.from(values), { dtype, device: model.device });
    const tensors = uploadBatch(packed, model.device, dtype);
    const references = indices.map((i) => this.reference.logProbs[i]);
    const given = { reference: upload(references), desirable: upload(examples.map((e) => Number(e.desirable))), kl };
    const { result } = differentiate(
      tensorsOf(model.parameters, groups),
      (tracked) => {
        const p = replaceGroups(model.parameters, groups, tracked);
        const checkpointing = options.gradientCheckpointing;
        const out = model.logProbs(p, tensors.ids, layout, tensors.targets, { statistics: true, checkpointing });
        const policy = sequenceLogProbs(out.logProbs, tensors.sequences, packed.lengths.length);
        return { ...out, policy, loss: mul(responseLoss({ ...given, policy }, options), share) };
      },
      ({ loss }) => [{ tensor: loss, cotangent: onesLike(loss) }],
      { sinks: groups.flatMap((g) => trainable.gradients.get(g)!.sinks()) },
    );
    this.seenTokens += packed.tokens;
    const reads = Promise.all([readStatistics(result.statistics!), result.policy.data()]);
    const desirable = examples.map((e) => e.desirable);
    const values = quiet(
      reads.then(([statistics, policy]) => ({ packed, statistics, policy, reference: references, desirable })),
    );
    return { loss: result.loss.detach(), values };
  }

  private klEstimate(microBatches: readonly (readonly number[])[]): Tensor {
    const { sequences, logProbs } = this.reference.mismatched!;
    const pack = microBatches.map((indices) => (): PackedBatch => packSequences(indices.map((i) => sequences[i])));
    return klEstimate(
      this.trainable.model,
      pack,
      microBatches.flat().map((i) => logProbs[i]),
    );
  }
}
