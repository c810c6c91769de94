// What the terms (a) to (e) of SPO's gradient weigh in a step (spo.md §2): their norms, read off the buffers between the
// passes. Those of the adapters, and (d), cost next to nothing; (c) and (e) take a pass over θ and a buffer of its size.
import { GradientBuffers } from '../autograd/sinks.js';
import { addInPlace, mul, sub } from '../ops/elementwise.js';
import { clone, zeros } from '../ops/movement.js';
import { sumOfSquares } from '../optim/clip.js';
import { accumulationDType, type DType } from '../tensor/dtype.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import type { GroupName, Trainable } from './task.js';

/** Relative rounding error of one operation in a dtype: half the distance of 1 to its neighbour. */
const unitRoundoff = (dtype: string): number => ({ float64: 2 ** -53, float32: 2 ** -24 })[dtype] ?? 2 ** -8;

/**
 * What rounding can make of term (b) as the difference of two gradients `λ ∇_φ L_SFT` of this norm, within a gradient of norm
 * `whole`: each of the two is off by some roundings of its own size, and the buffers that hold their sum with the other terms
 * round to theirs. A term (b) below it is noise.
 */
export const roundingOf = (dtype: DType, sft: number, whole: number): number =>
  8 * unitRoundoff(dtype) * sft + unitRoundoff(accumulationDType(dtype)) * whole;

type Buffers = ReadonlyMap<string, Tensor>;

export interface TermWeights {
  lambda: number;
  /** Whether the main pass gives the adapters λ ∇_φ L_SFT. */
  penalizeAdapters: boolean;
  /** (c) and (e) as well. */
  all: boolean;
}

export class TermMeter {
  /** Where the derivatives of the regularizer go, by group; added to the gradients by `finishMain`. */
  readonly regularizer: ReadonlyMap<GroupName, GradientBuffers>;
  private readonly trainable: Trainable;
  private readonly weights: TermWeights;
  private readonly squares = new Map<string, Tensor>();
  private before: Map<string, Tensor> | null = null;

  constructor(trainable: Trainable, weights: TermWeights, recorded: boolean) {
    const { model } = trainable;
    this.trainable = trainable;
    this.weights = weights;
    const apart: [GroupName, ReadonlyMap<string, Tensor>][] = [['adapters', model.adapters]];
    if (weights.all) apart.push(['backbone', model.backbone]);
    this.regularizer = new Map(recorded ? apart.map(([g, map]) => [g, new GradientBuffers(map)]) : []);
    for (const b of this.regularizer.values()) b.zero();
  }

  /** After the main passes, with ∇L_SFT of both groups: (a), (c), (d), (e). */
  finishMain(second: Buffers): void {
    const { lambda, penalizeAdapters, all } = this.weights;
    const of = (group: GroupName): Buffers => this.trainable.gradients.get(group)!.buffers;
    scope(() => {
      this.noteWithout('a', of('adapters'), second, penalizeAdapters ? lambda : 0);
      this.note(
        'd',
        [...of('backbone').keys()].map((name) => second.get(name)!),
        lambda,
      );
      this.noteSft(second);
      if (all) this.noteWithout('c', of('backbone'), second, lambda);
      for (const [group, { buffers }] of this.regularizer) {
        this.note(group === 'adapters' ? 'e_phi' : 'e', buffers.values());
        for (const [name, t] of of(group)) addInPlace(t, buffers.get(name)!);
      }
    });
    for (const b of this.regularizer.values()) b.dispose();
    this.before = new Map(
      [...of('adapters')].map(([name, t]) => [name, detachFromScope(scope(() => this.penaltyStart(name, t, second)))]),
    );
  }

  /** λ ∇_φ L_SFT, which (b) is a difference of two of. */
  private noteSft(second: Buffers): void {
    const { lambda } = this.weights;
    this.note(
      'sft',
      [...this.trainable.model.adapters.keys()].map((name) => second.get(name)!),
      lambda,
    );
  }

  /** What (b) is counted from: the adapters' gradient without their half of it from the main pass. */
  private penaltyStart(name: string, gradient: Tensor, second: Buffers): Tensor {
    const { lambda, penalizeAdapters } = this.weights;
    return penalizeAdapters ? sub(gradient, mul(second.get(name)!, lambda)) : clone(gradient);
  }

  /** After the lower level: (b), and the gradient of each group that terms are shares of. */
  finishStep(): void {
    const adapters = this.trainable.gradients.get('adapters')!.buffers;
    scope(() => {
      this.noteWithout('b', adapters, this.before!, 1);
      this.note('phi', adapters.values());
      this.note('theta', this.trainable.gradients.get('backbone')!.buffers.values());
    });
    this.dropBefore();
  }

  /** Norms, and their shares of the norm of the gradient of θ or φ. */
  async metrics(): Promise<Record<string, number>> {
    const norms = new Map<string, number>();
    const read = async ([name, t]: [string, Tensor]): Promise<void> => {
      norms.set(name, Math.sqrt((await t.data())[0]));
    };
    await Promise.all([...this.squares].map(read));
    const share = (name: string): number => {
      const whole = norms.get(['a', 'b', 'e_phi'].includes(name) ? 'phi' : 'theta')!;
      return whole > 0 ? norms.get(name)! / whole : 0;
    };
    const terms = [...norms.keys()].filter((n) => !['phi', 'theta', 'sft'].includes(n));
    const sft = norms.get('sft');
    return {
      ...Object.fromEntries(
        terms.flatMap((n) => [
          [`spo/term_${n}`, norms.get(n)!],
          [`spo/share_${n}`, share(n)],
        ]),
      ),
      ...(sft !== undefined && {
        'spo/term_b_rounding': roundingOf(this.trainable.model.dtype, sft, norms.get('phi')!),
      }),
    };
  }

  dispose(): void {
    for (const t of this.squares.values()) t.dispose();
    for (const b of this.regularizer.values()) b.dispose();
    this.dropBefore();
  }

  private dropBefore(): void {
    for (const t of this.before?.values() ?? []) t.dispose();
    this.before = null;
  }

  private note(name: string, tensors: Iterable<Tensor>, scale = 1): void {
    this.squares.set(name, detachFromScope(scope(() => mul(sumOfSquares(tensors), scale * scale))));
  }

  /** |from - scale · other|², one tensor at a time. */
  private noteWithout(name: string, from: Buffers, other: Buffers, scale: number): void {
    const total = scope(() => {
      const sum = zeros([1], { dtype: 'float64', device: this.trainable.model.device });
      for (const [key, t] of from)
        scope(() => addInPlace(sum, sumOfSquares([scale === 0 ? t : sub(t, mul(other.get(key)!, scale))])));
      return sum;
    });
    this.squares.set(name, detachFromScope(total));
  }
}
