// The lower level of a bilevel problem: K steps from the current point, on a copy (spo.md §2, Eq. 11).
// The starting map is never written: θ̂ is another map, so nothing that throws in between can lose θ.
import { KeelgradError } from '../../errors.js';
import { add, addInPlace, mul } from '../../ops/elementwise.js';
import { cast, clone, copyInto, zeros } from '../../ops/movement.js';
import { detachFromScope, scope } from '../../tensor/scope.js';
import { withTag } from '../../tensor/storage.js';
import type { Tensor } from '../../tensor/tensor.js';
import { Optimizer, type OptimizerOptions } from '../optimizer.js';
import { type LowerSolver, lowerSolvers } from './lower-solvers.js';

export type { LowerSolver } from './lower-solvers.js';

export interface LowerLevelOptions {
  /** K; 0 returns the starting point itself. */
  steps: number;
  /** α. */
  learningRate: number;
  /** Plain gradient steps unless given; momentum 0.9, Adam with torch's defaults. State is fresh in every run. */
  solver?: LowerSolver;
}

/** Tensors of the lower-level variable at θ_K; dispose of them with `release` (the starting point is not touched). */
export interface LowerSolution {
  theta: Map<string, Tensor>;
  /** The same in the dtype that steps are taken in. */
  masters: ReadonlyMap<string, Tensor>;
  release(): void;
}

const stateful: Readonly<Record<Exclude<LowerSolver, 'gradient'>, OptimizerOptions>> = {
  momentum: { kind: 'sgd', momentum: 0.9, weightDecay: 0 },
  adam: { kind: 'adamw', beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0 },
};

type Gradient = (theta: Map<string, Tensor>, step: number) => ReadonlyMap<string, Tensor>;

/**
 * θ_0 = start, θ_{k+1} = θ_k - α ∇L(θ_k) (or the solver's step). Steps are taken in the dtype of `masters` (float32 beside
 * bfloat16), and rounded to the dtype of `start` for the next evaluation.
 *
 * @param gradient leaves ∇L(θ) in the buffers it returns, which are read before it is called again
 * @throws KeelgradError for a number of steps, a learning rate or a solver that makes no sense
 */
export function descend(
  start: ReadonlyMap<string, Tensor>,
  masters: ReadonlyMap<string, Tensor>,
  gradient: Gradient,
  options: LowerLevelOptions,
): LowerSolution {
  checkLowerLevel(options);
  if (options.steps === 0) return { theta: new Map(start), masters, release: () => undefined };
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
    const step = stepper(precise, first, options);
    try {
      for (let k = 0; k < options.steps; k++) {
        step.move(k === 0 ? first : gradient(theta, k));
        if (low)
          for (const [name, t] of precise) scope(() => copyInto(theta.get(name)!, cast(t, theta.get(name)!.dtype)));
      }
    } finally {
      step.release();
    }
    return { theta, masters: precise, release };
  } catch (error) {
    release();
    throw error;
  }
}

/** Moves `theta` by the gradients of each step. Gradients arrive in the buffers of the first ones. */
interface Stepper {
  move(gradients: ReadonlyMap<string, Tensor>): void;
  release(): void;
}

function stepper(
  theta: ReadonlyMap<string, Tensor>,
  buffers: ReadonlyMap<string, Tensor>,
  { solver = 'gradient', learningRate }: LowerLevelOptions,
): Stepper {
  if (solver === 'gradient')
    return {
      move: (gradients) => {
        for (const [name, t] of theta) scope(() => addInPlace(t, mul(gradients.get(name)!, -learningRate)));
      },
      release: () => undefined,
    };
  const optimizer = new Optimizer([{ name: 'lower', parameters: theta, gradients: buffers }], stateful[solver]);
  const device = [...theta.values()][0]?.device;
  return {
    move: (gradients) => {
      for (const [name, buffer] of buffers) if (gradients.get(name) !== buffer) copyInto(buffer, gradients.get(name)!);
      scope(() => {
        const skip = zeros([1], { dtype: 'float64', device });
        optimizer.step([learningRate], { factor: add(skip, 1), skip });
      });
    },
    release: () => optimizer.dispose(),
  };
}

/** @throws KeelgradError naming what was expected and found */
export function checkLowerLevel({ steps, learningRate, solver }: LowerLevelOptions): void {
  if (!(Number.isSafeInteger(steps) && steps >= 0))
    throw new KeelgradError(`lower steps (K): expected a whole number of at least 0, found ${steps}`);
  if (steps > 0 && !(learningRate > 0 && Number.isFinite(learningRate)))
    throw new KeelgradError(`lower learning rate (alpha): expected a number above 0, found ${learningRate}`);
  if (solver !== undefined && !lowerSolvers.includes(solver))
    throw new KeelgradError(`lower solver: expected one of ${lowerSolvers.join(', ')}, found ${solver}`);
}
