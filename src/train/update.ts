// The end of every step: joint norm, clipping, optimizer, and zeroed gradients for the next. The same kernels on the same tensors
// each time, so a CUDA device is told of them once: hundreds of small launches become two.
import { captureGraph, type Graph } from '../native/graph.js';
import { add, maximum, sqrt } from '../ops/elementwise.js';
import { copyInto, zeros } from '../ops/movement.js';
import { clipFactor, nonFinite, sumOfSquares } from '../optim/clip.js';
import type { Optimizer } from '../optim/optimizer.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import type { Device } from '../tensor/storage.js';
import type { Tensor } from '../tensor/tensor.js';
import type { Trainable } from './task.js';

/** Whether kernels that repeat are captured: on CUDA, unless `KEELGRAD_GRAPHS` says 0 (nowhere) or 1 (on the CPU too). */
const capturesOn = (device: Device): boolean => {
  const wish = process.env.KEELGRAD_GRAPHS;
  return wish === '1' || (wish !== '0' && device !== 'cpu');
};

/** A function of kernels alone, captured when it first runs, where that is wanted. */
class Repeated<T> {
  private readonly f: () => T;
  private readonly device: Device;
  private graph: Graph<T> | undefined;

  constructor(f: () => T, device: Device) {
    this.f = f;
    this.device = device;
  }

  /** The result is the caller's scope's, or stands until the next run. */
  run(): T {
    if (!capturesOn(this.device)) return this.f();
    if (this.graph) this.graph.replay();
    else this.graph = captureGraph(this.f, { device: this.device });
    return this.graph.result;
  }

  dispose(): void {
    this.graph?.dispose();
  }
}

export class Update {
  private readonly optimizer: Optimizer;
  // Not 0 from the first non-finite step on: the step after it is enqueued already when the host learns of it.
  private readonly halted: Tensor;
  private readonly scalars: Tensor;
  private readonly zeroing: Repeated<void>;
  private readonly stepping: Repeated<Tensor[]>;

  constructor(trainable: Trainable, optimizer: Optimizer, maxGradNorm: number) {
    const { device } = trainable.model;
    this.optimizer = optimizer;
    this.halted = detachFromScope(zeros([1], { dtype: 'float64', device }));
    this.scalars = detachFromScope(zeros([trainable.groups.length, 4], { dtype: 'float64', device }));
    this.zeroing = new Repeated(() => trainable.zeroGradients(), device);
    this.stepping = new Repeated(() => this.clippedStep(trainable, maxGradNorm), device);
  }

  zeroGradients(): void {
    this.zeroing.run();
  }

  /** Clips and updates; float64 `[1]` each, to be read before the next step: the joint norm, the squared norms of the groups. */
  step(losses: readonly Tensor[], learningRates: readonly number[]): Tensor[] {
    if (losses.length > 0) scope(() => copyInto(this.halted, maximum(nonFinite(losses), this.halted)));
    this.scalars.write(this.optimizer.advance(learningRates));
    return this.stepping.run();
  }

  private clippedStep(trainable: Trainable, maxGradNorm: number): Tensor[] {
    return scope(() => {
      const squares = trainable.groups.map((g) => sumOfSquares(trainable.gradients.get(g)!.buffers.values()));
      const total = sqrt(squares.reduce((a, b) => add(a, b)));
      copyInto(this.halted, maximum(nonFinite([total]), this.halted));
      this.optimizer.apply(this.scalars, { factor: clipFactor(total, maxGradNorm), skip: this.halted });
      return [total, ...squares];
    });
  }

  dispose(): void {
    this.zeroing.dispose();
    this.stepping.dispose();
    this.halted.dispose();
    this.scalars.dispose();
  }
}
