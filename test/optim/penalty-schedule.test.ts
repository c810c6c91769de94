// The course of lambda: what each shape is at its ends and between, and what makes no sense.
import { describe, expect, it } from 'vitest';
import { KeelgradError } from '../../src/errors.js';
import { type PenaltySchedule, penaltySchedule } from '../../src/optim/bilevel/penalty-schedule.js';

describe('penaltySchedule', () => {
  it.each([
    [{ value: 3 }, [3, 3, 3, 3, 3, 3]],
    [{ value: 3, name: 'constant', rampSteps: 4 }, [3, 3, 3, 3, 3, 3]],
    [{ value: 2, name: 'linear', rampSteps: 4 }, [0, 0.5, 1, 1.5, 2, 2]],
    [{ value: 2, name: 'linear', rampSteps: 1 }, [0, 2, 2, 2, 2, 2]],
    [{ value: 2, name: 'cosine', rampSteps: 4 }, [0, 1 - Math.SQRT1_2, 1, 1 + Math.SQRT1_2, 2, 2]],
    [{ value: 0, name: 'linear', rampSteps: 2 }, [0, 0, 0, 0, 0, 0]],
  ] as const)('%j', (schedule, expected) => {
    const at = penaltySchedule(schedule);
    expected.forEach((value, step) => {
      expect(at(step)).toBeCloseTo(value, 14);
    });
  });

  it.each([
    [{ value: -1 }, 'penalty (lambda): expected a number of at least 0, found -1'],
    [{ value: Number.NaN }, 'penalty (lambda): expected a number of at least 0, found NaN'],
    [{ value: 1, name: 'cubic' }, 'penalty schedule: expected one of constant, linear, cosine, found cubic'],
    [{ value: 1, name: 'linear' }, 'penalty ramp: expected a whole number of at least 1 steps, found undefined'],
    [{ value: 1, name: 'cosine', rampSteps: 0 }, 'penalty ramp: expected a whole number of at least 1 steps, found 0'],
  ])('refuses %j', (schedule, message) => {
    const make = () => penaltySchedule(schedule as PenaltySchedule);
    expect(make).toThrow(KeelgradError);
    expect(make).toThrow(message);
  });
});
