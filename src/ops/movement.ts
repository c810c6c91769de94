// Movement: copies, casts, views, rows by index. Views share storage; everything else allocates.
import { type Backward, type Cotangent, record, requireUntracked } from '../autograd/tape.js';
import { launch } from '../native/launch.js';
import { type DType, isFloating } from '../tensor/dtype.js';
import { owned } from '../tensor/scope.js';
import { broadcastStrides, contiguousStrides, normalizeAxis, sameShape, sizeOf } from '../tensor/shape.js';
import { canonicalDevice, type Device } from '../tensor/storage.js';
import { defineMaterialize, Tensor } from '../tensor/tensor.js';
import { mul } from './elementwise.js';
import { sumTo } from './reduce.js';
import type { SequenceStreams } from './streams.js';

defineMaterialize((t, dtype) => owned(() => [copyTo(t, dtype)])[0]);

/** Uninitialized, with the dtype and device of `like` unless others are given. */
export function emptyLike(like: Tensor, shape: readonly number[] = like.shape, dtype: DType = like.dtype): Tensor {
  return Tensor.empty(shape, { dtype, device: like.device });
}

function copyTo(x: Tensor, dtype: DType): Tensor {
  const out = emptyLike(x, x.shape, dtype);
  if (out.size > 0) launch('copy', [out, x]);
  return out;
}

/** Sets every element of `t` in place. Not differentiable: for tensors that are on no tape. */
export function fill(t: Tensor, value: number): Tensor {
  requireUntracked('fill', t);
  t.storage.version++;
  if (t.size > 0) launch('fill', [t], [value]);
  return t;
}

/** Overwrites `into` (any view) with `x` in place, converting the dtype. Not differentiable. */
export function copyInto(into: Tensor, x: Tensor): void {
  if (!sameShape(into.shape, x.shape))
    throw new RangeError(`[copyInto] expected shape [${into.shape}], found [${x.shape}]`);
  requireUntracked('copyInto', into, x);
  into.storage.version++;
  if (into.size > 0) launch('copy', [into, x]);
}

/** `[count]`: start, start + step, ... */
export function arange(
  count: number,
  options: { start?: number; step?: number; dtype?: DType; device?: Device } = {},
): Tensor {
  const out = Tensor.empty([count], { dtype: options.dtype ?? 'int32', device: options.device });
  if (count > 0) launch('arange', [out], [options.start ?? 0, options.step ?? 1]);
  return out;
}

export const full = (
  shape: readonly number[],
  value: number,
  options: { dtype?: DType; device?: Tensor['device'] } = {},
): Tensor => fill(Tensor.empty(shape, options), value);
export const zeros = (shape: readonly number[], options: { dtype?: DType; device?: Tensor['device'] } = {}): Tensor =>
  full(shape, 0, options);
export const ones = (shape: readonly number[], options: { dtype?: DType; device?: Tensor['device'] } = {}): Tensor =>
  full(shape, 1, options);
export const zerosLike = (t: Tensor): Tensor => fill(emptyLike(t), 0);
export const onesLike = (t: Tensor): Tensor => fill(emptyLike(t), 1);

/** The values in another dtype. Differentiable between floating dtypes. */
export function cast(x: Tensor, dtype: DType): Tensor {
  if (x.dtype === dtype) return x.alias();
  const out = copyTo(x, dtype);
  if (!isFloating(dtype) || !isFloating(x.dtype)) return out;
  return record('cast', [x], [out], [], ({ g }) => [cast(g, x.dtype)])[0];
}

/** The values in another dtype or on another device; not differentiable between devices. */
export function to(x: Tensor, target: { dtype?: DType; device?: Device }): Tensor {
  const typed = target.dtype ? cast(x, target.dtype) : x.alias();
  if (!target.device || canonicalDevice(target.device) === x.device) return typed;
  requireUntracked('to', typed);
  const source = contiguous(typed);
  const out = Tensor.empty(x.shape, { dtype: typed.dtype, device: target.device });
  out.storage.copyFrom(source.storage, source.byteOffset);
  for (const t of [typed, source]) t.dispose();
  return out;
}

/** A contiguous tensor with the same values: itself (aliased) when it is contiguous already. */
export function contiguous(x: Tensor): Tensor {
  if (x.contiguous) return x.alias();
  return record('contiguous', [x], [copyTo(x, x.dtype)], [], ({ g }) => [g], true)[0];
}

