// What the terms (a) to (e) of SPO's gradient weigh in a step (spo.md §2): their norms, read off the buffers between the
// passes. Those of the adapters, and (d), cost next to nothing, (c) a pass over θ; beside (e) it takes a buffer of θ's size.
import { GradientBuffers } from '../autograd/sinks.js';
import { add, addInPlace, mul, sub } from '../ops/elementwise.js';
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
  /** (c) and (e) as well where the regularizer adds to θ's gradient. */
  all: boolean;
  /** Whether there is a lower level; without one (b) is 0. */
  lower: boolean;
}

export class TermMeter {
  /** Where the derivatives of the regularizer go, by group; added to the gradients at the end of the main passes. */
  readonly regularizer: ReadonlyMap<GroupName, GradientBuffers>;
  private readonly trainable: Trainable;
  private readonly weights: TermWeights;
  private readonly squares = new Map<string, Tensor>();
  /** Of the adapters, while passes add to their gradient: what (b) is counted from, or (b) itself. */
  private aside: Map<string, Tensor> | null = null;

  constructor(trainable: Trainable, weights: TermWeights, recorded: boolean) {
    const { model } = trainable;
    this.trainable = trainable;
    this.weights = weights;
    const apart: [GroupName, ReadonlyMap<string, Tensor>][] = [['adapters', model.adapters]];
    if (weights.all) apart.push(['backbone', model.backbone]);
    this.regularizer = new Map(recorded ? apart.map(([g, map]) => [g, new GradientBuffers(map)]) : []);
    for (const b of this.regularizer.values()) b.zero();
  }

  // ---- L_SFT in the main pass ---------------------------------------------------------------------------------------

  /** After the main passes, with ∇L_SFT of both groups where it is known: (a), (c), (d), (e). */
  finishMain(second: Buffers | null): void {
    const { lambda, penalizeAdapters, all, lower } = this.weights;
    scope(() => {
      this.noteWithout('a', this.of('adapters'), second, penalizeAdapters ? lambda : 0);
      if (second) this.noteD(second);
      if (second && lower) this.noteSft(second);
      if (second && (all || this.regularizer.size === 0)) this.noteWithout('c', this.of('backbone'), second, lambda);
      this.addRegularizer();
    });
    this.aside = this.setAside((name, t) => {
      // (b) is counted from the adapters' gradient without their half of it from the main pass.
      return second && penalizeAdapters ? sub(t, mul(second.get(name)!, lambda)) : clone(t);
    });
  }

  /** After the lower level: (b), and the gradient of each group that terms are shares of. */
  finishStep(): void {
    scope(() => {
      this.noteWithout('b', this.of('adapters'), this.aside!, 1);
      this.noteWhole();
    });
    this.dropAside();
  }

  // ---- L_SFT in passes of its own -----------------------------------------------------------------------------------

  /** λ ∇_θ L_SFT, from ∇L_SFT. */
  noteD(sft: Buffers, scale = this.weights.lambda): void {
    const tensors = [...this.of('backbone').keys()].map((name) => sft.get(name)!);
    this.note('d', tensors, scale);
  }

  /** Before the main passes, when the adapters' gradient is (b) but for λ ∇_φ L_SFT, where that is given. */
  startApart(sft: Buffers | null): void {
    const { lambda } = this.weights;
    this.aside = this.setAside((name, t) => (sft ? add(t, mul(sft.get(name)!, lambda)) : clone(t)));
    this.note('b', this.aside.values());
    if (sft) this.noteSft(sft);
  }

  /**
   * After all passes: (a), (e) of the adapters, and the whole.
   * @param known whether the adapters' gradient is (a) but for what `startApart` was given; else it is (a) and (b) in one
   * @param penalty whether there is one: else the backbone's gradient is (c) alone
   */
  finishApart(known: boolean, penalty: boolean): void {
    scope(() => {
      if (known) {
        this.noteWithout('a', this.of('adapters'), this.aside, this.aside ? 1 : 0);
        this.noteZero('b');
      }
      if (!penalty) {
        this.note('c', this.of('backbone').values());
        this.noteZero('d');
      }
      this.addRegularizer();
      this.noteWhole();
    });
    this.dropAside();
  }

  private of(group: GroupName): Buffers {
    return this.trainable.gradients.get(group)!.buffers;
  }

  /** λ ∇_φ L_SFT, which (b) is a difference of two of. */
  private noteSft(sft: Buffers): void {
    this.note(
      'sft',
      [...this.trainable.model.adapters.keys()].map((name) => sft.get(name)!),
      this.weights.lambda,
    );
  }

  private noteWhole(): void {
    this.note('phi', this.of('adapters').values());
    this.note('theta', this.of('backbone').values());
  }

  /** (e) joins the gradients. */
  private addRegularizer(): void {
    for (const [group, { buffers }] of this.regularizer) {
      this.note(group === 'adapters' ? 'e_phi' : 'e', buffers.values());
      for (const [name, t] of this.of(group)) addInPlace(t, buffers.get(name)!);
    }
    for (const b of this.regularizer.values()) b.dispose();
  }

  private setAside(make: (name: string, gradient: Tensor) => Tensor): Map<string, Tensor> {
    const copies = [...this.of('adapters')].map(([name, t]): [string, Tensor] => [
      name,
      detachFromScope(scope(() => make(name, t))),
    ]);
    return new Map(copies);
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
    this.dropAside();
  }

  private dropAside(): void {
    for (const t of this.aside?.values() ?? []) t.dispose();
    this.aside = null;
  }

  /** A term that is nothing, unless it was measured. */
  private noteZero(name: string): void {
    const { device } = this.trainable.model;
    if (!this.squares.has(name)) this.squares.set(name, detachFromScope(zeros([1], { dtype: 'float64', device })));
  }

  private note(name: string, tensors: Iterable<Tensor>, scale = 1): void {
    this.squares.set(name, detachFromScope(scope(() => mul(sumOfSquares(tensors), scale * scale))));
  }

  /** |from - scale · other|², one tensor at a time. */
  private noteWithout(name: string, from: Buffers, other: Buffers | null, scale: number): void {
    const total = scope(() => {
      const sum = zeros([1], { dtype: 'float64', device: this.trainable.model.device });
      for (const [key, t] of from)
        scope(() => {
          const part = (): Tensor => (scale === 1 ? other!.get(key)! : mul(other!.get(key)!, scale));
          addInPlace(sum, sumOfSquares([scale === 0 ? t : sub(t, part())]));
        });
      return sum;
    });
    this.squares.set(name, detachFromScope(total));
  }
}
