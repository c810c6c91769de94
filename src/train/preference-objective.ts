// The preference loss of a trainer's optimizer step: what its micro-batches add up to, and what is known before they run.
// Owns what some losses keep between steps. Knows no loss by name: what one needs is in the table of facts.
import { differentiate } from '../autograd/tape.js';
import { packPairs } from '../data/packing.js';
import type { PreferenceExample } from '../data/tokenize.js';
import type { CausalLM } from '../models/causal-lm.js';
import { defaultNllWeight, factsOf } from '../objectives/preference/facts.js';
import {
  chosenNll,
  completeParameters,
  implicitReward,
  nextBetaDpoMean,
  type PairLogProbs,
  type PreferenceLossOptions,
  preferenceLoss,
  type Reward,
} from '../objectives/preference.js';
import { add, mul } from '../ops/elementwise.js';
import type { HeadStatistics } from '../ops/head.js';
import { concat, onesLike, slice } from '../ops/movement.js';
import { sum } from '../ops/reduce.js';
import { owned, scope } from '../tensor/scope.js';
import { Tensor } from '../tensor/tensor.js';
import { quiet } from './batch-metrics.js';
import { klEstimate } from './mismatch.js';
import {
  type PairOutputs,
  type PassSettings,
  type PreferenceBatch,
  pairLogProbs,
  pairsOfTokens,
  preferenceBatch,
  readPairMetrics,
  type Weighting,
} from './preference-batch.js';
import type { PreferenceReference } from './reference.js';

export type PreferenceSettings = PreferenceLossOptions & Weighting & PassSettings;

/** The loss of one optimizer step, micro-batch by micro-batch. */
export interface PreferenceStep {
  /**
   * The part of micro-batch `micro` in the step's loss, a scalar: over the micro-batches they add up to the loss, and their
   * gradients to its gradient.
   */
  loss(micro: number, pairs: PairLogProbs): Tensor;
  /** What is measured for the step as a whole. */
  readonly metrics: Promise<Record<string, number>>;
}

/** A micro-batch's part of the loss with its derivatives, constants all of them. */
export interface Coefficients {
  loss: Tensor;
  /** dL/d log π of every target token, `[N]`: where tokens weigh alike, that of their sequence. */
  tokens: Tensor;
}

/** Parts of the inputs that a loss is differentiated by. */
const scored = ['chosen', 'rejected', 'chosenUnweighted'] as const;
type Scored = (typeof scored)[number];

export class PreferenceObjective {
  readonly reward: Reward;
  private readonly model: CausalLM;
  private readonly examples: readonly PreferenceExample[];
  private readonly reference: PreferenceReference | null;
  private readonly settings: PreferenceSettings;
  private readonly nllWeight: number;
  private readonly needs: { readonly several: boolean; readonly mean: boolean; readonly kl: boolean };
  /** M_0 of beta_dpo, on the device so that no step waits for it, and that of the step after. */
  private mean: Tensor | null = null;
  private nextMean: Tensor | null = null;

  constructor(
    model: CausalLM,
    examples: readonly PreferenceExample[],
    reference: PreferenceReference | null,
    settings: PreferenceSettings,
  ) {
    const facts = factsOf([settings.lossType ?? 'sigmoid'].flat());
    this.model = model;
    this.examples = examples;
    this.reference = reference;
    this.settings = settings;
    this.reward = implicitReward(settings);
    this.nllWeight = settings.nllWeight ?? defaultNllWeight([settings.lossType ?? 'sigmoid'].flat());
    this.needs = {
      several: facts.some((f) => f.couples),
      mean: facts.some((f) => f.keepsMean),
      kl: facts.some((f) => f.needsKl),
    };
  }

  /** A micro-batch on the device. Inside a scope; the layout is the caller's to dispose of. */
  batch(indices: readonly number[]): PreferenceBatch {
    return preferenceBatch(this.model, this.examples, indices, this.reference, this.settings);
  }

  /**
   * Looks at a step before its micro-batches run. What it returns belongs to the current scope.
   * @param shares the weight of each micro-batch's mean in the step's loss
   */
  begin(microBatches: readonly (readonly number[])[], shares: readonly number[]): PreferenceStep {
    this.commitMean();
    const kl = this.needs.kl ? this.klEstimate(microBatches) : null;
    const metrics = kl ? quiet(kl.data().then(([value]) => ({ kl: value }))) : Promise.resolve({});
    const tokens = this.chosenTokens(microBatches.flat());
    const given = { ...(kl && { kl }) };
    if (this.needs.several && microBatches.length > 1) return { loss: this.coupled(microBatches, given), metrics };
    const loss = (micro: number, pairs: PairLogProbs): Tensor => {
      const nllTokens = microBatches.length > 1 ? { nllTokens: shares[micro] * tokens } : {};
      return mul(this.value({ ...pairs, ...given, ...nllTokens }), shares[micro]);
    };
    return { loss, metrics };
  }

