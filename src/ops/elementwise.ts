// Elementwise ops: one row each. A row names its kernel (native/ops/elementwise.def) and gives its derivative in terms of
// other ops, so that it can be differentiated again. Broadcasting is undone by the tape.
import { type Backward, record, requireUntracked } from '../autograd/tape.js';
import { launch } from '../native/launch.js';
import { isFloating, promote } from '../tensor/dtype.js';
import { broadcastShapes, sameShape } from '../tensor/shape.js';
import type { Tensor } from '../tensor/tensor.js';
import { broadcastTo, cast, emptyLike } from './movement.js';

/** g is the cotangent, x the input, y the output; `saves` names what the rule reads. */
interface UnaryRow {
  saves: 'x' | 'y' | 'none';
  gradient: (g: Tensor, saved: Tensor) => Tensor | null;
}

// The derivative of each function, times g.
const unaryRows = {
  neg: { saves: 'none', gradient: (g) => neg(g) },
  abs: { saves: 'x', gradient: (g, x) => mul(g, sign(x)) },
  sign: { saves: 'none', gradient: () => null },
  exp: { saves: 'y', gradient: (g, y) => mul(g, y) },
  expm1: { saves: 'y', gradient: (g, y) => mul(g, add(y, 1)) },
  log: { saves: 'x', gradient: (g, x) => div(g, x) },
  log1p: { saves: 'x', gradient: (g, x) => div(g, add(x, 1)) },
  sqrt: { saves: 'y', gradient: (g, y) => div(g, mul(y, 2)) },
  rsqrt: { saves: 'y', gradient: (g, y) => mul(g, mul(mul(square(y), y), -0.5)) },
  reciprocal: { saves: 'y', gradient: (g, y) => neg(mul(g, square(y))) },
  square: { saves: 'x', gradient: (g, x) => mul(g, mul(x, 2)) },
  sin: { saves: 'x', gradient: (g, x) => mul(g, cos(x)) },
  cos: { saves: 'x', gradient: (g, x) => neg(mul(g, sin(x))) },
  tanh: { saves: 'y', gradient: (g, y) => mul(g, rsub(square(y), 1)) },
  sigmoid: { saves: 'y', gradient: (g, y) => mul(g, mul(y, rsub(y, 1))) },
  logSigmoid: { saves: 'x', gradient: (g, x) => mul(g, sigmoid(neg(x))) },
  softplus: { saves: 'x', gradient: (g, x) => mul(g, sigmoid(x)) },
  relu: { saves: 'x', gradient: (g, x) => mul(g, cast(greater(x, 0), g.dtype)) },
  silu: {
    saves: 'x',
    gradient: (g, x) => {
      const s = sigmoid(x);
      return mul(g, mul(s, add(mul(x, rsub(s, 1)), 1)));
    },
  },
} satisfies Record<string, UnaryRow>;

export type UnaryName = keyof typeof unaryRows;
export const unaryNames = Object.keys(unaryRows) as UnaryName[];

function requireFloating(op: string, x: Tensor): void {
  if (!isFloating(x.dtype) || x.dtype === 'float16')
    throw new TypeError(`[${op}] expected float32, float64 or bfloat16, found ${x.describe()}; cast it first`);
}

/** Applies the row `name` to every element. */
export function unary(name: UnaryName, x: Tensor): Tensor {
  requireFloating(name, x);
  const out = emptyLike(x);
  if (out.size > 0) launch(name, [out, x]);
  const row: UnaryRow = unaryRows[name];
  const saved = row.saves === 'none' ? [] : [row.saves === 'x' ? x : out];
  const backward: Backward = ({ g, saved: [s] }) => [row.gradient(g, s)];
  return record(name, [x], [out], saved, backward)[0];
}

/** A function that stacks and errors know by the name of its op. */
const named = <F>(name: string, f: F): F => Object.defineProperty(f, 'name', { value: name });

type Unary = (x: Tensor) => Tensor;
const unaryOp = (name: UnaryName): Unary => named(name, (x) => unary(name, x));

export const neg: Unary = unaryOp('neg');
export const abs: Unary = unaryOp('abs');
/** -1, 0 or 1; its derivative is 0 everywhere. */
export const sign: Unary = unaryOp('sign');
export const exp: Unary = unaryOp('exp');
export const expm1: Unary = unaryOp('expm1');
/** Natural logarithm. */
export const log: Unary = unaryOp('log');
export const log1p: Unary = unaryOp('log1p');
export const sqrt: Unary = unaryOp('sqrt');
export const rsqrt: Unary = unaryOp('rsqrt');
export const reciprocal: Unary = unaryOp('reciprocal');
export const square: Unary = unaryOp('square');
export const sin: Unary = unaryOp('sin');
export const cos: Unary = unaryOp('cos');
export const tanh: Unary = unaryOp('tanh');
export const sigmoid: Unary = unaryOp('sigmoid');
/** log(sigmoid(x)), without overflow. */
export const logSigmoid: Unary = unaryOp('logSigmoid');
/** log(1 + exp(x)), without overflow. */
export const softplus: Unary = unaryOp('softplus');
/** max(x, 0); the derivative at 0 is 0. */
export const relu: Unary = unaryOp('relu');
/** x * sigmoid(x). */
export const silu: Unary = unaryOp('silu');

