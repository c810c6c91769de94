// Shapes and strides: pure functions on arrays of integers.

export const sizeOf = (shape: readonly number[]): number => {
  let n = 1;
  for (let i = 0; i < shape.length; i++) n *= shape[i];
  return n;
};

export function contiguousStrides(shape: readonly number[]): number[] {
  const strides = new Array<number>(shape.length);
  let step = 1;
  for (let i = shape.length - 1; i >= 0; i--) {
    strides[i] = step;
    step *= shape[i];
  }
  return strides;
}

/** True when elements lie in row-major order without gaps; strides of axes of length 1 do not matter. */
export function isContiguous(shape: readonly number[], strides: readonly number[]): boolean {
  let step = 1;
  for (let i = shape.length - 1; i >= 0; i--) {
    if (shape[i] !== 1 && strides[i] !== step) return false;
    step *= shape[i];
  }
  return true;
}

export function sameShape(a: readonly number[], b: readonly number[]): boolean {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false;
  return true;
}

/** The common shape of two by the usual rule: align right; lengths are equal or one of them is 1. Throws, naming both. */
export function broadcastShapes(op: string, a: readonly number[], b: readonly number[]): readonly number[] {
  if (sameShape(a, b)) return a;
  const n = Math.max(a.length, b.length);
  const shape = new Array<number>(n);
  for (let i = 0; i < n; i++) {
    const x = a[a.length - n + i] ?? 1;
    const y = b[b.length - n + i] ?? 1;
    if (x !== y && x !== 1 && y !== 1)
      throw new RangeError(
        `[${op}] expected shapes that broadcast, found [${a}] and [${b}]; try reshape or unsqueeze so that axes align from the right`,
      );
    shape[i] = x === 1 ? y : x;
  }
  return shape;
}

/** Strides of a tensor of `shape` seen as the broadcast shape `to`. */
export function broadcastStrides(
  shape: readonly number[],
  strides: readonly number[],
  to: readonly number[],
): number[] {
  const shift = to.length - shape.length;
  return to.map((n, i) => (i < shift || (shape[i - shift] === 1 && n !== 1) ? 0 : strides[i - shift]));
}

/** A non-negative axis; throws where it is out of range. */
export function normalizeAxis(op: string, axis: number, ndim: number): number {
  const a = axis < 0 ? axis + ndim : axis;
  if (!Number.isInteger(axis) || a < 0 || a >= ndim)
    throw new RangeError(`[${op}] expected an axis from ${-ndim} to ${ndim - 1}, found ${axis}`);
  return a;
}