  /** The part of a micro-batch in the step's loss and its derivatives, from log-probabilities of tokens that are known. */
  coefficients(
    step: PreferenceStep,
    micro: number,
    batch: PreferenceBatch,
    tokens: Tensor,
    statistics: HeadStatistics,
  ): Coefficients {
    return scope(() => {
      const { result, gradients } = differentiate(
        [tokens.detach()],
        ([tracked]) => step.loss(micro, pairsOfTokens(batch, tracked, statistics)),
        (loss) => [{ tensor: loss, cotangent: onesLike(loss) }],
      );
      return { loss: result.detach(), tokens: gradients[0]! };
    });
  }

  /** Starts reading the metrics of a micro-batch. Inside its scope; the tensors may be disposed of at once. */
  metrics(batch: PreferenceBatch, outputs: PairOutputs): Promise<Record<string, number>> {
    const measured = readPairMetrics(batch, outputs, this.reward);
    if (!(this.nllWeight > 0)) return measured;
    const nll = chosenNll(outputs.pairs, this.settings.nllReduction).data();
    return quiet(Promise.all([measured, nll]).then(([values, [nll_loss]]) => ({ ...values, nll_loss })));
  }

  dispose(): void {
    this.mean?.dispose();
    this.nextMean?.dispose();
    this.mean = null;
    this.nextMean = null;
  }

  private value(pairs: PairLogProbs): Tensor {
    if (!this.needs.mean) return preferenceLoss(pairs, this.settings);
    this.noteMean(pairs);
    return preferenceLoss(pairs, { ...this.settings, betaDpoMean: this.mean ?? 0 });
  }

  private noteMean(pairs: PairLogProbs): void {
    const { betaDpoMomentum } = completeParameters(this.settings);
    const seen = { ...pairs, chosen: pairs.chosen.detach(), rejected: pairs.rejected.detach() };
    const [next] = owned(() => [nextBetaDpoMean(seen, this.mean ?? 0, betaDpoMomentum)]);
    this.nextMean?.dispose();
    this.nextMean = next;
  }

  private commitMean(): void {
    if (!this.nextMean) return;
    this.mean?.dispose();
    this.mean = this.nextMean;
    this.nextMean = null;
  }

  private chosenTokens(indices: readonly number[]): number {
    const scoredTokens = ({ chosenIds, promptIds }: PreferenceExample): number =>
      chosenIds.length - (promptIds.length === 0 ? 1 : 0);
    return indices.reduce((n, i) => n + scoredTokens(this.examples[i]), 0);
  }

  /** Over both responses of every mismatched pair of the step. */
  private klEstimate(microBatches: readonly (readonly number[])[]): Tensor {
    const { pairs, chosen, rejected } = this.reference!.mismatched!;
    const pack = microBatches.map((indices) => () => packPairs(indices.map((i) => pairs[i])));
    const reference = microBatches.flatMap((indices) =>
      [chosen, rejected].flatMap((table) => indices.map((i) => table[i])),
    );
    return klEstimate(this.model, pack, reference);
  }

  /**
   * For losses that couple the pairs of a step: log-probabilities of all micro-batches first, without gradients; then the
   * gradient of a micro-batch is what the whole step's loss says of its pairs.
   */
  private coupled(microBatches: readonly (readonly number[])[], given: Partial<PairLogProbs>): PreferenceStep['loss'] {
    const parts = scope(() => microBatches.map((indices) => scope(() => this.scores(indices))));
    const counts = microBatches.map((indices) => indices.length);
    const whole = joined(parts);
    const keys = scored.filter((key) => whole[key]);
    const { result, gradients } = differentiate(
      keys.map((key) => whole[key]!),
      (tracked) => this.value({ ...whole, ...given, ...Object.fromEntries(keys.map((key, i) => [key, tracked[i]])) }),
      (loss) => [{ tensor: loss, cotangent: onesLike(loss) }],
    );
    const total = counts.reduce((a, b) => a + b, 0);
    const starts = counts.map((_, i) => counts.slice(0, i).reduce((a, b) => a + b, 0));
    return (micro, pairs) => {
      const share = mul(result.detach(), counts[micro] / total);
      const change = (key: Scored, i: number): Tensor => {
        const at = gradients[i]!.detach();
        const coefficients = slice(at, 0, starts[micro], starts[micro] + counts[micro]);
        // Worth nothing, with the step's gradient: the part of the loss is a constant beside it.
        const x = pairs[key]!;
        return sum(mul(coefficients, add(x, mul(x.detach(), -1))));
      };
      return keys.map(change).reduce((a, b) => add(a, b), share);
    };
  }

  /** Log-probabilities of a micro-batch, nothing recorded. */
  private scores(indices: readonly number[]): PairLogProbs {
    const batch = this.batch(indices);
    using _ = batch.packed.layout;
    return pairLogProbs(this.model, this.model.parameters, batch).pairs;
  }
}

/** Several micro-batches as one. */
function joined(parts: readonly PairLogProbs[]): PairLogProbs {
  const tensors = Object.entries(parts[0]).filter(([, value]) => value instanceof Tensor);
  const join = ([key]: [string, unknown]): [string, Tensor] => [
    key,
    concat(parts.map((p) => p[key as keyof PairLogProbs] as Tensor)),
  ];
  return { ...parts[0], ...Object.fromEntries(tensors.map(join)) };
}
