// The lower level of a bilevel problem: K plain gradient steps from the current point, on a copy (spo.md §2, Eq. 11).
// The starting map is never written: θ̂ is another map, so nothing that throws in between can lose θ.
import { addInPlace, mul } from '../../ops/elementwise.js';
import { cast, clone, copyInto } from '../../ops/movement.js';
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
  if (options.steps === 0) return { theta: new Map(start), release: () => undefined };
  const owned: Tensor[] = [];
  const release = (): void => {
    for (const t of owned) t.dispose();
  };
  const copies = (map: ReadonlyMap<string, Tensor>): Map<string, Tensor> =>
    new Map(
      [...map].map(([name, t]) => {
        const copy = detachFromScope(clone(t));
        owned.push(copy);
        return [name, copy];
      }),
    );
  try {
    const first = gradient(new Map(start), 0);
    const precise = withTag('weights', () => copies(masters));
    const low = [...start].some(([name, t]) => t.dtype !== precise.get(name)!.dtype);
    const theta = low ? withTag('weights', () => copies(start)) : precise;
    for (let k = 0; k < options.steps; k++) {
      const g = k === 0 ? first : gradient(theta, k);
      for (const [name, t] of precise) move(t, g.get(name)!, options.learningRate, theta.get(name)!);
    }
    return { theta, release };
  } catch (error) {
    release();
    throw error;
  }
}

/** t -= α g, and its rounded copy beside it. */
function move(t: Tensor, g: Tensor, learningRate: number, rounded: Tensor): void {
  scope(() => {
    addInPlace(t, mul(g, -learningRate));
    if (rounded !== t) copyInto(rounded, cast(t, rounded.dtype));
  });
}