/** A copy with its own storage. Differentiable. */
export function clone(x: Tensor): Tensor {
  return record('clone', [x], [copyTo(x, x.dtype)], [], ({ g }) => [g])[0];
}

/** The same elements in another shape; one length may be -1. A view where the layout allows, a copy otherwise. */
export function reshape(x: Tensor, shape: readonly number[]): Tensor {
  const resolved = resolveShape(x, shape);
  if (sameShape(resolved, x.shape)) return x.alias();
  if (!x.contiguous) {
    const compact = contiguous(x);
    const out = reshape(compact, resolved);
    compact.dispose();
    return out;
  }
  const out = x.view(resolved, contiguousStrides(resolved));
  const from = x.shape;
  // With streams the first axis has another length, the same before and after.
  const streamed = from[0] === resolved[0];
  const backward: Backward = ({ g, streams }) => [reshape(g, streams ? [g.shape[0], ...from.slice(1)] : from)];
  return record('reshape', [x], [out], [], backward, streamed)[0];
}

function resolveShape(x: Tensor, shape: readonly number[]): readonly number[] {
  const known = sizeOf(shape.filter((n) => n !== -1));
  const resolved = shape.map((n) => (n === -1 ? x.size / (known || 1) : n));
  if (
    shape.filter((n) => n === -1).length > 1 ||
    sizeOf(resolved) !== x.size ||
    resolved.some((n) => !Number.isInteger(n))
  )
    throw new RangeError(`[reshape] expected ${x.size} elements as in ${x.describe()}, found shape [${shape}]`);
  return resolved;
}

/** Axes in another order: a view. */
export function permute(x: Tensor, axes: readonly number[]): Tensor {
  const order = axes.map((a) => normalizeAxis('permute', a, x.ndim));
  if (order.length !== x.ndim || new Set(order).size !== x.ndim)
    throw new RangeError(`[permute] expected a permutation of ${x.ndim} axes, found [${axes}]`);
  const out = x.view(
    order.map((a) => x.shape[a]),
    order.map((a) => x.strides[a]),
  );
  const inverse = order.map((_, i) => order.indexOf(i));
  return record('permute', [x], [out], [], ({ g }) => [permute(g, inverse)])[0];
}

/** Two axes exchanged, the last two by default: a view. */
export function transpose(x: Tensor, a = -2, b = -1): Tensor {
  const axes = x.shape.map((_, i) => i);
  const i = normalizeAxis('transpose', a, x.ndim);
  const j = normalizeAxis('transpose', b, x.ndim);
  [axes[i], axes[j]] = [axes[j], axes[i]];
  return permute(x, axes);
}

/** Repeats axes of length 1 (and new leading ones) without copying: a view with stride 0. */
export function broadcastTo(x: Tensor, shape: readonly number[]): Tensor {
  if (sameShape(x.shape, shape)) return x.alias();
  const shift = shape.length - x.ndim;
  if (shift < 0 || x.shape.some((n, i) => n !== 1 && n !== shape[i + shift]))
    throw new RangeError(`[broadcastTo] expected a shape that [${x.shape}] broadcasts to, found [${shape}]`);
  const out = x.view(shape, broadcastStrides(x.shape, x.strides, shape));
  const from = x.shape;
  return record('broadcastTo', [x], [out], [], ({ g }) => [sumTo(g, from)])[0];
}

/** A new axis of length 1. */
export function unsqueeze(x: Tensor, axis: number): Tensor {
  const at = normalizeAxis('unsqueeze', axis, x.ndim + 1);
  return reshape(x, [...x.shape.slice(0, at), 1, ...x.shape.slice(at)]);
}

/** Without the given axis, which must have length 1. */
export function squeeze(x: Tensor, axis: number): Tensor {
  const at = normalizeAxis('squeeze', axis, x.ndim);
  if (x.shape[at] !== 1) throw new RangeError(`[squeeze] expected length 1 at axis ${axis}, found ${x.describe()}`);
  return reshape(x, [...x.shape.slice(0, at), ...x.shape.slice(at + 1)]);
}

