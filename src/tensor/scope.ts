// Scopes: every tensor created inside is disposed of when the scope ends, except what it returns.
import type { Tensor } from './tensor.js';

let current: Set<Tensor> | undefined;

/** A tensor, or an array, tuple or record of trees. */
export type Tree = Tensor | readonly Tree[] | { readonly [key: string]: Tree } | Map<string, Tensor> | undefined | null;

// Tensor registers itself here, so that this file need not import the class (which imports this file).
let isTensor: (value: unknown) => value is Tensor;
export function defineTensorTest(test: (value: unknown) => value is Tensor): void {
  isTensor = test;
}

/** Calls `visit` on every tensor of a value; looks into arrays, maps and plain objects. */
export function forEachTensor(value: unknown, visit: (t: Tensor) => void): void {
  if (value === null || typeof value !== 'object') return;
  if (isTensor(value)) visit(value);
  else if (Array.isArray(value)) for (const item of value) forEachTensor(item, visit);
  else if (value instanceof Map) for (const item of value.values()) forEachTensor(item, visit);
  else if (Object.getPrototypeOf(value) === Object.prototype || Object.getPrototypeOf(value) === null)
    for (const item of Object.values(value)) forEachTensor(item, visit);
}

/** Called by the Tensor constructor. */
export function adopt(t: Tensor): void {
  current?.add(t);
}

/** Takes a tensor out of the current scope: the caller now owns it and disposes of it. Returns it. */
export function detachFromScope<T extends Tensor>(t: T): T {
  current?.delete(t);
  return t;
}

function leave(inside: Set<Tensor>, outer: Set<Tensor> | undefined, result: unknown): void {
  current = outer;
  forEachTensor(result, (t) => {
    if (inside.delete(t)) outer?.add(t);
  });
  for (const t of inside) t.dispose();
}

/**
 * Runs `f` and disposes of every tensor created inside except those in its result (arrays, maps and plain objects are
 * searched), which pass to the surrounding scope.
 *
 * @throws TypeError when `f` returns a promise: what it creates after its first await would escape.
 */
export function scope<T>(f: () => T): T {
  const outer = current;
  const inside = new Set<Tensor>();
  current = inside;
  let result: T;
  try {
    result = f();
    if (typeof (result as { then?: unknown } | undefined)?.then === 'function')
      throw new TypeError(
        '[scope] expected a synchronous function, found one that returns a promise; read data after the scope, or dispose of tensors with `using`',
      );
  } catch (error) {
    leave(inside, outer, undefined);
    throw error;
  }
  leave(inside, outer, result);
  return result;
}

/** Like scope, but what `f` returns belongs to the caller and to no scope; tensors that are not new are aliased. */
export function owned<T extends readonly (Tensor | null)[]>(f: () => T): { [K in keyof T]: T[K] } {
  const outer = current;
  const inside = new Set<Tensor>();
  current = inside;
  try {
    const seen = new Set<Tensor>();
    return f().map((t) => {
      if (!t) return t;
      const fresh = inside.has(t) && !seen.has(t);
      seen.add(t);
      return detachFromScope(fresh ? t : t.alias());
    }) as unknown as { [K in keyof T]: T[K] };
  } finally {
    current = outer;
    for (const t of inside) t.dispose();
  }
}

/** Like scope, for what outlives it: everything created inside belongs to the caller, until `release`. */
export function collected<T>(f: () => T): { result: T; release(): void } {
  const outer = current;
  const inside = new Set<Tensor>();
  const release = (): void => {
    for (const t of inside) t.dispose();
  };
  current = inside;
  try {
    return { result: f(), release };
  } catch (error) {
    release();
    throw error;
  } finally {
    current = outer;
  }
}
