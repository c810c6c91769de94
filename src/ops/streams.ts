// SequenceStreams: where the cotangents of each sequence of a packed batch lie when they are kept apart. Rows of the packed
// axis that several sequences share (a prompt of chosen and rejected) appear once for each of them. Immutable; uploaded once.
import { detachFromScope } from '../tensor/scope.js';
import type { Device, Storage } from '../tensor/storage.js';
import { Tensor } from '../tensor/tensor.js';
import { SegmentLayout } from './segments.js';

/** Consecutive rows. */
export interface Span {
  readonly start: number;
  readonly length: number;
}

/** One sequence: the segments it consists of, in order, and its targets among those of the batch. */
export interface SequenceParts {
  readonly segments: readonly number[];
  readonly targets: Span;
}

/** Sequences that lie one after the other, and their rows and targets together. */
export interface HeadGroup {
  readonly sequences: readonly number[];
  readonly rows: Span;
  readonly targets: Span;
}

/** What the ops that meet an index tensor must know of it: see `indexKind`. */
export interface StreamIndices {
  /** int32 `[R]`: the token ids, looked up in the embedding. */
  readonly ids: Tensor;
  /** int32 `[N]`: the packed row of each target, in the order of sequences: what the head's rows are gathered by. */
  readonly targetRows: Tensor;
  /** int32 `[N]`: 0, 1, ...: each target has a row of the head to itself. */
  readonly targetOrder: Tensor;
}

export type IndexKind = keyof StreamIndices;

/** The ids at which the head's gradients are asked for: of each group those of its rows, then those of its targets. */
export interface HeadProbes {
  /** int32 `[groups, 4]`: first target, targets, first probe, probes. */
  readonly table: Tensor;
  /** int32, of all groups. */
  readonly ids: Tensor;
  readonly maxTargets: number;
  readonly maxProbes: number;
}

/** The span of neighbours, in order. */
function joined(spans: readonly Span[]): Span {
  const [{ start }] = spans;
  let end = start;
  for (const span of spans) {
    if (span.start !== end)
      throw new RangeError(
        `[SequenceStreams] expected the targets of a group in its order, found some at ${span.start}, not at ${end}`,
      );
    end += span.length;
  }
  return { start, length: end - start };
}

const uniform = (spans: readonly Span[], count: number): Int32Array => {
  const out = new Int32Array(count);
  spans.forEach((s, i) => {
    out.fill(i, s.start, s.start + s.length);
  });
  return out;
};

export class SequenceStreams {
  /** Rows of the packed axis, and of the axis on which sequences lie one after the other. */
  readonly primalRows: number;
  readonly rows: number;
  /** Targets of all sequences: rows of the head. */
  readonly targetCount: number;
  /** Rows and targets of each sequence; they lie in the order of the groups. */
  readonly sequences: readonly { readonly rows: Span; readonly targets: Span }[];
  /** The sequences as independent segments. */
  readonly layout: SegmentLayout;
  /** False where every packed row belongs to one sequence, in order: then cotangent rows are packed rows. */
  readonly shares: boolean;
  readonly device: Device;
  /** int32 `[rows]`: the packed row of each row; null where that is the row itself. */
  readonly rowMap: Tensor | null;
  /** int32 `[rows]` and `[targetCount]`: the sequence of each row and of each target. */
  readonly rowSequence: Tensor;
  readonly targetSequence: Tensor;
  /** int32 `[rows]` token ids, `[targetCount]` rows that predict the targets. */
  readonly ids: Tensor;
  readonly targetRows: Tensor;
  /** int32 `[targetCount]`: 0, 1, ... */
  readonly targetOrder: Tensor;
  readonly probes: HeadProbes;
  /** Sequences whose inner products are wanted: each with itself alone, or those of a pair. */
  readonly headGroups: readonly HeadGroup[];
  private readonly known: ReadonlyMap<Storage, IndexKind>;
  private readonly kept: Tensor[] = [];