/** Elements [start, end) along an axis: a view. */
export function slice(
  x: Tensor,
  axis: number,
  start: number,
  end: number = x.shape[axis < 0 ? axis + x.ndim : axis],
): Tensor {
  const at = normalizeAxis('slice', axis, x.ndim);
  if (!Number.isInteger(start) || !Number.isInteger(end) || start < 0 || end < start || end > x.shape[at])
    throw new RangeError(
      `[slice] expected 0 <= start <= end <= ${x.shape[at]} along axis ${axis}, found ${start} to ${end}`,
    );
  const out = sliceView(x, at, start, end);
  const from = x.shape;
  return record('slice', [x], [out], [], ({ g }) => [padSlice(g, from, at, start)])[0];
}

function sliceView(x: Tensor, axis: number, start: number, end: number): Tensor {
  const shape = x.shape.map((n, i) => (i === axis ? end - start : n));
  const itemBytes = x.storage.bytes === 0 ? 0 : elementBytes(x);
  return x.view(shape, x.strides, x.byteOffset + start * x.strides[axis] * itemBytes);
}

const elementBytes = (x: Tensor): number =>
  ({ float64: 8, float32: 4, int32: 4, bfloat16: 2, float16: 2, uint8: 1, bool: 1 })[x.dtype];

/** Zeros of `shape` with `g` at `start` along an axis: the adjoint of slice. */
function padSlice(g: Tensor, shape: readonly number[], axis: number, start: number): Tensor {
  const out = fill(emptyLike(g, shape), 0);
  const part = sliceView(out, axis, start, start + g.shape[axis]);
  if (g.size > 0) launch('copy', [part, g]);
  part.dispose();
  const end = start + g.shape[axis];
  return record('padSlice', [g], [out], [], ({ g: h }) => [slice(h, axis, start, end)])[0];
}

/** Joins tensors along an axis; the other lengths and the dtypes are equal. */
export function concat(parts: readonly Tensor[], axis = 0): Tensor {
  if (parts.length === 0) throw new RangeError('[concat] expected at least one tensor, found none');
  const at = normalizeAxis('concat', axis, parts[0].ndim);
  for (const p of parts)
    if (
      p.dtype !== parts[0].dtype ||
      p.ndim !== parts[0].ndim ||
      p.shape.some((n, i) => i !== at && n !== parts[0].shape[i])
    )
      throw new RangeError(
        `[concat] expected tensors like ${parts[0].describe()} apart from axis ${axis}, found ${p.describe()}`,
      );
  const total = parts.reduce((n, p) => n + p.shape[at], 0);
  const out = emptyLike(
    parts[0],
    parts[0].shape.map((n, i) => (i === at ? total : n)),
  );
  const starts: number[] = [];
  let start = 0;
  for (const p of parts) {
    starts.push(start);
    const view = sliceView(out, at, start, start + p.shape[at]);
    if (p.size > 0) launch('copy', [view, p]);
    view.dispose();
    start += p.shape[at];
  }
  const lengths = parts.map((p) => p.shape[at]);
  return record('concat', parts, [out], [], ({ g }) =>
    lengths.map((n, i) => slice(g, at, starts[i], starts[i] + n)),
  )[0];
}

/** New leading axis over equal tensors. */
export const stack = (parts: readonly Tensor[]): Tensor => concat(parts.map((p) => unsqueeze(p, 0)));

function requireIds(op: string, ids: Tensor, ndim: number): void {
  if (ids.dtype !== 'int32' || ids.ndim !== ndim)
    throw new TypeError(`[${op}] expected int32 ids with ${ndim} axes, found ${ids.describe()}`);
}

/**
 * Rows of a table: `[N, D]` from `table [V, D]` and int32 `ids [N]`. Its gradient is a lookup contribution (see
 * autograd/tape.ts), which a sink can scatter without a dense `[V, D]` temporary.
 *
 * @throws at the next read where an id is outside [0, V)
 */
export function gatherRows(table: Tensor, ids: Tensor): Tensor {
  requireIds('gatherRows', ids, 1);
  if (table.ndim !== 2) throw new RangeError(`[gatherRows] expected a table [V, D], found ${table.describe()}`);
  const rows = ids.size;
  const compact = contiguous(table);
  const out = emptyLike(table, [rows, table.shape[1]]);
  if (out.size > 0) launch('gatherRows', [out, compact, ids]);
  compact.dispose();
  const count = table.shape[0];
  const backward: Backward = ({ g, saved: [index], streams }) => [
    streams ? lookupBySequence(g, index, count, streams) : new LookupContribution(index, g, count),
  ];
  return record('gatherRows', [table], [out], [ids], backward, true)[0];
}

