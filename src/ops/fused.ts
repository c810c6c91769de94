// A fused op is its definition plus a faster evaluation. The definition, made of primitive ops, is its oracle in tests and
// its path to derivatives of higher order: where backward is itself differentiated, it is the vjp of the definition.
import { type BackwardContext, type Cotangent, differentiate, record } from '../autograd/tape.js';
import type { Tensor } from '../tensor/tensor.js';

export interface FusedOp {
  name: string;
  inputs: readonly Tensor[];
  /** Runs the kernel; `saved` are extra tensors for backward (inputs are saved anyway). */
  forward: () => { output: Tensor; saved: readonly Tensor[] };
  /** The same value from primitive ops. */
  definition: (...inputs: Tensor[]) => Tensor;
  /** Cotangents from the kernel; context.saved holds the inputs, then the extra tensors. */
  backward: (context: BackwardContext) => readonly Cotangent[];
}

/** Runs and records a fused op. */
export function fused(op: FusedOp): Tensor {
  const { output, saved } = op.forward();
  const count = op.inputs.length;
  return record(op.name, op.inputs, [output], [...op.inputs, ...saved], (context) =>
    context.differentiable
      ? vjpOfDefinition(op.definition, context.saved.slice(0, count), context.g, context.needs)
      : op.backward(context),
  )[0];
}

function vjpOfDefinition(
  definition: FusedOp['definition'],
  inputs: readonly Tensor[],
  g: Tensor,
  needs: readonly boolean[],
): Cotangent[] {
  const wanted = inputs.filter((_, i) => needs[i]);
  const { gradients } = differentiate(
    wanted,
    (tracked) => {
      let at = 0;
      return definition(...inputs.map((t, i) => (needs[i] ? tracked[at++] : t)));
    },
    (y) => [{ tensor: y, cotangent: g }],
  );
  let at = 0;
  return inputs.map((_, i) => (needs[i] ? gradients[at++] : null));
}
