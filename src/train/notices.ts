// What a user should hear before a run starts: what its settings mean where that is not obvious.
import type { CausalLM } from '../models/causal-lm.js';
import type { SpoOptions } from './options.js';
import { isFirstOrder } from './spo-rules.js';

/** Lines to print before SPO trains. */
export function spoNotices(model: CausalLM, _examples: readonly unknown[], options: SpoOptions): string[] {
  const { lambda, lowerSteps, penaltyForm } = options;
  if (lambda === 0 || penaltyForm !== 'auto' || !isFirstOrder({ dtype: model.dtype, lowerSteps })) return [];
  return [
    "with bfloat16 the penalty's pull on the adapters (term b) is taken to first order in the lower-level step: the difference of the gradients at both ends drowns in rounding",
  ];
}
