// Mismatched prompts and responses, from which KTO estimates its KL term: each prompt with a response to another one.
// Fixed by the order of the data, so that the reference's log-probabilities of them can be computed before training.
import { KeelgradError } from '../errors.js';

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