/** Of token ids: what each row of a sequence sends to the embedding. Of rows of targets: the targets' cotangents in their rows. */
function lookupBySequence(g: Tensor, index: Tensor, count: number, streams: SequenceStreams): Cotangent {
  if (streams.indexKind('gatherRows', index) === 'ids') return new LookupContribution(streams.ids, g, count, streams);
  return scatterRows(g, streams.targetRows, streams.rows);
}

/** The gradient of a table behind a lookup: row ids[i] receives g[i]. */
export class LookupContribution {
  readonly kind = 'lookup';
  readonly shape: readonly number[];
  readonly ids: Tensor;
  readonly g: Tensor;
  /** Set where the rows of g lie sequence by sequence. */
  readonly streams: SequenceStreams | null;
  constructor(ids: Tensor, g: Tensor, rows: number, streams: SequenceStreams | null = null) {
    this.ids = ids;
    this.g = g;
    this.streams = streams;
    this.shape = [rows, g.shape[1]];
  }
  materialize(): Tensor {
    return scatterRows(this.g, this.ids, this.shape[0]);
  }
  /** The same contribution over other tensors. */
  kept(keep: (t: Tensor) => Tensor): LookupContribution {
    return new LookupContribution(keep(this.ids), keep(this.g), this.shape[0], this.streams);
  }
  /** into[V, D] += scale * the contribution. */
  addTo(into: Tensor, scale: number): void {
    into.storage.version++;
    const scaled = scale === 1 ? this.g : mul(this.g, scale);
    const g = contiguous(scaled);
    if (g.size > 0) launch('scatterAddRows', [into, g, this.ids]);
    g.dispose();
  }
}

/** `[V, D]`, zero except for the sums of rows of `src [N, D]` at their `ids [N]`: the adjoint of gatherRows. */
export function scatterRows(src: Tensor, ids: Tensor, rows: number): Tensor {
  requireIds('scatterRows', ids, 1);
  if (src.ndim !== 2 || src.shape[0] !== ids.size)
    throw new RangeError(
      `[scatterRows] expected src [N, D] and ids [N], found ${src.describe()} and ${ids.describe()}`,
    );
  const out = fill(emptyLike(src, [rows, src.shape[1]]), 0);
  const compact = contiguous(src);
  if (src.size > 0) launch('scatterAddRows', [out, compact, ids]);
  compact.dispose();
  return record('scatterRows', [src], [out], [ids], ({ g, saved }) => [gatherRows(g, saved[0])])[0];
}

/** One element a row: `[R]` from `x [R, V]` and int32 `ids [R]`. */
export function gatherLast(x: Tensor, ids: Tensor): Tensor {
  requireIds('gatherLast', ids, 1);
  if (x.ndim !== 2 || x.shape[0] !== ids.size)
    throw new RangeError(`[gatherLast] expected x [R, V] and ids [R], found ${x.describe()} and ${ids.describe()}`);
  const compact = contiguous(x);
  const out = emptyLike(x, [ids.size]);
  if (out.size > 0) launch('gatherLast', [out, compact, ids]);
  compact.dispose();
  const width = x.shape[1];
  return record('gatherLast', [x], [out], [ids], ({ g, saved }) => [scatterLast(g, saved[0], width)])[0];
}

/** `[R, V]`, zero except out[r, ids[r]] = g[r]: the adjoint of gatherLast. */
export function scatterLast(g: Tensor, ids: Tensor, width: number): Tensor {
  requireIds('scatterLast', ids, 1);
  if (g.ndim !== 1 || g.size !== ids.size)
    throw new RangeError(`[scatterLast] expected g [R] and ids [R], found ${g.describe()} and ${ids.describe()}`);
  const compact = contiguous(g);
  const out = emptyLike(g, [ids.size, width]);
  if (out.size > 0) launch('scatterLast', [out, compact, ids]);
  compact.dispose();
  return record('scatterLast', [g], [out], [ids], ({ g: h, saved }) => [gatherLast(h, saved[0])])[0];
}

/** int32 index of the first largest element along the last axis. Not differentiable. */
export function argmax(x: Tensor): Tensor {
  if (x.ndim === 0) throw new RangeError(`[argmax] expected at least one axis, found ${x.describe()}`);
  const compact = contiguous(x.detach());
  const out = emptyLike(x, x.shape.slice(0, -1), 'int32');
  if (out.size > 0) launch('argmax', [out, compact]);
  compact.dispose();
  return out;
}
