// SegmentLayout: how a packed batch lies on one token axis. Immutable, on the host, uploaded once; ops never read it back.

import { detachFromScope } from '../tensor/scope.js';
import type { Device } from '../tensor/storage.js';
import { Tensor } from '../tensor/tensor.js';

/**
 * One segment of a packed token axis: rows [start, start + length). Its rows attend to all rows of `parent` (an earlier
 * segment without a parent of its own; -1: none) and causally to their own. Positions count from `firstPosition`.
 */
export interface Segment {
  start: number;
  length: number;
  parent: number;
  firstPosition: number;
}

export class SegmentLayout {
  readonly segments: readonly Segment[];
  /** Rows in all. */
  readonly total: number;
  /** The longest row count that one row may attend to. */
  readonly maxContext: number;
  private readonly uploaded = new Map<Device, { segments: Tensor; positions: Tensor }>();

  /** Segments in row order; a segment may name an earlier, parentless one as its parent. */
  constructor(parts: readonly { length: number; parent?: number }[]) {
    let start = 0;
    let maxContext = 0;
    this.segments = parts.map(({ length, parent = -1 }, i) => {
      const above = parent >= 0 ? this.parentOf(parts, i, parent) : 0;
      const segment = { start, length, parent, firstPosition: above };
      start += length;
      maxContext = Math.max(maxContext, above + length);
      return segment;
    });
    this.total = start;
    this.maxContext = maxContext;
  }

  private parentOf(parts: readonly { length: number; parent?: number }[], at: number, parent: number): number {
    if (parent >= at || (parts[parent].parent ?? -1) >= 0)
      throw new RangeError(
        `[SegmentLayout] expected an earlier segment without parent as parent of segment ${at}, found ${parent}`,
      );
    return parts[parent].length;
  }

  /** Independent sequences of the given lengths. */
  static sequences(lengths: readonly number[]): SegmentLayout {
    return new SegmentLayout(lengths.map((length) => ({ length })));
  }

  /** `segments` int32 [S, 4] and `positions` int32 [total] on a device; owned by the layout. */
  on(device: Device): { segments: Tensor; positions: Tensor } {
    let pair = this.uploaded.get(device);
    if (!pair) {
      pair = {
        segments: this.upload(this.rows(), [this.segments.length, 4], device),
        positions: this.upload(this.positions(), [this.total], device),
      };
      this.uploaded.set(device, pair);
    }
    return pair;
  }

  private upload(values: Int32Array, shape: readonly number[], device: Device): Tensor {
    return detachFromScope(Tensor.from(values, { shape, device }));
  }

  private rows(): Int32Array {
    return Int32Array.from(this.segments.flatMap((s) => [s.start, s.length, s.parent, s.firstPosition]));
  }

  private positions(): Int32Array {
    const positions = new Int32Array(this.total);
    for (const s of this.segments) for (let i = 0; i < s.length; i++) positions[s.start + i] = s.firstPosition + i;
    return positions;
  }

  /** `[total, total]` row-major 0/1: may row i attend to row j? For definitions and tests; quadratic. */
  visibility(): Uint8Array {
    const n = this.total;
    const seen = new Uint8Array(n * n);
    for (const s of this.segments)
      for (let i = s.start; i < s.start + s.length; i++) {
        seen.fill(1, i * n + s.start, i * n + i + 1);
        if (s.parent < 0) continue;
        const p = this.segments[s.parent];
        seen.fill(1, i * n + p.start, i * n + p.start + p.length);
      }
    return seen;
  }

  dispose(): void {
    for (const { segments, positions } of this.uploaded.values()) {
      segments.dispose();
      positions.dispose();
    }
    this.uploaded.clear();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}
