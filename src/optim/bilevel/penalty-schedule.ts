// The course of λ over the steps of a bilevel run: the preference alone is learned first, the constraint joins by and by.
// Pure functions of the step's number.
import { KeelgradError } from '../../errors.js';

/** How λ gets from 0 to its value over the ramp: not at all, along a line, or along half a cosine. */
export type PenaltyScheduleName = 'constant' | 'linear' | 'cosine';
export const penaltyScheduleNames: readonly PenaltyScheduleName[] = ['constant', 'linear', 'cosine'];

export interface PenaltySchedule {
  /** λ after the ramp. */
  readonly value: number;
  readonly name?: PenaltyScheduleName;
  /** Steps of the ramp: λ is 0 in step 0 and `value` from this step on. */
  readonly rampSteps?: number;
}

const shapes: Readonly<Record<PenaltyScheduleName, (progress: number) => number>> = {
  constant: () => 1,
  linear: (progress) => progress,
  cosine: (progress) => 0.5 * (1 - Math.cos(Math.PI * progress)),
};

/**
 * λ by step (from 0), as `BilevelOptions.penalty` takes it.
 * @throws KeelgradError for a value below 0, an unknown name, and a ramp without steps
 */
export function penaltySchedule({ value, name = 'constant', rampSteps }: PenaltySchedule): (step: number) => number {
  if (!(value >= 0 && Number.isFinite(value)))
    throw new KeelgradError(`penalty (lambda): expected a number of at least 0, found ${value}`);
  const shape = shapes[name];
  if (!shape)
    throw new KeelgradError(`penalty schedule: expected one of ${penaltyScheduleNames.join(', ')}, found ${name}`);
  if (name === 'constant') return () => value;
  if (rampSteps === undefined || !(Number.isSafeInteger(rampSteps) && rampSteps >= 1))
    throw new KeelgradError(`penalty ramp: expected a whole number of at least 1 steps, found ${rampSteps}`);
  return (step) => (step >= rampSteps ? value : value * shape(step / rampSteps));
}
