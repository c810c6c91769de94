// The training loop, one for every method: gradients of a task, joint clipping, optimizer step, metrics.
//
// Metrics are read one step late: the next step is enqueued before the former one's numbers are awaited, so the device never
// waits for the host. A non-finite loss or gradient sets the skip flag on the device: weights then stay as they were.

import type { PlannedStep, StepPlan } from '../data/batches.js';
import { KeelgradError } from '../errors.js';
import type { Optimizer } from '../optim/optimizer.js';
import { type ScheduleName, scheduleFactor } from '../optim/schedule.js';
import type { HostArray } from '../tensor/dtype.js';
import { scope } from '../tensor/scope.js';
import { memory } from '../tensor/storage.js';
import type { Tensor } from '../tensor/tensor.js';
import type { Metrics, RunStep } from './hooks.js';
import type { GroupName, Task } from './task.js';
import { Update } from './update.js';

export interface LoopOptions {
  plan: StepPlan;
  optimizer: Optimizer;
  /** Base rates by group, in the task's order. */
  learningRates: Readonly<Record<GroupName, number>>;
  schedule: { name: ScheduleName; warmupSteps: number };
  /** Joint clipping of all groups; 0 is off. */
  maxGradNorm: number;
  signal?: AbortSignal;
  /** Awaited before the first step (0) and after each update, with the number of updates so far. */
  onUpdate?: (updates: number) => Promise<void> | void;
}

interface Enqueued {
  planned: PlannedStep;
  metrics: Promise<Metrics>;
  /** When the device was done with the step, in ms. */
  ended: Promise<number>;
  records: number[];
}

/** Lets timers, signals and finalizers run: promises alone would starve them. */
const breathe = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

/**
 * Runs the plan; yields every step's metrics in order. Ends early, with what was enqueued finished, once the signal is aborted.
 *
 * @throws KeelgradError at a non-finite loss or gradient, naming step and records; weights are those before that step
 */
export async function* train(task: Task, options: LoopOptions): AsyncGenerator<RunStep, void, void> {
  const { plan } = options;
  const clock = new Throughput();
  const update = new Update(task.trainable, options.optimizer, options.maxGradNorm);
  const pending: Enqueued[] = [];
  try {
    await options.onUpdate?.(0);
    for (const planned of plan) {
      if (options.signal?.aborted) break;
      let failure: { error: unknown } | null = null;
      try {
        pending.push(await enqueue(task, planned, update, options));
        await options.onUpdate?.(planned.step + 1);
      } catch (error) {
        failure = { error };
      }
      // After a failure too: the weights have these steps, so must the metrics.
      while (pending.length > (failure ? 0 : 1)) yield await finish(pending.shift()!, plan.totalSteps, clock);
      if (failure) throw failure.error;
      await breathe();
    }
    for (const last of pending) yield await finish(last, plan.totalSteps, clock);
  } finally {
    // A reader that stops early leaves reads under way, and they hold memory.
    await Promise.allSettled(pending.map(({ metrics }) => metrics));
    update.dispose();
  }
}

/** Tokens per second between the ends of steps. */
class Throughput {
  private time = performance.now();
  private tokens = 0;

  next(tokens: number, now: number): number {
    const rate = ((tokens - this.tokens) / (now - this.time)) * 1000;
    this.time = now;
    this.tokens = tokens;
    return rate;
  }
}

async function finish(
  { planned, metrics, ended, records }: Enqueued,
  totalSteps: number,
  clock: Throughput,
): Promise<RunStep> {
  const values = await metrics;
  const bad = ['loss', 'grad_norm'].find((name) => !Number.isFinite(values[name]));
  if (bad)
    throw new KeelgradError(
      `step ${planned.step + 1}: ${bad} is ${values[bad]} (records ${records.join(', ')}); the weights before this step are kept. ` +
        'Try a lower learning rate, a lower max gradient norm, or look at these records',
    );
  return {
    step: planned.step + 1,
    totalSteps,
    metrics: { ...values, tokens_per_second: clock.next(values.num_tokens, await ended) },
  };
}

async function enqueue(task: Task, planned: PlannedStep, update: Update, options: LoopOptions): Promise<Enqueued> {
  const { trainable } = task;
  update.zeroGradients();
  const { losses, metrics } = await task.accumulate(planned);
  const factor = scheduleFactor(options.schedule.name, planned.step, {
    warmupSteps: options.schedule.warmupSteps,
    totalSteps: options.plan.totalSteps,
  });
  const rates = trainable.groups.map((g) => options.learningRates[g] * factor);
  const norms = takeStep(update, losses, rates);
  const peakMemory = (): number => {
    const { peak, scratch } = memory(trainable.model.device);
    return peak + scratch;
  };
  const merged = Promise.all([metrics, norms]).then(([values, [total, ...squares]]) => ({
    ...values,
    grad_norm: total[0],
    ...groupMetrics(trainable.groups, squares, rates),
    epoch: planned.epoch,
    peak_memory: peakMemory(),
  }));
  // Both handlers: a failure must not be reported as unhandled while its turn has not come.
  const now = (): number => performance.now();
  return { planned, metrics: merged, ended: merged.then(now, now), records: task.records(planned) };
}

/** Clips and updates, disposes of the losses; returns the joint norm and the squared norms of the groups. */
function takeStep(update: Update, losses: readonly Tensor[], rates: readonly number[]): Promise<HostArray[]> {
  const { norms } = scope(() => ({ norms: Promise.all(update.step(losses, rates).map((t) => t.data())) }));
  for (const t of losses) t.dispose();
  return norms;
}

function groupMetrics(
  groups: readonly GroupName[],
  squares: readonly ArrayLike<number>[],
  rates: readonly number[],
): Metrics {
  const common: Metrics = rates.every((rate) => rate === rates[0]) ? { learning_rate: rates[0] } : {};
  if (groups.length === 1) return common;
  const entries = groups.flatMap((g, i): [string, number][] => [
    [`grad_norm/${g}`, Math.sqrt(squares[i][0])],
    [`learning_rate/${g}`, rates[i]],
  ]);
  return { ...common, ...Object.fromEntries(entries) };
}
