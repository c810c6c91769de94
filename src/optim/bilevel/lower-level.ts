// The lower level of a bilevel problem: K plain gradient steps from the current point, on a copy (spo.md §2, Eq. 11).
// The starting map is never written: θ̂ is another map, so nothing that throws in between can lose θ.
import { addInPlace, mul } from '../../ops/elementwise.js';
import { cast } from '../../ops/movement.js';
import { detachFromScope, scope } from '../../tensor/scope.js';
import { withTag } from '../../tensor/storage.js';
import type { Tensor } from '../../tensor/tensor.js';

export interface LowerLevelOptions {
  /** K; 0 returns the starting point itself. */
  steps: number;
  /** α. */
  learningRate: number;
}

/** Tensors of the lower-level variable at θ_K; dispose of them with `release` (the starting point is not touched). */
export interface LowerSolution {
  theta: Map<string, Tensor>;
  release(): void;
}

/**
 * θ_0 = start, θ_{k+1} = θ_k - α ∇L(θ_k). Steps are taken in the dtype of `masters` (float32 beside bfloat16), and rounded to
 * the dtype of `start` for the next evaluation.
 *
 * @param gradient leaves ∇L(θ) in the buffers it returns, which are read before it is called again
 */
export function descend(
  start: ReadonlyMap<string, Tensor>,
  masters: ReadonlyMap<string, Tensor>,
  gradient: (theta: Map<string, Tensor>, step: number) => ReadonlyMap<string, Tensor>,
  options: LowerLevelOptions,
): LowerSolution {
  let current = new Map(start);
  let owned: Tensor[] = [];
  let precise: ReadonlyMap<string, Tensor> = masters;
  let preciseOwned: Tensor[] = [];
  for (let k = 0; k < options.steps; k++) {
    const g = gradient(current, k);
    const next = new Map<string, Tensor>();
    const rounded = new Map<string, Tensor>();
    withTag('weights', () => {
      for (const [name, t] of precise) {
        const moved = stepped(t, g.get(name)!, options.learningRate, preciseOwned.includes(t));
        next.set(name, moved);
        rounded.set(
          name,
          start.get(name)!.dtype === moved.dtype ? moved : detachFromScope(cast(moved, start.get(name)!.dtype)),
        );
      }
    });
    const kept = new Set([...next.values(), ...rounded.values()]);
    for (const t of [...owned, ...preciseOwned]) if (!kept.has(t)) t.dispose();
    precise = next;
    current = rounded;
    preciseOwned = [...next.values()];
    owned = [...rounded.values()];
  }
  return {
    theta: current,
    release: () => {
      for (const t of new Set([...owned, ...preciseOwned])) t.dispose();
    },
  };
}

/** t - α g, in place where t is already a copy. */
function stepped(t: Tensor, g: Tensor, learningRate: number, inPlace: boolean): Tensor {
  const target = inPlace ? t : detachFromScope(t.clone());
  scope(() => addInPlace(target, mul(g, -learningRate)));
  return target;
}