  /**
   * @param tokens the token id of each packed row
   * @param targetRows the packed row that predicts each target, whose id is in `targetIds`
   * @param indices the tensors under which the forward pass looks these two up
   * @param groups the sequences in the order of their rows and targets, those whose inner products are wanted together
   */
  constructor(
    primal: SegmentLayout,
    parts: readonly SequenceParts[],
    host: { tokens: Int32Array; targetRows: Int32Array; targetIds: Int32Array },
    indices: StreamIndices,
    groups: readonly (readonly number[])[] = parts.map((_, s) => [s]),
  ) {
    const map = parts.map(({ segments }) =>
      segments.flatMap((s) => {
        const { start, length } = primal.segments[s];
        return Array.from({ length }, (_, i) => start + i);
      }),
    );
    const placed = groups.flat();
    const starts = new Map<number, number>();
    let start = 0;
    for (const s of placed) {
      starts.set(s, start);
      start += map[s].length;
    }
    this.sequences = parts.map(({ targets }, s) => ({
      rows: { start: starts.get(s)!, length: map[s].length },
      targets,
    }));
    const flat = Int32Array.from(placed.flatMap((s) => map[s]));
    this.primalRows = primal.total;
    this.rows = flat.length;
    this.targetCount = host.targetRows.length;
    this.layout = SegmentLayout.sequences(placed.map((s) => map[s].length));
    this.shares = flat.length !== primal.total || flat.some((row, i) => row !== i);
    this.device = indices.ids.device;
    const spans = this.sequences.map((s) => s.rows);
    this.rowMap = this.shares ? this.upload(flat) : null;
    this.rowSequence = this.upload(uniform(spans, this.rows));
    this.targetSequence = this.upload(
      uniform(
        this.sequences.map((s) => s.targets),
        this.targetCount,
      ),
    );
    const ids = flat.map((row) => host.tokens[row]);
    this.ids = this.upload(ids);
    this.targetRows = this.upload(this.targetsAmong(map, host.targetRows));
    this.headGroups = groups.map((sequences) => ({
      sequences,
      rows: joined(sequences.map((s) => this.sequences[s].rows)),
      targets: joined(sequences.map((s) => this.sequences[s].targets)),
    }));
    this.probes = this.probesOf(ids, host.targetIds);
    this.targetOrder = this.upload(Int32Array.from(host.targetIds, (_, n) => n));
    const kinds = ['ids', 'targetRows', 'targetOrder'] as const;
    this.known = new Map(kinds.map((kind) => [indices[kind].storage, kind]));
  }

  private probesOf(ids: Int32Array, targetIds: Int32Array): HeadProbes {
    const part = (values: Int32Array, { start, length }: Span): Int32Array => values.subarray(start, start + length);
    const each = this.headGroups.map(({ rows, targets }) => [...part(ids, rows), ...part(targetIds, targets)]);
    let first = 0;
    const table = this.headGroups.flatMap(({ targets }, s) => {
      first += each[s].length;
      return [targets.start, targets.length, first - each[s].length, each[s].length];
    });
    return {
      table: this.keep(
        Tensor.from(Int32Array.from(table), { shape: [this.headGroups.length, 4], device: this.device }),
      ),
      ids: this.upload(Int32Array.from(each.flat())),
      maxTargets: Math.max(0, ...this.headGroups.map((g) => g.targets.length)),
      maxProbes: Math.max(0, ...each.map((e) => e.length)),
    };
  }

  /** Each target's row on the axis of sequences. */
  private targetsAmong(map: readonly (readonly number[])[], targetRows: Int32Array): Int32Array {
    const out = new Int32Array(targetRows.length);
    this.sequences.forEach(({ rows, targets }, s) => {
      const place = new Map(map[s].map((row, i) => [row, rows.start + i]));
      for (let n = targets.start; n < targets.start + targets.length; n++) out[n] = place.get(targetRows[n])!;
    });
    return out;
  }

  private upload(values: Int32Array): Tensor {
    const t = detachFromScope(Tensor.from(values, { device: this.device }));
    this.kept.push(t);
    return t;
  }

  /** Tensors made for these streams that live as long as they do. */
  keep(t: Tensor): Tensor {
    this.kept.push(detachFromScope(t));
    return t;
  }

  /** What an index tensor of the forward pass means. */
  indexKind(op: string, index: Tensor): IndexKind {
    const kind = this.known.get(index.storage);
    if (!kind)
      throw new Error(
        `[${op}] expected an index of the packed batch where gradients are kept by sequence, found another one, ${index.describe()}`,
      );
    return kind;
  }

  dispose(): void {
    this.layout.dispose();
    for (const t of this.kept) t.dispose();
    this.kept.length = 0;
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}