interface BinaryRow {
  saves: readonly ('a' | 'b' | 'y')[];
  /** Cotangents of a and b; b is a number when the right operand is one. */
  gradient: (g: Tensor, saved: Tensor[], needs: readonly boolean[], scalar: number | null) => (Tensor | null)[];
}

const binaryRows = {
  add: { saves: [], gradient: (g) => [g, g] },
  sub: { saves: [], gradient: (g, _, needs) => [g, needs[1] ? neg(g) : null] },
  rsub: { saves: [], gradient: (g, _, needs) => [needs[0] ? neg(g) : null, g] },
  mul: {
    saves: ['a', 'b'],
    gradient: (g, [a, b], needs, k) => [needs[0] ? mul(g, k ?? b) : null, needs[1] ? mul(g, a) : null],
  },
  div: {
    saves: ['a', 'b'],
    gradient: (g, [a, b], needs, k) => [
      needs[0] ? div(g, k ?? b) : null,
      needs[1] ? neg(div(mul(g, a), square(b))) : null,
    ],
  },
  rdiv: {
    saves: ['a', 'b'],
    gradient: (g, [a, b], needs, k) => [
      needs[0] ? neg(div(k === null ? mul(g, b) : mul(g, k), square(a))) : null,
      needs[1] ? div(g, a) : null,
    ],
  },
  pow: {
    saves: ['a', 'b', 'y'],
    gradient: (g, [a, b, y], needs, k) => [
      needs[0] ? mul(g, k === null ? mul(pow(a, sub(b, 1)), b) : mul(pow(a, k - 1), k)) : null,
      needs[1] ? mul(g, mul(y, log(a))) : null,
    ],
  },
  maximum: { saves: ['a', 'b'], gradient: (g, [a, b], needs, k) => splitByOrder(g, greater(a, k ?? b), needs) },
  minimum: { saves: ['a', 'b'], gradient: (g, [a, b], needs, k) => splitByOrder(g, less(a, k ?? b), needs) },
} satisfies Record<string, BinaryRow>;

export type BinaryName = keyof typeof binaryRows;
export const binaryNames = Object.keys(binaryRows) as BinaryName[];

// At a tie the whole gradient goes to b.
function splitByOrder(g: Tensor, first: Tensor, needs: readonly boolean[]): (Tensor | null)[] {
  const mask = cast(first, g.dtype);
  return [needs[0] ? mul(g, mask) : null, needs[1] ? mul(g, rsub(mask, 1)) : null];
}

/** A number takes the tensor's dtype: one that int32 cannot hold would silently become another. */
function requireRepresentable(op: string, x: Tensor, scalar: number | null): void {
  if (scalar === null || x.dtype !== 'int32' || scalar === (scalar | 0)) return;
  throw new TypeError(
    `[${op}] expected an int32 number beside ${x.describe()}, found ${scalar}; cast the tensor first`,
  );
}

/** Applies the row `name` to `a` and `b`, broadcast; a number takes the dtype of the tensor. */
export function binary(name: BinaryName, a: Tensor, b: Tensor | number): Tensor {
  const scalar = typeof b === 'number' ? b : null;
  const inputs = scalar === null ? [a, b as Tensor] : [a];
  const dtype = scalar === null ? promote(a.dtype, (b as Tensor).dtype) : a.dtype;
  if (dtype === 'bool' || dtype === 'uint8' || dtype === 'float16')
    throw new TypeError(
      `[${name}] expected float32, float64, bfloat16 or int32, found ${inputs.join(' and ')}; cast first`,
    );
  requireRepresentable(name, a, scalar);
  const shape = scalar === null ? broadcastShapes(name, a.shape, (b as Tensor).shape) : a.shape;
  const out = emptyLike(a, shape, dtype);
  if (out.size > 0) {
    const views = inputs.map((t) => prepared(t, shape, dtype));
    launch(name, [out, views[0], views[1] ?? null], [scalar ?? 0]);
    views.forEach((v, i) => {
      if (v !== inputs[i]) v.dispose();
    });
  }
  if (!isFloating(dtype)) return out;
  const row: BinaryRow = binaryRows[name];
  const pick = { a, b: scalar === null ? (b as Tensor) : a, y: out };
  const backward: Backward = ({ g, saved, needs }) => row.gradient(g, saved as Tensor[], needs, scalar);
  return record(
    name,
    inputs,
    [out],
    row.saves.map((s) => pick[s]),
    backward,
    // A sum of equal shapes hands its cotangent on as it is, whatever its rows.
    name === 'add' && inputs.every((t) => sameShape(t.shape, shape)),
  )[0];
}

