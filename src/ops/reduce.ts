// Reductions: over any axes, in a fixed order, accumulated in float32 at least.
import { defineTapeOps, record } from '../autograd/tape.js';
import { launch } from '../native/launch.js';
import { isFloating } from '../tensor/dtype.js';
import { contiguousStrides, normalizeAxis, sameShape, sizeOf } from '../tensor/shape.js';
import type { Tensor } from '../tensor/tensor.js';
import { add, addInPlace, equal, mul, reciprocal } from './elementwise.js';
import { broadcastTo, cast, emptyLike, reshape } from './movement.js';

export interface ReduceOptions {
  /** Axes to reduce; all by default. */
  axes?: readonly number[] | number;
  /** Keep reduced axes with length 1. */
  keepDims?: boolean;
}

function plan(op: string, x: Tensor, options: ReduceOptions): { reduced: number[]; kept: number[] } {
  const given = options.axes === undefined ? x.shape.map((_, i) => i) : [options.axes].flat();
  const reduced = [...new Set(given.map((a) => normalizeAxis(op, a, x.ndim)))].sort((a, b) => a - b);
  return { reduced, kept: x.shape.map((_, i) => i).filter((i) => !reduced.includes(i)) };
}

const keptShape = (x: Tensor, reduced: readonly number[]): number[] =>
  x.shape.map((n, i) => (reduced.includes(i) ? 1 : n));

/** Runs a reduction kernel over `reduced`; the result has length 1 there. */
function reduceRaw(kernel: string, x: Tensor, reduced: readonly number[], kept: readonly number[]): Tensor {
  const order = [...kept, ...reduced];
  const out = emptyLike(x, keptShape(x, reduced));
  if (out.size === 0) return out;
  const from = x.view(
    order.map((i) => x.shape[i]),
    order.map((i) => x.strides[i]),
  );
  const shape = kept.map((i) => x.shape[i]);
  const to = out.view(shape, contiguousStrides(shape));
  launch(kernel, [to, from], [reduced.length]);
  from.dispose();
  to.dispose();
  return out;
}

const finish = (x: Tensor, y: Tensor, reduced: readonly number[], options: ReduceOptions): Tensor =>
  options.keepDims
    ? y
    : reshape(
        y,
        x.shape.filter((_, i) => !reduced.includes(i)),
      );

/** Sum over axes. Also for int32. */
export function sum(x: Tensor, options: ReduceOptions = {}): Tensor {
  const { reduced, kept } = plan('sum', x, options);
  const from = x.shape;
  const y = record('sum', [x], [reduceRaw('reduceSum', x, reduced, kept)], [], ({ g }) => [broadcastTo(g, from)])[0];
  return finish(x, y, reduced, options);
}

/** Arithmetic mean over axes, of floating dtypes. */
export function mean(x: Tensor, options: ReduceOptions = {}): Tensor {
  if (!isFloating(x.dtype))
    throw new TypeError(`[mean] expected a floating dtype, found ${x.describe()}; cast it first`);
  const { reduced } = plan('mean', x, options);
  return mul(sum(x, options), 1 / sizeOf(reduced.map((i) => x.shape[i])));
}

function extreme(kernel: 'reduceMax' | 'reduceMin', x: Tensor, options: ReduceOptions): Tensor {
  const { reduced, kept } = plan(kernel, x, options);
  if (sizeOf(reduced.map((i) => x.shape[i])) === 0)
    throw new RangeError(`[${kernel}] expected at least one element to reduce, found ${x.describe()}`);
  const y = record(kernel, [x], [reduceRaw(kernel, x, reduced, kept)], [x], ({ g, saved: [input] }) => {
    const value = input.detach();
    const top = reduceRaw(kernel, value, reduced, kept);
    const hits = cast(equal(value, top), g.dtype);
    const ties = reduceRaw('reduceSum', hits, reduced, kept);
    return [mul(broadcastTo(g, value.shape), mul(hits, reciprocal(ties)))];
  })[0];
  return finish(x, y, reduced, options);
}

/** Largest element over axes; ties share the gradient equally. */
export const max = (x: Tensor, options: ReduceOptions = {}): Tensor => extreme('reduceMax', x, options);
/** Smallest element over axes; ties share the gradient equally. */
export const min = (x: Tensor, options: ReduceOptions = {}): Tensor => extreme('reduceMin', x, options);

/** Sums a tensor down to a shape that broadcasts to its own: the adjoint of broadcasting. */
export function sumTo(x: Tensor, shape: readonly number[]): Tensor {
  if (sameShape(x.shape, shape)) return x.alias();
  const shift = x.ndim - shape.length;
  const axes = x.shape.map((_, i) => i).filter((i) => i < shift || (shape[i - shift] === 1 && x.shape[i] !== 1));
  return reshape(sum(x, { axes, keepDims: true }), shape);
}

// Here, because this file knows all four and every op loads it: the tape itself names no op. By function, since these files
// import each other and some may still be loading.
defineTapeOps({
  add: (a, b) => add(a, b),
  addInPlace: (into, b) => addInPlace(into, b),
  sumTo,
  cast: (t, dtype) => cast(t, dtype),
});
