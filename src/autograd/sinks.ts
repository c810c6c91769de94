// Gradient sinks: what becomes of a parameter's gradient contributions.
import { addInPlace, mul } from '../ops/elementwise.js';
import { fill } from '../ops/movement.js';
import { gradientBuffer } from '../ops/product.js';
import { detachFromScope } from '../tensor/scope.js';
import { withTag } from '../tensor/storage.js';
import type { Tensor } from '../tensor/tensor.js';
import type { Contribution, GradientSink } from './tape.js';

/** A contribution that knows how to add itself to a dense buffer without a temporary of the buffer's size. */
interface Addable extends Contribution {
  addTo(into: Tensor, scale: number): void;
}

const isAddable = (c: Contribution): c is Addable => 'addTo' in c;

/** The default sink: multiplies and accumulates in place, `total += scale * contribution`. */
export class AccumulatingSink implements GradientSink {
  readonly total: Tensor;
  private readonly scale: number;

  constructor(total: Tensor, scale = 1) {
    this.total = total;
    this.scale = scale;
  }

  get buffer(): Tensor | null {
    return this.scale === 1 ? this.total : null;
  }

  accept(contribution: Contribution | Tensor): void {
    if (!('materialize' in contribution)) {
      addInPlace(this.total, this.scale === 1 ? contribution : mul(contribution, this.scale));
    } else if (isAddable(contribution)) {
      contribution.addTo(this.total, this.scale);
    } else {
      this.accept(contribution.materialize());
    }
  }
}

/** Zeroed accumulation buffers beside named parameters, kept over steps. */
export class GradientBuffers {
  readonly buffers: ReadonlyMap<string, Tensor>;

  constructor(parameters: ReadonlyMap<string, Tensor>) {
    this.buffers = withTag(
      'gradients',
      () => new Map([...parameters].map(([name, t]) => [name, detachFromScope(gradientBuffer(t))])),
    );
  }

  zero(): void {
    for (const t of this.buffers.values()) fill(t, 0);
  }

  /** Sinks in the order of the parameters, that add `scale` times what they are given. */
  sinks(scale = 1): AccumulatingSink[] {
    return [...this.buffers.values()].map((t) => new AccumulatingSink(t, scale));
  }

  dispose(): void {
    for (const t of this.buffers.values()) t.dispose();
  }
}
