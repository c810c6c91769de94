// Host arrays: what references compute with, in float64, and how tensors are made of them. Uses no op under test.
import type { DType } from '../../src/tensor/dtype.js';

/** Row-major values; `dtype` where the op under test answers in another one than its inputs'. */
export interface Host {
  readonly shape: readonly number[];
  readonly values: Float64Array;
  readonly dtype?: DType;
}

export const sizeOf = (shape: readonly number[]): number => shape.reduce((n, m) => n * m, 1);

export const host = (shape: readonly number[], values: ArrayLike<number>, dtype?: DType): Host => {
  if (values.length !== sizeOf(shape)) throw new Error(`host: ${values.length} values for shape [${shape}]`);
  return { shape, values: Float64Array.from(values), dtype };
};

/** An array whose element at `index` is f(index, position). */
export function build(shape: readonly number[], f: (index: number[], at: number) => number, dtype?: DType): Host {
  const values = new Float64Array(sizeOf(shape));
  const index = new Array<number>(shape.length).fill(0);
  for (let at = 0; at < values.length; at++) {
    values[at] = f(index, at);
    for (let axis = shape.length - 1; axis >= 0 && ++index[axis] === shape[axis]; axis--) index[axis] = 0;
  }
  return { shape, values, dtype };
}

/** Element of `x` at an index of a shape that x broadcasts to. */
export function pick(x: Host, index: readonly number[]): number {
  let at = 0;
  const shift = index.length - x.shape.length;
  for (let i = 0; i < x.shape.length; i++) at = at * x.shape[i] + (x.shape[i] === 1 ? 0 : index[i + shift]);
  return x.values[at];
}

/** The usual rule, written again: align right, 1 stretches. */
export function broadcastShape(...shapes: readonly (readonly number[])[]): number[] {
  const ndim = Math.max(...shapes.map((s) => s.length));
  return Array.from({ length: ndim }, (_, i) =>
    shapes.reduce((n, s) => {
      const m = s[s.length - ndim + i] ?? 1;
      return n === 1 ? m : n;
    }, 1),
  );
}

/** f of the elements of `inputs`, broadcast. */
export function mapBroadcast(f: (...x: number[]) => number, inputs: readonly Host[], dtype?: DType): Host {
  const shape = broadcastShape(...inputs.map((x) => x.shape));
  const args = inputs.map(() => 0);
  return build(
    shape,
    (index) => {
      for (let i = 0; i < args.length; i++) args[i] = pick(inputs[i], index);
      return f(...args);
    },
    dtype,
  );
}

/** A generator of numbers in [0, 1) by a seed (mulberry32): the same everywhere, and not the engine's own. */
export function randomSource(seed: string): () => number {
  let state = 0x9e3779b9;
  for (const c of seed) state = Math.imul(state ^ c.charCodeAt(0), 0x85ebca6b) ^ (state >>> 13);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

const f32 = new Float32Array(1);
const bits = new Uint32Array(f32.buffer);

/** To the nearest bfloat16 (through float32, as data enters), ties to even. */
export function roundBfloat16(x: number): number {
  f32[0] = x;
  if (!Number.isFinite(f32[0])) return f32[0];
  bits[0] += 0x7fff + ((bits[0] >>> 16) & 1);
  bits[0] = (bits[0] & 0xffff0000) >>> 0;
  return f32[0];
}

/** The nearest value that `dtype` holds. */
export function roundTo(dtype: DType, x: number): number {
  if (dtype === 'float32') return Math.fround(x);
  if (dtype === 'bfloat16') return roundBfloat16(x);
  return x;
}

/** Reinterprets [M, N] pieces: the transposed copy of the last two axes. */
export function transposeLast(x: Host): Host {
  const n = x.shape.length;
  const shape = [...x.shape.slice(0, -2), x.shape[n - 1], x.shape[n - 2]];
  return build(shape, (i) => pick(x, [...i.slice(0, -2), i[n - 1], i[n - 2]]), x.dtype);
}
