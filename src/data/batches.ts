// Which examples an optimizer step sees: batches, gradient accumulation, passes, shuffling, and the number of steps.
// Pure functions of the options and the seed, so that a resumed run finds the order it left.

import { KeelgradError } from '../errors.js';
import { shuffledOrder } from './random.js';

export interface PlanOptions {
  /** Examples of a micro-batch. */
  readonly batchSize: number;
  /** Micro-batches of an optimizer step. */
  readonly gradientAccumulationSteps?: number;
  /** Passes over the data; ignored where `maxSteps` is given. */
  readonly epochs?: number;
  /** Exactly this many optimizer steps, passing over the data as often as it takes. */
  readonly maxSteps?: number;
  readonly shuffle?: boolean;
  readonly seed?: number;
}

export interface PlannedStep {
  /** From 0. */
  readonly step: number;
  /** Passes finished after this step, with the fraction of the current one: the `epoch` of the metrics. */
  readonly epoch: number;
  /** Positions of examples in the prepared data. */
  readonly microBatches: readonly (readonly number[])[];
}

export interface StepPlan extends Iterable<PlannedStep> {
  readonly totalSteps: number;
  readonly stepsPerEpoch: number;
  /** The step with this number, from 0: what a resumed run goes on with. */
  at(step: number): PlannedStep;
  /** All examples that some step sees, ascending. */
  visited(): number[];
}

function checkPositive(name: string, value: number, whole: boolean): void {
  if (value > 0 && Number.isFinite(value) && (!whole || Number.isSafeInteger(value))) return;
  throw new KeelgradError(`${name}: expected a positive ${whole ? 'integer' : 'number'}, found ${value}`);
}

function chunks<T>(items: readonly T[], size: number): T[][] {
  return Array.from({ length: Math.ceil(items.length / size) }, (_, i) => items.slice(i * size, (i + 1) * size));
}

/**
 * Plans the steps over `count` examples. A last, smaller batch is kept; an accumulation window never crosses the end of
 * a pass: what is left becomes a smaller step, as in the Hugging Face trainer.
 */
export function planSteps(count: number, options: PlanOptions): StepPlan {
  const { batchSize, gradientAccumulationSteps = 1, epochs = 1, maxSteps, shuffle = true, seed = 42 } = options;
  checkPositive('number of examples', count, true);
  checkPositive('batch size', batchSize, true);
  checkPositive('gradient accumulation steps', gradientAccumulationSteps, true);
  if (maxSteps === undefined) checkPositive('epochs', epochs, false);
  else checkPositive('max steps', maxSteps, true);
  const batchesPerEpoch = Math.ceil(count / batchSize);
  const stepsPerEpoch = Math.ceil(batchesPerEpoch / gradientAccumulationSteps);
  const totalSteps = maxSteps ?? Math.ceil(epochs * stepsPerEpoch);
  const sequential = Array.from({ length: count }, (_, i) => i);
  let cached = { pass: -1, steps: [] as number[][][] };

  const stepsOf = (pass: number): number[][][] => {
    if (cached.pass !== pass) {
      const order = shuffle ? shuffledOrder(count, seed, pass) : sequential;
      cached = { pass, steps: chunks(chunks(order, batchSize), gradientAccumulationSteps) };
    }
    return cached.steps;
  };
  const at = (step: number): PlannedStep => {
    const pass = Math.floor(step / stepsPerEpoch);
    const inPass = step % stepsPerEpoch;
    const batchesDone = Math.min((inPass + 1) * gradientAccumulationSteps, batchesPerEpoch);
    return { step, epoch: pass + batchesDone / batchesPerEpoch, microBatches: stepsOf(pass)[inPass] };
  };
  const visited = (): number[] => {
    if (totalSteps >= stepsPerEpoch) return sequential.slice();
    const seen = Array.from({ length: totalSteps }, (_, step) => at(step).microBatches.flat()).flat();
    return seen.sort((a, b) => a - b);
  };
  function* steps(): Generator<PlannedStep> {
    for (let step = 0; step < totalSteps; step++) yield at(step);
  }
  return { totalSteps, stepsPerEpoch, at, visited, [Symbol.iterator]: steps };
}
