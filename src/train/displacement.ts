// Likelihood displacement: chosen answers that become less likely than the reference while the margin grows. Watches a run's
// metrics and says so once; changes nothing.
import type { RunStep, TrainHooks } from './hooks.js';

/** Weight of the past in the smoothed change. */
const momentum = 0.9;
/** Steps in a row with a smoothed change below the threshold. */
const patience = 10;
/** In nats; log-probabilities of an untouched answer round to less than this. */
const threshold = -0.01;

/** Follows the log-probabilities of chosen answers against the reference. */
export class DisplacementWatch {
  private weight = 0;
  private chosen = 0;
  private rejected = 0;
  private below = 0;
  private done = false;

  /** The warning, at the step where it is due; at most one in a run. */
  next({ step, metrics }: RunStep): string | undefined {
    const { 'logps/chosen_delta': chosen, 'logps/rejected_delta': rejected } = metrics;
    if (this.done || chosen === undefined) return undefined;
    this.weight = momentum * this.weight + (1 - momentum);
    this.chosen = momentum * this.chosen + (1 - momentum) * chosen;
    this.rejected = momentum * this.rejected + (1 - momentum) * (rejected ?? 0);
    this.below = this.chosen / this.weight < threshold ? this.below + 1 : 0;
    if (this.below < patience) return undefined;
    this.done = true;
    return describe(step, this.chosen / this.weight, this.rejected / this.weight);
  }
}

const signed = (x: number): string => `${x < 0 ? '' : '+'}${x.toFixed(2)}`;

const describe = (step: number, chosen: number, rejected: number): string =>
  `step ${step}: for ${patience} steps chosen answers have been less likely than under the reference (log-probability ${signed(chosen)}, rejected ${signed(rejected)}, smoothed).
Likelihood displacement: the loss looks at the margin alone, so both can fall while it grows, and probability goes to other answers.
keelgrad spo is made against it: its lower level and its regularizer keep chosen answers likely.`;

/** Passes steps on; tells of displacement when it has lasted. */
export async function* watchDisplacement(
  steps: AsyncGenerator<RunStep, void, void>,
  onMessage: TrainHooks['onMessage'],
): AsyncGenerator<RunStep, void, void> {
  const watch = new DisplacementWatch();
  for await (const step of steps) {
    const warning = watch.next(step);
    if (warning) onMessage?.(warning);
    yield step;
  }
}
