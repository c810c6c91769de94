// Mismatched prompts and responses, from which KTO estimates its KL term: each prompt with a response to another one.
// Fixed by the order of the data, so that the reference's log-probabilities of them can be computed before training.
import type { PackedBatch } from '../data/packing.js';
import { KeelgradError } from '../errors.js';
import type { CausalLM } from '../models/causal-lm.js';
import { ktoKl } from '../objectives/preference.js';
import { concat } from '../ops/movement.js';
import { accumulationDType } from '../tensor/dtype.js';
import { scope } from '../tensor/scope.js';
import { Tensor } from '../tensor/tensor.js';
import { scoreBatch } from './batch-source.js';

const sameIds = (a: Int32Array, b: Int32Array): boolean => a.length === b.length && a.every((id, i) => id === b[i]);

/**
 * For each record, the nearest one before it (the last ones before the first) that has another prompt.
 * @throws KeelgradError where all prompts are the same
 */
export function mismatchedPartners(prompts: readonly Int32Array[]): number[] {
  const count = prompts.length;
  const differs = (i: number): boolean => !sameIds(prompts[i], prompts[(i + count - 1) % count]);
  const start = prompts.findIndex((_, i) => differs(i));
  if (start < 0)
    throw new KeelgradError(
      'kto estimates its KL term from prompts with responses to other prompts, and these records have one prompt alone; use apo_zero_unpaired, or data with several',
    );
  const partners = new Array<number>(count);
  for (let k = 0; k < count; k++) {
    const i = (start + k) % count;
    const before = (i + count - 1) % count;
    partners[i] = differs(i) ? before : partners[before];
  }
  return partners;
}

/**
 * KTO's KL estimate over the mismatched sequences of a step, a scalar; nothing is recorded.
 * @param pack one packed batch after the other: all of them at once need not fit into memory
 * @param reference the reference's log-probabilities of all sequences, in the order of the batches
 */
export function klEstimate(
  model: CausalLM,
  pack: readonly (() => PackedBatch)[],
  reference: readonly number[],
): Tensor {
  return scope(() => {
    const policy = pack.map((make) => {
      const packed = make();
      using _ = packed.layout;
      using sums = scoreBatch(model, model.parameters, packed);
      return sums.alias();
    });
    const dtype = accumulationDType(model.dtype);
    return ktoKl(concat(policy), Tensor.from(Float64Array.from(reference), { dtype, device: model.device }));
  });
}
