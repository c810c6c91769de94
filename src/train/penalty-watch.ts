// Term (b) below rounding: where the lower level's step is so small that what it does to the adapters' gradient cannot be told
// from rounding. Watches the measured norms of a run and says so once; changes nothing.
import type { RunStep, TrainHooks } from './hooks.js';

const short = (x: number): string => x.toExponential(1);

/** The dtype of computation, and λ after its ramp. */
export interface PenaltyRun {
  readonly dtype: string;
  readonly lambda: number;
}

/** The warning that a step's metrics call for, if any. */
export function penaltyWarning({ step, metrics }: RunStep, { dtype, lambda }: PenaltyRun): string | undefined {
  const { 'spo/term_b': b, 'spo/term_b_rounding': rounding, 'spo/term_a': a } = metrics;
  // Its first-order form is no difference: however small, it is what it is. Without lambda, and on its ramp, that is intended.
  if (metrics['spo/first_order'] === 1 || lambda === 0 || metrics['spo/lambda'] < lambda) return undefined;
  if (b === undefined || !(b < rounding)) return undefined;
  return `step ${step}: the penalty's pull on the adapters (term b) has norm ${short(b)}, below the ${short(rounding)} that rounding in ${dtype} can make of it (the preference loss's, term a: ${short(a)}).
There the lower level does nothing that could be told from noise: raise the lower learning rate or the lower steps, or take its first-order form (penalty form first-order), which nothing cancels in.`;
}

/** Passes steps on; warns at the first one that calls for it. */
export async function* watchPenalty(
  steps: AsyncGenerator<RunStep, void, void>,
  run: PenaltyRun,
  onMessage: TrainHooks['onMessage'],
): AsyncGenerator<RunStep, void, void> {
  let done = false;
  for await (const step of steps) {
    const warning: string | undefined = done ? undefined : penaltyWarning(step, run);
    if (warning) onMessage?.(warning);
    done ||= warning !== undefined;
    yield step;
  }
}
