// AdamW and SGD over groups of parameters, as torch computes them, in one multi-tensor kernel call a group.
//
// Learning rate, step, clip factor and skip flag are device scalars: a step needs no round trip to the host. Weights are
// updated in their master dtype (float32, or float64); a bfloat16 model keeps float32 masters here, and the kernel writes the
// rounded copy in the same pass.
import { KeelgradError } from '../errors.js';
import { launch } from '../native/launch.js';
import { cast, copyInto, reshape, slice, zerosLike } from '../ops/movement.js';
import { policyOf } from '../tensor/dtype.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import { withTag } from '../tensor/storage.js';
import { Tensor } from '../tensor/tensor.js';

/** Parameters that share a learning rate. */
export interface ParameterGroup {
  name: string;
  /** What the model computes with: float32, float64 or bfloat16. Updated in place. */
  parameters: ReadonlyMap<string, Tensor>;
  /** By the same names. */
  gradients: ReadonlyMap<string, Tensor>;
}

export interface AdamWOptions {
  kind: 'adamw';
  beta1: number;
  beta2: number;
  epsilon: number;
}
export interface SgdOptions {
  kind: 'sgd';
  momentum: number;
}

export type OptimizerOptions = (AdamWOptions | SgdOptions) & {
  /** Decoupled for adamw, added to the gradient for sgd, as in torch. */
  weightDecay: number;
  /** Which parameters decay; by default those with at least two axes. */
  decays?: (name: string, t: Tensor) => boolean;
};

/** Device scalars of one step: float64 `[1]` each. */
export interface StepScalars {
  /** Gradients are multiplied by it. */
  factor: Tensor;
  /** Not 0: weights and state stay as they are. */
  skip: Tensor;
}

interface Slot {
  name: string;
  master: Tensor;
  /** The bfloat16 parameter beside a float32 master. */
  rounded: Tensor | null;
  gradient: Tensor;
  state: Tensor[];
  decays: boolean;
}

interface Group {
  name: string;
  slots: Slot[];
}

/** The tensors of a slot that are not its caller's. */
const ownedBy = (slot: Slot): Tensor[] => (slot.rounded ? [slot.master, ...slot.state] : slot.state);

export class Optimizer {
  private readonly groups: Group[];
  private readonly options: OptimizerOptions;
  private stepCount = 0;

  constructor(groups: readonly ParameterGroup[], options: OptimizerOptions) {
    this.options = options;
    this.groups = [];
    // All or nothing: what was made before something throws goes with the scope.
    scope(() => {
      for (const g of groups) {
        const slots = [...g.parameters].map(([name, t]) => this.makeSlot(name, t, g.gradients.get(name)));
        this.groups.push({ name: g.name, slots });
      }
      for (const g of this.groups) for (const slot of g.slots) for (const t of ownedBy(slot)) detachFromScope(t);
    });
  }

  private makeSlot(name: string, t: Tensor, gradient: Tensor | undefined): Slot {
    if (!gradient) throw new KeelgradError(`[Optimizer] parameter ${name} has no gradient buffer`);
    const low = policyOf(t.dtype).master !== t.dtype;
    const o = this.options;
    const count = o.kind === 'adamw' ? 2 : o.momentum === 0 ? 0 : 1;
    const { master, state } = withTag('optimizer', () => {
      const held = low ? cast(t, policyOf(t.dtype).master) : t;
      return { master: held, state: Array.from({ length: count }, () => zerosLike(held)) };
    });
    const decays = (o.decays ?? ((_, p) => p.ndim >= 2))(name, t);
    return { name, master, rounded: low ? t : null, gradient, state, decays };
  }

  /** Steps taken. */
  get steps(): number {
    return this.stepCount;
  }

  /** One update; `learningRates` in the order of the groups. */
  step(learningRates: readonly number[], scalars: StepScalars): void {
    const values = this.advance(learningRates);
    const shape = [this.groups.length, 4];
    scope(() => this.apply(Tensor.from(values, { shape, device: scalars.factor.device }), scalars));
  }

  /** Counts a step; returns what of it comes from the host: a row of four for each group, as `apply` takes them. */
  advance(learningRates: readonly number[]): Float64Array {
    this.stepCount++;
    return Float64Array.from(this.groups.flatMap((_, i) => [learningRates[i], this.stepCount, 1, 0]));
  }

  /** The update on the device, which can be captured. `packed`: float64 `[groups, 4]`; factor and skip are written there. */
  apply(packed: Tensor, scalars: StepScalars): void {
    this.groups.forEach((group, i) => {
      scope(() => {
        const row = reshape(slice(packed, 0, i, i + 1), [4]);
        copyInto(slice(row, 0, 2, 3), scalars.factor);
        copyInto(slice(row, 0, 3, 4), scalars.skip);
        for (const decays of [true, false])
          this.update(
            row,
            group.slots.filter((s) => s.decays === decays),
            decays,
          );
      });
    });
  }

  private update(scalars: Tensor, slots: readonly Slot[], decays: boolean): void {
    if (slots.length === 0) return;
    const o = this.options;
    for (const s of slots) for (const t of [s.master, s.rounded]) if (t) t.storage.version++;
    const decay = decays ? o.weightDecay : 0;
    if (o.kind === 'adamw') {
      const tensors = slots.flatMap((s) => [s.master, s.state[0], s.state[1], s.gradient, s.rounded]);
      launch('adamw', [scalars, ...tensors], [o.beta1, o.beta2, o.epsilon, decay]);
    } else {
      const tensors = slots.flatMap((s) => [s.master, s.state[0] ?? null, s.gradient, s.rounded]);
      launch('sgd', [scalars, ...tensors], [o.momentum, decay]);
    }
  }

  /** The weights of a group in the master dtype, by name: what is saved. */
  masters(group: string): Map<string, Tensor> {
    const found = this.groups.find((g) => g.name === group);
    return new Map(found?.slots.map((s) => [s.name, s.master]));
  }

  dispose(): void {
    for (const g of this.groups) for (const slot of g.slots) for (const t of ownedBy(slot)) t.dispose();
  }
}
