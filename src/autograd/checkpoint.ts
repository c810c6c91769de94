// Gradient checkpointing and custom functions.
import { scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { type Cotangent, differentiate, forbidCaptured, record } from './tape.js';

/**
 * Runs `f` without keeping its intermediate tensors; backward runs it again. Pays one more forward for the memory of f. Sinks
 * of its inputs receive what they would without it, and gradients kept apart by sequence stay so.
 *
 * @param f a function of its arguments alone, of one result or several: a differentiated tensor that it captures is an error
 */
export function checkpoint<T extends Tensor | readonly Tensor[]>(
  f: (...inputs: Tensor[]) => T,
  ...inputs: Tensor[]
): T {
  const result = scope(() => forbidCaptured(() => f(...inputs.map((t) => t.detach()))));
  const several = Array.isArray(result);
  const outputs = listOf(result).map((t) => (t.node === null && inputs.includes(t) ? t.alias() : t));
  const recorded = record(
    'checkpoint',
    inputs,
    outputs,
    inputs,
    ({ cotangents, saved, needs, sink, streams }) => {
      const wanted = saved.filter((_, i) => needs[i]);
      const sinks = saved.map((_, i) => sink(i)).filter((_, i) => needs[i]);
      const { gradients } = differentiate(
        wanted,
        (tracked) => {
          let at = 0;
          return listOf(f(...saved.map((t, i) => (needs[i] ? tracked[at++] : t))));
        },
        (again) =>
          again.flatMap((tensor, i) => {
            const cotangent = cotangents[i];
            return cotangent ? [{ tensor, cotangent }] : [];
          }),
        { sinks, streams },
      );
      let at = 0;
      return saved.map((_, i) => (needs[i] ? gradients[at++] : null));
    },
    true,
  );
  return (several ? recorded : recorded[0]) as T;
}

const listOf = (result: Tensor | readonly Tensor[]): readonly Tensor[] =>
  Array.isArray(result) ? result : [result as Tensor];

/** A function with a derivative of the caller's own. */
export interface CustomFunction {
  /** Named in errors. */
  name: string;
  /** The value, and the tensors that backward needs. */
  forward: (...inputs: Tensor[]) => { output: Tensor; saved: readonly Tensor[] };
  /** The cotangent of each input (null: zero), made of differentiable ops if it is to be differentiated again. */
  backward: (g: Tensor, saved: readonly Tensor[]) => readonly (Tensor | null)[];
}

/** A differentiable function from a hand-written forward and backward. */
export function customFunction(definition: CustomFunction): (...inputs: Tensor[]) => Tensor {
  return (...inputs) => {
    const { output, saved } = forbidCaptured(() => definition.forward(...inputs.map((t) => t.detach())));
    const own = output.alias();
    return record(
      definition.name,
      inputs,
      [own],
      saved.map((s) => (s === output ? own : s)),
      ({ g, saved: kept }) => {
        const cotangents = definition.backward(g, kept) as readonly Cotangent[];
        if (cotangents.length !== inputs.length)
          throw new Error(
            `[${definition.name}] expected ${inputs.length} cotangents from backward, found ${cotangents.length}`,
          );
        return cotangents;
      },
    )[0];
  };
}
