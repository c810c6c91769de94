// A packed batch whose gradients are kept apart by sequence: every target has a row of the head to itself, and streams say
// where each sequence's rows are.
import type { BatchTensors, PackedBatch } from '../data/packing.js';
import { type SequenceParts, SequenceStreams } from '../ops/streams.js';

/** The two sequences of each pair of a batch of packPairs. */
export function pairsOf({ lengths }: PackedBatch): number[][] {
  const pairs = lengths.length / 2;
  return Array.from({ length: pairs }, (_, i) => [i, pairs + i]);
}

/**
 * The same batch with a row of the head for each target, in the order of `order`, a permutation of the sequences; theirs by
 * default.
 */
export function rowPerTarget(batch: PackedBatch, order: readonly number[] = [...batch.lengths.keys()]): PackedBatch {
  const place = new Map(order.map((s, i) => [s, i]));
  const targets = Array.from(batch.targetRows.keys());
  const ordered = targets.sort((a, b) => place.get(batch.sequences[a])! - place.get(batch.sequences[b])! || a - b);
  const permuted = (values: Int32Array): Int32Array => Int32Array.from(ordered, (n) => values[n]);
  return {
    ...batch,
    headRows: permuted(batch.targetRows.map((row) => batch.headRows[row])),
    targetRows: batch.targetRows.map((_, n) => n),
    targetIds: permuted(batch.targetIds),
    sequences: permuted(batch.sequences),
  };
}

/** Segments of a sequence: of pairs (packPairs), prompt and response; of sequences by themselves, the one. */
function segmentsOf(batch: PackedBatch, kind: 'pairs' | 'sequences', sequence: number): number[] {
  if (kind === 'sequences') return [sequence];
  const pairs = batch.lengths.length / 2;
  const pair = sequence % pairs;
  return [3 * pair, 3 * pair + (sequence < pairs ? 1 : 2)];
}

/**
 * Streams of a batch with a row for each target, in the order of the groups (see SequenceStreams); each sequence is one by
 * default. The caller disposes of them.
 */
export function streamsOf(
  batch: PackedBatch,
  kind: 'pairs' | 'sequences',
  tensors: BatchTensors,
  groups: readonly (readonly number[])[] = Array.from(batch.lengths, (_, s) => [s]),
): SequenceStreams {
  let end = 0;
  const parts: SequenceParts[] = [];
  for (const s of groups.flat()) {
    const length = batch.lengths[s];
    parts[s] = { segments: segmentsOf(batch, kind, s), targets: { start: end, length } };
    end += length;
  }
  const { ids, targets } = tensors;
  return new SequenceStreams(
    batch.layout,
    parts,
    { tokens: batch.ids, targetRows: batch.headRows, targetIds: batch.targetIds },
    { ids, targetRows: targets.headRows, targetOrder: targets.rows },
    groups,
  );
}
