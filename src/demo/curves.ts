// What the demo measured, as numbers: changes against the start, their means and errors, and the files that hold them.
import type { Measurement } from './held-out.js';
import type { DemoMethod } from './settings.js';

/** One run's measurements, the start (step 0) first, and which greedy answers were right before and after. */
export interface MethodResult {
  readonly method: DemoMethod;
  readonly points: readonly Measurement[];
  readonly rightBefore: readonly boolean[];
  readonly rightAfter: readonly boolean[];
  readonly seconds: number;
}

/** A mean with its standard error over pairs. */
export interface Estimate {
  readonly mean: number;
  readonly error: number;
}

export function estimate(values: ArrayLike<number>): Estimate {
  const list = Array.from(values);
  const mean = list.reduce((a, b) => a + b, 0) / list.length;
  const squares = list.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return { mean, error: Math.sqrt(squares / Math.max(1, list.length - 1) / list.length) };
}

/** The mean difference of paired values, b taken from a. */
export const estimateDifference = (a: readonly number[], b: readonly number[]): Estimate =>
  estimate(a.map((value, i) => value - b[i]));

export const toNumbers = (flags: readonly boolean[]): number[] => flags.map(Number);

const minus = (a: Float64Array, b: Float64Array): Float64Array => a.map((value, i) => value - b[i]);

/** A point of the curves: mean log-probabilities, changes against the start, and how often the chosen answer is likelier. */
export interface CurvePoint {
  readonly step: number;
  readonly chosen: number;
  readonly rejected: number;
  readonly chosenChange: Estimate;
  readonly rejectedChange: Estimate;
  readonly margin: number;
  readonly marginChange: Estimate;
  readonly chosenLikelier: number;
}

export function curveOf({ points }: Pick<MethodResult, 'points'>): CurvePoint[] {
  const [start] = points;
  return points.map(({ step, chosen, rejected }) => {
    const margins = minus(chosen, rejected);
    return {
      step,
      chosen: estimate(chosen).mean,
      rejected: estimate(rejected).mean,
      chosenChange: estimate(minus(chosen, start.chosen)),
      rejectedChange: estimate(minus(rejected, start.rejected)),
      margin: estimate(margins).mean,
      marginChange: estimate(minus(margins, minus(start.chosen, start.rejected))),
      chosenLikelier: estimate(margins.map((m) => (m > 0 ? 1 : 0))).mean,
    };
  });
}

/** chosen - rejected after the last step, by pair. */
export function finalMargins({ points }: Pick<MethodResult, 'points'>): number[] {
  const { chosen, rejected } = points[points.length - 1];
  return Array.from(minus(chosen, rejected));
}

const columns: readonly (readonly [name: string, value: (p: CurvePoint) => number])[] = [
  ['step', (p) => p.step],
  ['logps_chosen', (p) => p.chosen],
  ['logps_rejected', (p) => p.rejected],
  ['logps_chosen_delta', (p) => p.chosenChange.mean],
  ['logps_chosen_delta_error', (p) => p.chosenChange.error],
  ['logps_rejected_delta', (p) => p.rejectedChange.mean],
  ['logps_rejected_delta_error', (p) => p.rejectedChange.error],
  ['margin', (p) => p.margin],
  ['chosen_likelier', (p) => p.chosenLikelier],
];

/** Rows of all runs, numbers unrounded. */
export function toCsv(results: readonly MethodResult[]): string {
  const header = ['method', ...columns.map(([name]) => name)].join(',');
  const rows = results.flatMap((result) =>
    curveOf(result).map((point) => [result.method, ...columns.map(([, value]) => value(point))].join(',')),
  );
  return `${[header, ...rows].join('\n')}\n`;
}
