// What a user should hear before a run starts: what its settings mean where that is not obvious.
import type { CausalLM } from '../models/causal-lm.js';
import { penaltySchedule } from '../optim/bilevel/penalty-schedule.js';
import type { SpoOptions } from './options.js';
import { isFirstOrder } from './spo-rules.js';

/** Lines to print before SPO trains. */
export function spoNotices(model: CausalLM, options: SpoOptions): string[] {
  const { lambda, lowerSteps, penaltyForm } = options;
  if (lambda === 0 || penaltyForm !== 'auto' || !isFirstOrder({ dtype: model.dtype, lowerSteps })) return [];
  return [
    "with bfloat16 the penalty's pull on the adapters (term b) is taken to first order in the lower-level step: the difference of the gradients at both ends drowns in rounding",
  ];
}

/** A line to print where lambda's ramp is longer than the run. */
export function rampNotice(options: SpoOptions, totalSteps: number): string | undefined {
  const { lambda, lambdaSchedule, lambdaRampSteps } = options;
  if (lambdaSchedule === 'constant' || lambda === 0 || totalSteps > lambdaRampSteps) return undefined;
  const last = penaltySchedule({ value: lambda, name: lambdaSchedule, rampSteps: lambdaRampSteps })(totalSteps - 1);
  return `lambda does not reach ${lambda}: its ramp takes ${lambdaRampSteps} steps and the run ${totalSteps}; the last one has ${Number(last.toPrecision(3))}`;
}
