// The first step of the lower level where its gradient is known already: θ_1 takes the memory of that gradient, so that θ̂
// costs nothing beside it. θ is not touched.
import { addInPlace, scaleInPlace } from '../../ops/elementwise.js';
import { cast } from '../../ops/movement.js';
import { detachFromScope } from '../../tensor/scope.js';
import { withTag } from '../../tensor/storage.js';
import type { Tensor } from '../../tensor/tensor.js';

export interface FirstStep {
  /** θ_1 in the masters' dtype: the gradients' own tensors, overwritten. */
  readonly masters: ReadonlyMap<string, Tensor>;
  /** θ_1 as the model computes with it: the same tensors, or rounded copies. */
  readonly theta: Map<string, Tensor>;
  /** Frees the copies; the gradients' tensors stay their owner's. */
  release(): void;
}

/** gradients <- masters - α gradients, rounded to the dtypes of `start` where these are narrower. */
export function firstStep(
  gradients: ReadonlyMap<string, Tensor>,
  masters: ReadonlyMap<string, Tensor>,
  start: ReadonlyMap<string, Tensor>,
  learningRate: number,
): FirstStep {
  const theta = new Map<string, Tensor>();
  const copies: Tensor[] = [];
  for (const [name, t] of gradients) {
    scaleInPlace(t, -learningRate);
    addInPlace(t, masters.get(name)!);
    const { dtype } = start.get(name)!;
    if (dtype === t.dtype) theta.set(name, t);
    else {
      const copy = withTag('weights', () => detachFromScope(cast(t, dtype)));
      copies.push(copy);
      theta.set(name, copy);
    }
  }
  return {
    masters: gradients,
    theta,
    release: () => {
      for (const t of copies) t.dispose();
    },
  };
}
