// What the tests of models share: recorded tensors on the host, packed token ids, the loss of the golden folders.
// Reads recordings by the plain byte reader, never through the loader under test.
import { valueAndGrad } from '../../src/autograd/transforms.js';
import { type PackedBatch, packSequences, uploadBatch } from '../../src/data/packing.js';
import { readSafetensorsHeader, readTensorBytes } from '../../src/io/safetensors.js';
import type { CausalLM, ForwardOptions } from '../../src/models/causal-lm.js';
import type { ModelParameters } from '../../src/models/parameters.js';
import '../../src/ops/methods.js';
import { SegmentLayout } from '../../src/ops/segments.js';
import { accumulationDType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { readSharedJson, sharedPath } from '../shared.js';

/** Values of one recorded tensor, row-major. */
export interface Recorded {
  readonly shape: readonly number[];
  readonly values: Float64Array;
}

const float32 = new Float32Array(1);
const bits = new Uint32Array(float32.buffer);

/** The float32 that 16 bits of bfloat16 stand for. */
function widen(half: number): number {
  bits[0] = half << 16;
  return float32[0];
}

function decode(dtype: string, bytes: Uint8Array): Float64Array {
  if (dtype === 'F64') return new Float64Array(bytes.buffer);
  if (dtype === 'F32') return Float64Array.from(new Float32Array(bytes.buffer));
  if (dtype === 'BF16') return Float64Array.from(new Uint16Array(bytes.buffer), widen);
  throw new Error(`no decoder for ${dtype}`);
}

/** Every tensor of a safetensors file. */
export async function readRecorded(path: string): Promise<Map<string, Recorded>> {
  const recorded = new Map<string, Recorded>();
  for (const [name, location] of (await readSafetensorsHeader(path)).tensors)
    recorded.set(name, { shape: location.shape, values: decode(location.dtype, await readTensorBytes(location)) });
  return recorded;
}

/** The largest absolute difference; NaN where anything is not a number or lengths differ. */
export function maxDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return Number.NaN;
  let worst = 0;
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs(a[i] - b[i]);
    if (!(difference <= worst)) worst = difference;
    if (Number.isNaN(worst)) return worst;
  }
  return worst;
}

export const maxAbs = (a: ArrayLike<number>): number => Array.from(a).reduce((m, x) => Math.max(m, Math.abs(x)), 0);

/** Bytes of a tensor in its own dtype: what "bit for bit" compares. */
export async function bitsOf(t: Tensor): Promise<string> {
  const compact = t.asContiguous();
  try {
    return Buffer.from(await compact.bytes()).toString('base64');
  } finally {
    compact.dispose();
  }
}

export const idsTensor = (ids: readonly number[]): Tensor => Tensor.from(Int32Array.from(ids));

/** Logits `[T, V]` of one sequence that runs alone, on the host. */
export function logitsOf(model: CausalLM, ids: readonly number[], p: ModelParameters = model.parameters): Float64Array {
  using layout = SegmentLayout.sequences([ids.length]);
  return scope(() => Float64Array.from(model.logits(p, idsTensor(ids), layout).cast('float64').dataSync()));
}

/** A log-softmax over each row of `[T, V]`, in float64. */
export function logSoftmaxRows(logits: Float64Array, width: number): Float64Array {
  const out = new Float64Array(logits.length);
  for (let row = 0; row < logits.length; row += width) {
    const values = logits.subarray(row, row + width);
    const top = values.reduce((m, x) => Math.max(m, x), Number.NEGATIVE_INFINITY);
    const total = values.reduce((sum, x) => sum + Math.exp(x - top), 0);
    for (let i = 0; i < width; i++) out[row + i] = values[i] - top - Math.log(total);
  }
  return out;
}

