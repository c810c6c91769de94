// Function transforms: grad, valueAndGrad, vjp, jvp, hvp. They nest without limit of order.
import { fill } from '../ops/movement.js';
import { forEachTensor, scope } from '../tensor/scope.js';
import { sameShape } from '../tensor/shape.js';
import { Tensor } from '../tensor/tensor.js';
import { type DifferentiateOptions, differentiate } from './tape.js';

/** A tensor, or nested arrays, plain objects and maps of tensors: what transforms take and give gradients for. */
// biome-ignore lint/suspicious/noExplicitAny: a tree's type is the caller's
export type TensorTree = any;

/** Every tensor of a tree, in order. */
export function leavesOf(tree: TensorTree): Tensor[] {
  const found: Tensor[] = [];
  forEachTensor(tree, (t) => found.push(t));
  return found;
}

/** The same tree with each tensor replaced. */
export function mapTree<T>(tree: T, f: (t: Tensor) => unknown): T {
  if (tree instanceof Tensor) return f(tree) as T;
  if (Array.isArray(tree)) return tree.map((item) => mapTree(item, f)) as T;
  if (tree instanceof Map) return new Map([...tree].map(([k, v]) => [k, mapTree(v, f)])) as T;
  if (tree !== null && typeof tree === 'object' && Object.getPrototypeOf(tree) === Object.prototype)
    return Object.fromEntries(Object.entries(tree).map(([k, v]) => [k, mapTree(v, f)])) as T;
  return tree;
}

function withLeaves<T>(tree: T, leaves: readonly (Tensor | null)[], zero: (like: Tensor) => Tensor): T {
  let at = 0;
  return mapTree(tree, (t) => leaves[at++] ?? zero(t));
}

const zerosLike = (t: Tensor): Tensor => fill(Tensor.empty(t.shape, { dtype: t.dtype, device: t.device }), 0);
const onesLike = (t: Tensor): Tensor => fill(Tensor.empty(t.shape, { dtype: t.dtype, device: t.device }), 1);

function requireScalar(op: string, value: unknown): Tensor {
  if (!(value instanceof Tensor) || value.size !== 1)
    throw new TypeError(
      `[${op}] expected a function that returns a tensor of one element, found ${value instanceof Tensor ? value.describe() : typeof value}; try .sum()`,
    );
  return value;
}

/**
 * The function's value and its gradient for every argument (trees of tensors allowed; a gradient has the tree of its argument).
 * Inputs that do not matter get zeros.
 *
 * @param f returns a tensor of one element; or an array whose first entry is one (the others are passed through)
 */
export function valueAndGrad<A extends TensorTree[], R extends Tensor | readonly [Tensor, ...unknown[]]>(
  f: (...args: A) => R,
): (...args: A) => [value: R, gradients: A] {
  return (...args) =>
    scope(() => {
      const { result, gradients } = differentiate(
        leavesOf(args),
        (tracked) => f(...withLeaves(args, tracked, zerosLike)),
        (value) => {
          const tensor = requireScalar('valueAndGrad', Array.isArray(value) ? value[0] : value);
          return [{ tensor, cotangent: onesLike(tensor) }];
        },
      );
      return [result, withLeaves(args, gradients, zerosLike)];
    });
}

/** The gradient of a function for every argument: `const [gx] = grad(f)(x)`. See valueAndGrad. */
export function grad<A extends TensorTree[]>(f: (...args: A) => Tensor): (...args: A) => A {
  const both = valueAndGrad(f);
  return (...args) => scope(() => both(...args)[1]);
}

/**
 * Vector-Jacobian product: the value of f, and for every argument the cotangent that `cotangent` is pulled back to.
 *
 * @param cotangent a tree like f's result, or a function that makes it from the result
 */
export function vjp<A extends TensorTree[], R extends TensorTree>(
  f: (...args: A) => R,
  args: A,
  cotangent: R | ((value: R) => R),
  options?: DifferentiateOptions,
): [value: R, cotangents: A] {
  return scope(() => {
    const { result, gradients } = differentiate(
      leavesOf(args),
      (tracked) => f(...withLeaves(args, tracked, zerosLike)),
      (value) => {
        const given = leavesOf(typeof cotangent === 'function' ? (cotangent as (v: R) => R)(value) : cotangent);
        const tensors = leavesOf(value);
        if (given.length !== tensors.length)
          throw new TypeError(`[vjp] expected ${tensors.length} cotangents, one per output, found ${given.length}`);
        return tensors.map((tensor, i) => {
          if (!sameShape(tensor.shape, given[i].shape))
            throw new RangeError(
              `[vjp] expected a cotangent of shape [${tensor.shape}] for output ${i}, found [${given[i].shape}]`,
            );
          return { tensor, cotangent: given[i] };
        });
      },
      options,
    );
    return [result, withLeaves(args, gradients, zerosLike)];
  });
}

/**
 * Jacobian-vector product: the value of f and the derivative along `tangents` (trees like the arguments). Computed as the
 * vjp of the (linear) map from cotangents to input cotangents, so it holds for every differentiable op.
 */
export function jvp<A extends TensorTree[], R extends TensorTree>(
  f: (...args: A) => R,
  args: A,
  tangents: A,
): [value: R, tangent: R] {
  requireLike('jvp', args, tangents);
  return scope(() => {
    const value = f(...args);
    const zero = mapTree(value, zerosLike);
    const [, [tangent]] = vjp((u: R) => vjp(f, args, u)[1], [zero], tangents);
    return [value, tangent];
  });
}

/** Hessian-vector product of a scalar function along `tangents`: the gradient of its directional derivative. */
export function hvp<A extends TensorTree[]>(f: (...args: A) => Tensor, args: A, tangents: A): A {
  requireLike('hvp', args, tangents);
  return scope(() => vjp((...inner: A) => grad(f)(...inner), args, tangents)[1]);
}

function requireLike(op: string, args: TensorTree, tangents: TensorTree): void {
  const a = leavesOf(args);
  const t = leavesOf(tangents);
  if (a.length !== t.length || a.some((x, i) => !sameShape(x.shape, t[i].shape)))
    throw new RangeError(
      `[${op}] expected tangents shaped like the arguments [${a.map(String)}], found [${t.map(String)}]`,
    );
}