/** The operand as the kernel wants it: common dtype, broadcast by strides. */
function prepared(t: Tensor, shape: readonly number[], dtype: Tensor['dtype']): Tensor {
  const bare = t.node ? t.detach() : t;
  const typed = bare.dtype === dtype ? bare : cast(bare, dtype);
  const shaped = sameShape(typed.shape, shape) ? typed : broadcastTo(typed, shape);
  for (const step of [bare, typed]) if (step !== t && step !== shaped) step.dispose();
  return shaped;
}

type Binary = (a: Tensor, b: Tensor | number) => Tensor;
const binaryOp = (name: BinaryName): Binary => named(name, (a, b) => binary(name, a, b));

export const add: Binary = binaryOp('add');
export const sub: Binary = binaryOp('sub');
export const mul: Binary = binaryOp('mul');
export const div: Binary = binaryOp('div');
/** b - a. */
export const rsub: Binary = binaryOp('rsub');
/** b / a. */
export const rdiv: Binary = binaryOp('rdiv');
/** a to the power of b; the derivative for b needs a > 0. */
export const pow: Binary = binaryOp('pow');
/** The larger one; at a tie the gradient goes to b. */
export const maximum: Binary = binaryOp('maximum');
/** The smaller one; at a tie the gradient goes to b. */
export const minimum: Binary = binaryOp('minimum');

/** a += b in place; b broadcasts. Not differentiable. */
export function addInPlace(a: Tensor, b: Tensor): void {
  requireUntracked('addInPlace', a, b);
  a.storage.version++;
  if (a.size === 0) return;
  const view = prepared(b, a.shape, a.dtype);
  launch('add', [a, a, view], [0]);
  if (view !== b) view.dispose();
}

/** a *= scalar in place. Not differentiable. */
export function scaleInPlace(a: Tensor, scalar: number): void {
  requireUntracked('scaleInPlace', a);
  a.storage.version++;
  if (a.size > 0) launch('mul', [a, a, null], [scalar]);
}

export const compareNames = ['equal', 'notEqual', 'less', 'lessEqual', 'greater', 'greaterEqual'] as const;
export type CompareName = (typeof compareNames)[number];

/** bool tensor of a comparison. Not differentiable. */
export function compare(name: CompareName, a: Tensor, b: Tensor | number): Tensor {
  const scalar = typeof b === 'number' ? b : null;
  const dtype = scalar === null ? promote(a.dtype, (b as Tensor).dtype) : a.dtype;
  const shape = scalar === null ? broadcastShapes(name, a.shape, (b as Tensor).shape) : a.shape;
  const out = emptyLike(a, shape, 'bool');
  if (out.size === 0) return out;
  const x = prepared(a, shape, dtype);
  const y = scalar === null ? prepared(b as Tensor, shape, dtype) : null;
  launch(name, [out, x, y], [scalar ?? 0]);
  if (x !== a) x.dispose();
  if (y && y !== b) y.dispose();
  return out;
}

type Compare = (a: Tensor, b: Tensor | number) => Tensor;
const compareOp = (name: CompareName): Compare => named(name, (a, b) => compare(name, a, b));
export const equal: Compare = compareOp('equal');
export const notEqual: Compare = compareOp('notEqual');
export const less: Compare = compareOp('less');
export const lessEqual: Compare = compareOp('lessEqual');
export const greater: Compare = compareOp('greater');
export const greaterEqual: Compare = compareOp('greaterEqual');

/** condition ? a : b, all broadcast; condition bool. The gradient of the side not taken is zero. */
export function where(condition: Tensor, a: Tensor, b: Tensor): Tensor {
  if (condition.dtype !== 'bool')
    throw new TypeError(`[where] expected a bool condition, found ${condition.describe()}`);
  const dtype = promote(a.dtype, b.dtype);
  const shape = broadcastShapes('where', condition.shape, broadcastShapes('where', a.shape, b.shape));
  const out = emptyLike(a, shape, dtype);
  if (out.size > 0) {
    const views = [prepared(condition, shape, 'bool'), prepared(a, shape, dtype), prepared(b, shape, dtype)];
    launch('where', [out, ...views]);
    views.forEach((v, i) => {
      if (v !== [condition, a, b][i]) v.dispose();
    });
  }
  if (!isFloating(dtype)) return out;
  return record('where', [a, b], [out], [condition], ({ g, saved: [c], needs }) => {
    const mask = cast(c, g.dtype);
    return [needs[0] ? mul(g, mask) : null, needs[1] ? mul(g, rsub(mask, 1)) : null];
  })[0];
}

/** x limited to [low, high]; the gradient outside is zero. */
export const clamp = (x: Tensor, low: number, high: number): Tensor => {
  const above = maximum(x, low);
  return minimum(above, high);
};
