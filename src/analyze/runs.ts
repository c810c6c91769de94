// Training runs that are watched and not kept: from a fresh copy of the model, with looks at it between updates. Writes no file.
import type { PreferenceExample, PreparedData } from '../data/tokenize.js';
import type { CausalLM } from '../models/causal-lm.js';
import type { Metrics } from '../train/hooks.js';
import { type GivenOptions, type Resolved, resolveOptions } from '../train/options.js';
import { openSession } from '../train/session.js';

export type PreferenceMethod = 'dpo' | 'spo';

/** Makes the model that every run starts from, with adapters. Each call gives a new copy. */
export type ModelSource = () => Promise<CausalLM>;

export interface WatchedRun<M extends PreferenceMethod = PreferenceMethod> {
  readonly method: M;
  /** The trainer's options. DPO trains the backbone and the adapters, as SPO does, unless they say otherwise. */
  readonly options: GivenOptions<M>;
  /** A look at the model before the first step (0 updates), every `every` updates, and after the last. */
  readonly every: number;
  look(model: CausalLM, updates: number): Promise<void>;
  onStep?(step: number, metrics: Metrics): void;
  readonly signal?: AbortSignal;
}

/** Trains; returns false where the signal ended the run early. */
export async function watch(
  source: ModelSource,
  data: PreparedData<PreferenceExample>,
  run: WatchedRun,
): Promise<boolean> {
  const defaults = run.method === 'dpo' ? { train: 'both' } : {};
  const options = resolveOptions(run.method, { ...defaults, ...run.options }, { requirePaths: false }) as Resolved<
    typeof run.method
  >;
  using model = await source();
  let total = Number.POSITIVE_INFINITY;
  const session = await openSession(model, data, options, {
    signal: run.signal,
    onUpdate: async (trained, updates) => {
      if (updates % run.every === 0 || updates === total) await run.look(trained, updates);
    },
  });
  total = session.plan.totalSteps;
  try {
    for await (const { step, metrics } of session.steps()) run.onStep?.(step, metrics);
  } finally {
    session.dispose();
  }
  return !run.signal?.aborted;
}

/** What a report adds to "DPO" and "SPO" where the preference loss of both is another: ` (with ipo as the preference loss)`. */
export function lossNote({ lossType }: GivenOptions<'spo'>): string {
  const names = [lossType ?? 'sigmoid'].flat().join(' + ');
  return names === 'sigmoid' ? '' : ` (with ${names} as the preference loss)`;
}
