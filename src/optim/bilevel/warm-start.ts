// The lower level's last solution, kept as the next starting point instead of θ. Costs a copy of the lower-level variable
// (beside bfloat16 two: what it computes with, and the masters that it steps in).
import { clone, copyInto } from '../../ops/movement.js';
import { detachFromScope } from '../../tensor/scope.js';
import { withTag } from '../../tensor/storage.js';
import type { Tensor } from '../../tensor/tensor.js';

/** Where a lower level starts: the same tensors twice unless the model computes in a narrower dtype. */
export interface StartingPoint {
  readonly theta: ReadonlyMap<string, Tensor>;
  readonly masters: ReadonlyMap<string, Tensor>;
}

export class WarmStart {
  private kept: StartingPoint | null = null;

  /** The last solution, or null before the first. Overwritten by `keep`. */
  get point(): StartingPoint | null {
    return this.kept;
  }

  /** Copies a solution. */
  keep({ theta, masters }: StartingPoint): void {
    if (this.kept) {
      copyAll(theta, this.kept.theta);
      if (this.kept.masters !== this.kept.theta) copyAll(masters, this.kept.masters);
      return;
    }
    const precise = copies(masters);
    const narrow = [...theta].some(([name, t]) => t.dtype !== masters.get(name)!.dtype);
    this.kept = { masters: precise, theta: narrow ? copies(theta) : precise };
  }

  dispose(): void {
    for (const map of new Set([this.kept?.masters, this.kept?.theta])) for (const t of map?.values() ?? []) t.dispose();
    this.kept = null;
  }
}

const copies = (map: ReadonlyMap<string, Tensor>): Map<string, Tensor> =>
  withTag('weights', () => new Map([...map].map(([name, t]) => [name, detachFromScope(clone(t))])));

function copyAll(from: ReadonlyMap<string, Tensor>, into: ReadonlyMap<string, Tensor>): void {
  for (const [name, t] of into) copyInto(t, from.get(name)!);
}
