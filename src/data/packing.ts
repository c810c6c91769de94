// Packing: examples to one token axis without padding, with the places where log-probabilities are read off.
// A pair is three segments: prompt, chosen, rejected; both responses continue the one prompt. A response's last token is a
// target only: nothing is predicted from it, so it is not fed.
import { SegmentLayout } from '../ops/segments.js';
import type { Device } from '../tensor/storage.js';
import { Tensor } from '../tensor/tensor.js';

/** Ids of a preference pair; both sequences are the prompt followed by the response. */
export interface PairIds {
  readonly promptIds: Int32Array;
  readonly chosenIds: Int32Array;
  readonly rejectedIds: Int32Array;
}

/** Ids of a sequence and which of them are scored. */
export interface SequenceIds {
  readonly inputIds: Int32Array;
  readonly completionMask: Uint8Array;
}

/** A packed batch of S sequences with N targets, on the host. Sequences of pairs: all chosen, then all rejected. */
export interface PackedBatch {
  readonly layout: SegmentLayout;
  /** `[T]` token ids. */
  readonly ids: Int32Array;
  /** `[R]` packed rows that predict something, ascending. */
  readonly headRows: Int32Array;
  /** `[N]`: the entry of headRows that predicts target n. */
  readonly targetRows: Int32Array;
  /** `[N]`: the id of target n. */
  readonly targetIds: Int32Array;
  /** `[N]`: the sequence to which target n belongs. */
  readonly sequences: Int32Array;
  /** `[S]`: targets of each sequence. */
  readonly lengths: Int32Array;
  /** Tokens of all sequences, prompts counted once a sequence (what TRL calls num_tokens). */
  readonly tokens: number;
}

/** The tensors of a packed batch on a device. */
export interface BatchTensors {
  ids: Tensor;
  targets: { ids: Tensor; rows: Tensor; headRows: Tensor };
  sequences: Tensor;
  /** Floating `[S]`. */
  lengths: Tensor;
}

class Packer {
  readonly parts: { length: number; parent?: number }[] = [];
  readonly ids: number[] = [];
  readonly targets: { row: number; id: number; sequence: number }[] = [];

  segment(ids: Int32Array, parent?: number): { index: number; start: number } {
    const start = this.ids.length;
    for (const id of ids) this.ids.push(id);
    this.parts.push({ length: ids.length, parent });
    return { index: this.parts.length - 1, start };
  }

  target(row: number, id: number, sequence: number): void {
    this.targets.push({ row, id, sequence });
  }

  finish(count: number, tokens: number): PackedBatch {
    const ordered = [...this.targets].sort((a, b) => a.sequence - b.sequence);
    const headRows = Int32Array.from(new Set(this.targets.map((t) => t.row))).sort();
    const place = new Map([...headRows].map((row, i) => [row, i]));
    const lengths = new Int32Array(count);
    for (const t of ordered) lengths[t.sequence]++;
    return {
      layout: new SegmentLayout(this.parts),
      ids: Int32Array.from(this.ids),
      headRows,
      targetRows: Int32Array.from(ordered, (t) => place.get(t.row)!),
      targetIds: Int32Array.from(ordered, (t) => t.id),
      sequences: Int32Array.from(ordered, (t) => t.sequence),
      lengths,
      tokens,
    };
  }
}

function packResponse(
  packer: Packer,
  ids: Int32Array,
  prompt: { index: number; start: number; length: number },
  sequence: number,
): void {
  const { start } = packer.segment(ids.subarray(0, ids.length - 1), prompt.length > 0 ? prompt.index : undefined);
  if (prompt.length > 0) packer.target(prompt.start + prompt.length - 1, ids[0], sequence);
  for (let i = 1; i < ids.length; i++) packer.target(start + i - 1, ids[i], sequence);
}

/** Packs pairs; of B pairs, sequence i is the chosen and B + i the rejected response of pair i. */
export function packPairs(pairs: readonly PairIds[]): PackedBatch {
  const packer = new Packer();
  let tokens = 0;
  pairs.forEach(({ promptIds, chosenIds, rejectedIds }, i) => {
    const prompt = { ...packer.segment(promptIds), length: promptIds.length };
    packResponse(packer, chosenIds, prompt, i);
    packResponse(packer, rejectedIds, prompt, pairs.length + i);
    tokens += 2 * promptIds.length + chosenIds.length + rejectedIds.length;
  });
  return packer.finish(2 * pairs.length, tokens);
}

/** Packs independent sequences; scored are the tokens whose mask is 1, except a sequence's first. */
export function packSequences(examples: readonly SequenceIds[]): PackedBatch {
  const packer = new Packer();
  let tokens = 0;
  examples.forEach(({ inputIds, completionMask }, sequence) => {
    const { start } = packer.segment(inputIds.subarray(0, inputIds.length - 1));
    for (let i = 1; i < inputIds.length; i++)
      if (completionMask[i]) packer.target(start + i - 1, inputIds[i], sequence);
    tokens += inputIds.length;
  });
  return packer.finish(examples.length, tokens);
}

/** The chosen halves of pairs as sequences: what the lower level of SPO sees. */
export const chosenSequences = (pairs: readonly PairIds[]): SequenceIds[] =>
  pairs.map(({ promptIds, chosenIds }) => sequenceOf(promptIds, chosenIds));

/** Prompt and response as one sequence with the response scored. */
export function sequenceOf(promptIds: Int32Array, responseIds: Int32Array): SequenceIds {
  const inputIds = new Int32Array(promptIds.length + responseIds.length);
  inputIds.set(promptIds);
  inputIds.set(responseIds, promptIds.length);
  return { inputIds, completionMask: new Uint8Array(inputIds.length).fill(1, promptIds.length) };
}

/** Uploads a batch. The tensors belong to the current scope. */
export function uploadBatch(batch: PackedBatch, device: Device, dtype: 'float32' | 'float64'): BatchTensors {
  const ints = (values: Int32Array): Tensor => Tensor.from(values, { device });
  return {
    ids: ints(batch.ids),
    targets: { ids: ints(batch.targetIds), rows: ints(batch.targetRows), headRows: ints(batch.headRows) },
    sequences: ints(batch.sequences),
    lengths: Tensor.from(Float64Array.from(batch.lengths), { dtype, device }),
  };
}
