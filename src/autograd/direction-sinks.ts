// Sinks that contract gradients with fixed directions: <g, V> of each parameter as a differentiable number, so that the
// derivative of a gradient along V needs no tangent of a weight's size but V itself.
import { linearBackward, spread } from '../ops/backward.js';
import { mul } from '../ops/elementwise.js';
import type { HeadContribution } from '../ops/head-backward.js';
import { cast, gatherRows, type LookupContribution } from '../ops/movement.js';
import type { LinearContribution, VectorContribution } from '../ops/product.js';
import { sum } from '../ops/reduce.js';
import { accumulationDType } from '../tensor/dtype.js';
import { detachFromScope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import type { Contribution, GradientShares, GradientSink } from './tape.js';

type Known = LinearContribution | VectorContribution | LookupContribution | HeadContribution;

/** Contracts what one parameter receives with `direction`; the terms are on the tape of the outer transform. */
export class DirectionSink implements GradientSink {
  readonly buffer = null;
  readonly differentiable = true;
  readonly terms: Tensor[] = [];
  private readonly direction: Tensor;
  readonly shares: GradientShares = {
    first: null,
    second: null,
    byTarget: null,
    secondTargets: 0,
    squares: false,
    dense: true,
  };

  constructor(direction: Tensor) {
    this.direction = direction;
  }

  accept(contribution: Contribution | Tensor): void {
    if (!('materialize' in contribution))
      throw new Error('[DirectionSink] expected a gradient known by sequence, found a plain tensor');
    const term = this.contract(contribution as Known);
    // What no outer transform depends on is a constant.
    if (term.node) this.terms.push(detachFromScope(term.alias()));
  }

  private contract(c: Known): Tensor {
    const { direction } = this;
    if (c.kind === 'vector') return sum(mul(c.bySequence, cast(direction, c.bySequence.dtype)));
    if (c.kind === 'head') return sum(mul(c.dense!, cast(direction, c.dense!.dtype)));
    if (c.kind === 'lookup') return total(mul(c.g, cast(gatherRows(direction, c.ids), c.g.dtype)));
    const along = linearBackward(c.g, cast(direction, c.g.dtype));
    return mul(total(mul(along, spread(c.x, c.streams))), c.scale);
  }

  dispose(): void {
    for (const t of this.terms) t.dispose();
    this.terms.length = 0;
  }
}

const total = (x: Tensor): Tensor => sum(cast(x, accumulationDType(x.dtype)));