/** The first largest entry of each row of `[T, V]`. */
export function argmaxRows(logits: Float64Array, width: number): number[] {
  return Array.from({ length: logits.length / width }, (_, row) => {
    const values = logits.subarray(row * width, (row + 1) * width);
    return values.reduce((best, x, i) => (x > values[best] ? i : best), 0);
  });
}

export interface SequenceScores {
  /** Token log-probabilities, sequence after sequence. */
  readonly logProbs: Float64Array;
  /** The likeliest next id at every scoring row. */
  readonly argmax: number[];
}

/** log p(ids[t] | ids[:t]) for t = from .. of one sequence, through the fused head, with the head's own argmax. */
export function scoreSequence(model: CausalLM, ids: readonly number[], from = 1): SequenceScores {
  const inputIds = Int32Array.from(ids);
  const completionMask = new Uint8Array(ids.length).fill(1, from);
  const batch = packSequences([{ inputIds, completionMask }]);
  using layout = batch.layout;
  return scope(() => {
    const upload = uploadBatch(batch, model.device, accumulationDType(model.dtype));
    const run = model.logProbs(model.parameters, upload.ids, layout, upload.targets, { statistics: true });
    return {
      logProbs: Float64Array.from(run.logProbs.dataSync()),
      argmax: [...run.statistics!.argmax.dataSync()],
    };
  });
}

export interface GoldenInputs {
  readonly sequences: readonly (readonly number[])[];
  readonly loss_from: readonly number[];
  readonly greedy_prompts: readonly (readonly number[])[];
}

export const GOLDEN_MODELS = 'golden/models';

export interface Golden {
  readonly inputs: GoldenInputs;
  // biome-ignore lint/suspicious/noExplicitAny: a recorded JSON object
  readonly expected: any;
  readonly tensors: Map<string, Recorded>;
}

/** One folder of golden/models. */
export async function readGolden(name: string): Promise<Golden> {
  return {
    inputs: readSharedJson(GOLDEN_MODELS, name, 'inputs.json'),
    expected: readSharedJson(GOLDEN_MODELS, name, 'expected.json'),
    tensors: await readRecorded(sharedPath(GOLDEN_MODELS, name, 'expected.safetensors')),
  };
}

/** Minus the sum of log p over t >= loss_from of every sequence, by the number of sequences; all on one packed axis. */
function packedLoss(model: CausalLM, p: ModelParameters, batch: PackedBatch, options: ForwardOptions): Tensor {
  return scope(() => {
    const { ids, targets } = uploadBatch(batch, model.device, accumulationDType(model.dtype));
    const { logProbs } = model.logProbs(p, ids, batch.layout, targets, options);
    return logProbs.sum().mul(-1 / batch.lengths.length);
  });
}

export interface LossAndGradients {
  readonly loss: number;
  /** By parameter name, adapters included. */
  readonly gradients: Map<string, Float64Array>;
}

/** The golden folders' loss with its gradient for every parameter. */
export function lossAndGradients(
  model: CausalLM,
  { sequences, loss_from }: Pick<GoldenInputs, 'sequences' | 'loss_from'>,
  options: ForwardOptions = {},
): LossAndGradients {
  const examples = sequences.map((ids, i) => ({
    inputIds: Int32Array.from(ids),
    completionMask: new Uint8Array(ids.length).fill(1, loss_from[i]),
  }));
  const batch = packSequences(examples);
  using _layout = batch.layout;
  return scope(() => {
    const [value, [g]] = valueAndGrad((p: ModelParameters) => packedLoss(model, p, batch, options))(model.parameters);
    const named = [...g.backbone, ...(g.adapters ?? [])];
    const gradients = new Map(named.map(([name, t]) => [name, Float64Array.from(t.cast('float64').dataSync())]));
    return { loss: value.item(), gradients };
  });
}

/** The 2-norm over all entries of some gradients. */
export function jointNorm(gradients: Iterable<Float64Array>): number {
  let total = 0;
  for (const g of gradients) for (const x of g) total += x * x;
  return Math.sqrt(total);
}
