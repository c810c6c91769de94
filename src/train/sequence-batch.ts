// A packed batch whose gradients are kept apart by sequence: every target has a row of the head to itself, and streams say
// where each sequence's rows are.
import type { BatchTensors, PackedBatch } from '../data/packing.js';
import { type SequenceParts, SequenceStreams } from '../ops/streams.js';

/** The same batch with a row of the head for each target. */
export function rowPerTarget(batch: PackedBatch): PackedBatch {
  return {
    ...batch,
    headRows: batch.targetRows.map((row) => batch.headRows[row]),
    targetRows: batch.targetRows.map((_, n) => n),
  };
}

/** Segments of a sequence: of pairs (packPairs), prompt and response; of sequences by themselves, the one. */
function segmentsOf(batch: PackedBatch, kind: 'pairs' | 'sequences', sequence: number): number[] {
  if (kind === 'sequences') return [sequence];
  const pairs = batch.lengths.length / 2;
  const pair = sequence % pairs;
  return [3 * pair, 3 * pair + (sequence < pairs ? 1 : 2)];
}

/** Streams of a batch with a row for each target (see SequenceStreams for `together`); the caller disposes of them. */
export function streamsOf(
  batch: PackedBatch,
  kind: 'pairs' | 'sequences',
  tensors: BatchTensors,
  together = false,
): SequenceStreams {
  let start = 0;
  const parts = Array.from(batch.lengths, (length, s): SequenceParts => {
    start += length;
    return { segments: segmentsOf(batch, kind, s), targets: { start: start - length, length } };
  });
  const { ids, targets } = tensors;
  return new SequenceStreams(
    batch.layout,
    parts,
    { tokens: batch.ids, targetRows: batch.headRows, targetIds: batch.targetIds },
    { ids, targetRows: targets.headRows, targetOrder: targets.rows },
    together,
  );
}
