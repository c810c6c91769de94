// What the tests of SPO share: the recorded models and batches, and gradients of θ and φ under the names of the recordings.
import { join } from 'node:path';
import { differentiate } from '../../src/autograd/tape.js';
import { packPairs, packSequences, sequenceOf, uploadBatch } from '../../src/data/packing.js';
import type { PreferenceExample } from '../../src/data/tokenize.js';
import { loadModel } from '../../src/io/model-folder.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import type { ModelParameters } from '../../src/models/parameters.js';
import { type PairLogProbs, type RegularizerProblem, sequenceLogProbs } from '../../src/objectives/index.js';
import { onesLike, slice } from '../../src/ops/movement.js';
import { sum } from '../../src/ops/reduce.js';
import { accumulationDType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { type GroupName, replaceGroups, tensorsOf } from '../../src/train/task.js';
import { readSharedJson, sharedPath } from '../shared.js';
import type { Tensors } from '../train/support.js';

export const GOLDEN_SPO = 'golden/spo';
export const modelNames = ['qwen2', 'llama'] as const;
export type ModelName = (typeof modelNames)[number];
export type Precision = 'float64' | 'float32';

export const both: readonly GroupName[] = ['backbone', 'adapters'];

export const spoPath = (...parts: string[]): string => sharedPath(GOLDEN_SPO, ...parts);
// biome-ignore lint/suspicious/noExplicitAny: recordings have many shapes
export const readSpo = (...parts: string[]): any => readSharedJson(GOLDEN_SPO, ...parts);

export const openSpoModel = (name: ModelName, dtype: Precision): Promise<CausalLM> =>
  loadModel(spoPath(name, 'model'), { dtype, adapter: spoPath(name, 'adapter') });

interface RecordedPair {
  readonly prompt: number[];
  readonly chosen: number[];
  readonly rejected: number[];
  readonly ref_chosen_logps: number;
  readonly ref_rejected_logps: number;
}

export const recordedBatches = (name: ModelName): RecordedPair[][] => readSpo(name, 'batch.json').batches;

/** Recorded pairs as records of a data file. */
export const recordsOf = (pairs: readonly RecordedPair[]): object[] =>
  pairs.map(({ prompt, chosen, rejected, ...reference }) => ({
    prompt_ids: prompt,
    chosen_ids: chosen,
    rejected_ids: rejected,
    ...reference,
  }));

/** A recorded batch; from batch 0 everything but trajectories is evaluated. */
export const examplesOf = (name: ModelName, batch = 0): PreferenceExample[] =>
  recordedBatches(name)[batch].map((pair, index) => ({
    index,
    line: index + 1,
    promptIds: Int32Array.from(pair.prompt),
    chosenIds: Int32Array.from(pair.chosen),
    rejectedIds: Int32Array.from(pair.rejected),
    refChosenLogp: pair.ref_chosen_logps,
    refRejectedLogp: pair.ref_rejected_logps,
  }));

/** Parameters of both groups by name, on the host. */
export const onHost = (names: readonly string[], tensors: readonly (Tensor | null)[]): Tensors =>
  scope(() => new Map(names.map((name, i) => [name, Float64Array.from(tensors[i]!.cast('float64').dataSync())])));

export const namesOf = (model: CausalLM, groups: readonly GroupName[] = both): string[] =>
  groups.flatMap((g) => [...(g === 'backbone' ? model.backbone : model.adapters).keys()]);

/** Log-probabilities of a packed batch of pairs beside the recorded reference. */
export function pairLogProbsOf(
  model: CausalLM,
  p: ModelParameters,
  examples: readonly PreferenceExample[],
): PairLogProbs {
  const batch = packPairs(examples);
  using _layout = batch.layout;
  const dtype = accumulationDType(model.dtype);
  const tensors = uploadBatch(batch, model.device, dtype);
  const { logProbs } = model.logProbs(p, tensors.ids, batch.layout, tensors.targets);
  const count = examples.length;
  const sums = sequenceLogProbs(logProbs, tensors.sequences, 2 * count);
  const reference = (pick: (e: PreferenceExample) => number): Tensor =>
    Tensor.from(Float64Array.from(examples, pick), { dtype });
  return {
    chosen: slice(sums, 0, 0, count),
    rejected: slice(sums, 0, count, 2 * count),
    refChosen: reference((e) => e.refChosenLogp!),
    refRejected: reference((e) => e.refRejectedLogp!),
    chosenLengths: slice(tensors.lengths, 0, 0, count),
    rejectedLengths: slice(tensors.lengths, 0, count, 2 * count),
  };
}

/** A scalar function of the parameters: its value and its gradient for some groups, on the host. */
export function gradientOf(
  model: CausalLM,
  f: (p: ModelParameters) => Tensor,
  groups: readonly GroupName[] = both,
  at: ModelParameters = model.parameters,
): { value: number; gradient: Tensors } {
  return scope(() => {
    const { result, gradients } = differentiate(
      tensorsOf(at, groups),
      (tracked) => f(replaceGroups(at, groups, tracked)),
      (y) => [{ tensor: y, cotangent: onesLike(y) }],
    );
    return { value: result.item(), gradient: onHost(namesOf(model, groups), gradients) };
  });
}

/** The regularizer's problem on some pairs: sequences 0..B-1 chosen, then rejected. */
export function regularizerProblem(
  model: CausalLM,
  examples: readonly PreferenceExample[],
  over: 'all' | GroupName,
): RegularizerProblem {
  const variables = tensorsOf(model.parameters, both);
  const inBackbone = model.backbone.size;
  return {
    variables,
    normOver: variables.map((_, i) => over === 'all' || (over === 'backbone') === i < inBackbone),
    logProb: (values, sequence) => {
      const { promptIds, chosenIds, rejectedIds } = examples[sequence % examples.length];
      const batch = packSequences([sequenceOf(promptIds, sequence < examples.length ? chosenIds : rejectedIds)]);
      using _layout = batch.layout;
      const tensors = uploadBatch(batch, model.device, accumulationDType(model.dtype));
      const p = replaceGroups(model.parameters, both, values);
      return sum(model.logProbs(p, tensors.ids, batch.layout, tensors.targets).logProbs);
    },
  };
}

/** One group's part of some tensors. */
export const groupPart = (tensors: Tensors, group: GroupName): Tensors =>
  new Map([...tensors].filter(([name]) => name.includes('.lora_') === (group === 'adapters')));

export const spoFile = (name: ModelName, file: string): string => join(spoPath(name), file);
