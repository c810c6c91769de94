// Log-probabilities of single sequences and their gradients over all variables, at the model's weights or at others near by.
// Never writes a weight: other weights are another parameter map.
import { GradientBuffers } from '../autograd/sinks.js';
import { differentiate } from '../autograd/tape.js';
import { packSequences, sequenceOf, uploadBatch } from '../data/packing.js';
import type { CausalLM } from '../models/causal-lm.js';
import type { ModelParameters } from '../models/parameters.js';
import { add, mul } from '../ops/elementwise.js';
import { cast, onesLike } from '../ops/movement.js';
import { sum } from '../ops/reduce.js';
import { sumOfSquares } from '../optim/clip.js';
import { accumulationDType } from '../tensor/dtype.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { scoreBatch } from '../train/batch-source.js';
import { type GroupName, replaceGroups, tensorsOf } from '../train/task.js';

/** A response to a prompt, as token ids. */
export interface Sequence {
  readonly promptIds: Int32Array;
  readonly responseIds: Int32Array;
}

/** The groups of variables that a model has: θ, and φ where it has adapters. */
export const variableGroups = (model: CausalLM): GroupName[] => (model.lora ? ['backbone', 'adapters'] : ['backbone']);

const packed = (sequences: readonly Sequence[]) =>
  packSequences(sequences.map(({ promptIds, responseIds }) => sequenceOf(promptIds, responseIds)));

/** log π(y|x) of every sequence, summed over its response, in batches of at most `batchTokens` tokens. */
export async function logProbsOf(
  model: CausalLM,
  parameters: ModelParameters,
  sequences: readonly Sequence[],
  batchTokens = 4096,
): Promise<number[]> {
  const results: number[] = [];
  for (let start = 0; start < sequences.length; ) {
    let end = start;
    for (let tokens = 0; end < sequences.length && (end === start || tokens <= batchTokens); end++)
      tokens += sequences[end].promptIds.length + sequences[end].responseIds.length;
    const batch = packed(sequences.slice(start, end));
    using _ = batch.layout;
    using values = scoreBatch(model, parameters, batch);
    results.push(...(await values.data()));
    start = end;
  }
  return results;
}

/** ⟨x, y⟩ of two lists of tensors of the same shapes, accumulated in float64. */
export async function innerProduct(x: readonly Tensor[], y: readonly Tensor[]): Promise<number> {
  using total = scope(() =>
    x.map((t, i) => scope(() => sum(mul(cast(t, 'float64'), cast(y[i], 'float64'))))).reduce((a, b) => add(a, b)),
  );
  return (await total.data())[0];
}

/** ∇ log π(y|x) over some groups of variables, in the accumulation dtype. Holds as much memory as the variables do. */
export class SequenceGradient {
  readonly logProb: Tensor;
  private readonly buffers: readonly GradientBuffers[];

  private constructor(logProb: Tensor, buffers: readonly GradientBuffers[]) {
    this.logProb = logProb;
    this.buffers = buffers;
  }

  static of(model: CausalLM, sequence: Sequence, groups: readonly GroupName[]): SequenceGradient {
    const parameters = model.parameters;
    const maps = { backbone: parameters.backbone, adapters: parameters.adapters ?? new Map() };
    const buffers = groups.map((group) => new GradientBuffers(maps[group]));
    const batch = packed([sequence]);
    using layout = batch.layout;
    const logProb = detachFromScope(
      scope(() => {
        const tensors = uploadBatch(batch, model.device, accumulationDType(model.dtype));
        const { result } = differentiate(
          tensorsOf(parameters, groups),
          (tracked) =>
            sum(
              model.logProbs(replaceGroups(parameters, groups, tracked), tensors.ids, layout, tensors.targets).logProbs,
            ),
          (value) => [{ tensor: value, cotangent: onesLike(value) }],
          { sinks: buffers.flatMap((b) => b.sinks()) },
        );
        return result.detach();
      }),
    );
    return new SequenceGradient(logProb, buffers);
  }

  /** In the order of the groups and of their parameters. */
  get tensors(): Tensor[] {
    return this.buffers.flatMap((b) => [...b.buffers.values()]);
  }

  /** ‖g‖², accumulated in float64. */
  async squaredNorm(): Promise<number> {
    using total = scope(() => sumOfSquares(this.tensors));
    return (await total.data())[0];
  }

  /** ⟨g, other⟩, accumulated in float64. */
  async dot(other: SequenceGradient): Promise<number> {
    return innerProduct(this.tensors, other.tensors);
  }

  dispose(): void {
    this.logProb.dispose();
    for (const b of this.buffers) b.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}

/** Gradients of one pair: ‖g_w‖, ‖g_l‖ and ⟨g_w, g_l⟩. */
export interface PairGradients {
  readonly normChosen: number;
  readonly normRejected: number;
  readonly inner: number;
}

/** Norms and inner product of the gradients of a pair's two log-probabilities, over some groups. Memory: twice the variables. */
export async function pairGradients(
  model: CausalLM,
  pair: { readonly promptIds: Int32Array; readonly chosenIds: Int32Array; readonly rejectedIds: Int32Array },
  groups: readonly GroupName[],
): Promise<PairGradients> {
  const { promptIds } = pair;
  using chosen = SequenceGradient.of(model, { promptIds, responseIds: pair.chosenIds }, groups);
  using rejected = SequenceGradient.of(model, { promptIds, responseIds: pair.rejectedIds }, groups);
  return {
    normChosen: Math.sqrt(await chosen.squaredNorm()),
    normRejected: Math.sqrt(await rejected.squaredNorm()),
    inner: await chosen.dot(rejected),
  };
}

/** Runs `f` at θ + Σ step·g: the model's parameters moved along gradients. The moved copy is freed afterwards. */
export async function displaced<T>(
  model: CausalLM,
  groups: readonly GroupName[],
  moves: readonly { step: number; along: SequenceGradient }[],
  f: (parameters: ModelParameters) => Promise<T>,
): Promise<T> {
  const parameters = model.parameters;
  const moved = tensorsOf(parameters, groups).map((weight, i) =>
    detachFromScope(
      scope(() =>
        moves.reduce((t, { step, along }) => add(t, cast(mul(along.tensors[i], step), weight.dtype)), weight.detach()),
      ),
    ),
  );
  try {
    return await f(replaceGroups(parameters, groups, moved));
  } finally {
    for (const t of moved) t.dispose();
  }
}
