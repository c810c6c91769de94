// Learning-rate schedules, as transformers computes them: a factor of the base rate by step, counted from 0.
import { KeelgradError } from '../errors.js';

export type ScheduleName = 'linear' | 'cosine' | 'constant' | 'constant_with_warmup';

export interface ScheduleOptions {
  warmupSteps: number;
  totalSteps: number;
}

const warmup = (step: number, steps: number): number => step / Math.max(1, steps);

const schedules: Record<ScheduleName, (step: number, options: ScheduleOptions) => number> = {
  constant: () => 1,
  constant_with_warmup: (step, { warmupSteps }) => (step < warmupSteps ? warmup(step, warmupSteps) : 1),
  linear: (step, { warmupSteps, totalSteps }) =>
    step < warmupSteps
      ? warmup(step, warmupSteps)
      : Math.max(0, (totalSteps - step) / Math.max(1, totalSteps - warmupSteps)),
  cosine: (step, { warmupSteps, totalSteps }) => {
    if (step < warmupSteps) return warmup(step, warmupSteps);
    const progress = (step - warmupSteps) / Math.max(1, totalSteps - warmupSteps);
    return Math.max(0, 0.5 * (1 + Math.cos(Math.PI * progress)));
  },
};

/** The factor of the learning rate in `step` (from 0). With warmup the first factor is 0. */
export function scheduleFactor(name: ScheduleName, step: number, options: ScheduleOptions): number {
  const schedule = schedules[name];
  if (!schedule)
    throw new KeelgradError(`lr schedule: expected one of ${Object.keys(schedules).join(', ')}, found ${name}`);
  return schedule(step, options);
}
