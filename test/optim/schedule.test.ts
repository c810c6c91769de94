// Learning-rate schedules as transformers has them, past their end too.
import { describe, expect, it } from 'vitest';
import { type ScheduleName, scheduleFactor } from '../../src/optim/schedule.js';
import { describeWithShared, readSharedJson } from '../shared.js';

const names: readonly ScheduleName[] = ['linear', 'cosine', 'constant', 'constant_with_warmup'];

interface RecordedSchedule {
  readonly name: ScheduleName;
  readonly arguments: object;
  readonly lr: number;
  readonly num_warmup_steps: number;
  readonly num_training_steps: number;
  readonly values: number[];
}

describeWithShared('recorded schedules', 'golden/training/optimizers.json', () => {
  const all: RecordedSchedule[] = readSharedJson('golden/training/optimizers.json').schedules;
  const cases = all.filter(({ name, arguments: given }) => names.includes(name) && Object.keys(given).length === 0);

  it('cover every schedule that exists', () => {
    expect(new Set(cases.map(({ name }) => name))).toEqual(new Set(names));
  });

  it.each(cases)('$name with $num_warmup_steps steps of warmup', (schedule) => {
    const options = { warmupSteps: schedule.num_warmup_steps, totalSteps: schedule.num_training_steps };
    schedule.values.forEach((value, step) => {
      const found = schedule.lr * scheduleFactor(schedule.name, step, options);
      expect(Math.abs(found - value), `step ${step}`).toBeLessThan(1e-17);
    });
  });
});

describe('scheduleFactor', () => {
  it('is finite for runs of one step and warmups as long as the run', () => {
    for (const name of names)
      for (const [warmupSteps, totalSteps] of [
        [0, 1],
        [1, 1],
        [5, 5],
        [9, 3],
      ])
        for (let step = 0; step < totalSteps; step++) {
          const factor = scheduleFactor(name, step, { warmupSteps, totalSteps });
          expect(factor).toBeGreaterThanOrEqual(0);
          expect(factor).toBeLessThanOrEqual(1);
        }
  });

  it('refuses an unknown name', () => {
    expect(() => scheduleFactor('cosin' as ScheduleName, 0, { warmupSteps: 0, totalSteps: 1 })).toThrow(
      /expected one of constant, .*found cosin/,
    );
  });
});
