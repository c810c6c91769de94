// A fused op is its definition plus a faster evaluation. The definition, made of primitive ops, is its oracle in tests and
// its path to derivatives of higher order: where backward is itself differentiated, it is the vjp of the definition, unless
// backward is made of differentiable ops (the backward passes of backward.ts are fused ops themselves).
import { type BackwardContext, type Cotangent, differentiate, record } from '../autograd/tape.js';
import type { Tensor } from '../tensor/tensor.js';

interface Common {
  name: string;
  inputs: readonly Tensor[];
  /** Cotangents from the kernel; context.saved holds the inputs, then the extra tensors. */
  backward: (context: BackwardContext) => readonly Cotangent[];
  /** Backward is made of differentiable ops: no other path to higher orders is needed. */
  differentiable?: boolean;
  /** Backward keeps the gradients of sequences apart where it is asked to, by differentiable ops. */
  streamed?: boolean;
}

export interface FusedOp extends Common {
  /** Runs the kernel; `saved` are extra tensors for backward (inputs are saved anyway). */
  forward: () => { output: Tensor; saved: readonly Tensor[] };
  /** The same value from primitive ops. */
  definition: (...inputs: Tensor[]) => Tensor;
}

/** A fused op with several outputs. */
export interface FusedOps extends Common {
  forward: () => { outputs: readonly Tensor[]; saved: readonly Tensor[] };
  definition: (...inputs: Tensor[]) => readonly Tensor[];
}

/** Runs and records a fused op. */
export const fused = (op: FusedOp): Tensor =>
  fusedOutputs({
    ...op,
    forward: () => {
      const { output, saved } = op.forward();
      return { outputs: [output], saved };
    },
    definition: (...inputs) => [op.definition(...inputs)],
  })[0];

/** Runs and records a fused op with several outputs; backward reads `context.cotangents`, null where zero. */
export function fusedOutputs(op: FusedOps): readonly Tensor[] {
  const { outputs, saved } = op.forward();
  const count = op.inputs.length;
  return record(
    op.name,
    op.inputs,
    outputs,
    [...op.inputs, ...saved],
    (context) =>
      context.differentiable && !op.differentiable && !(context.streams && op.streamed)
        ? vjpOf(op.definition, context.saved.slice(0, count), context.cotangents, context.needs)
        : op.backward(context),
    op.streamed ?? false,
  );
}

/** Cotangents of the wanted inputs of `f` from those of its outputs (null: zero), by differentiable ops. */
export function vjpOf(
  f: (...inputs: Tensor[]) => readonly Tensor[],
  inputs: readonly Tensor[],
  cotangents: readonly (Tensor | null)[],
  needs: readonly boolean[],
): (Tensor | null)[] {
  const wanted = inputs.filter((_, i) => needs[i]);
  const { gradients } = differentiate(
    wanted,
    (tracked) => {
      let at = 0;
      return f(...inputs.map((t, i) => (needs[i] ? tracked[at++] : t)));
    },
    (outputs) =>
      outputs.flatMap((tensor, i) => {
        const cotangent = cotangents[i];
        return cotangent ? [{ tensor, cotangent }] : [];
      }),
  );
  let at = 0;
  return inputs.map((_, i) => (needs[i] ? gradients[at++] : null));
}
