// What a run tells its caller while it works, and what it hands back: the seam between trainers and their front ends.
// Types only.

import type { CausalLM } from '../models/causal-lm.js';

/** Metrics of one optimizer step under the field's names (`loss`, `rewards/margins`, ...), unrounded. */
export type Metrics = Readonly<Record<string, number>>;

/** Known once data and model are loaded, before the first step. */
export interface RunStart {
  readonly totalSteps: number;
  /** Records that can be trained on. */
  readonly examples: number;
  /** Records left out, because their prompt alone fills `maxLength`. */
  readonly dropped: number;
  readonly trainableParameters?: number;
  readonly device?: string;
}

export interface RunStep {
  /** Counts from 1. */
  readonly step: number;
  readonly totalSteps: number;
  readonly metrics: Metrics;
}

export interface TrainHooks {
  /** Once aborted, the run ends after the current step and saves everything. */
  readonly signal?: AbortSignal;
  onStart?(info: RunStart): void;
  onStep?(step: RunStep): void;
  /**
   * The model before the first step (0 updates) and right after each update, to be looked at and left as it is; the next
   * step waits. Steps report later: see `onStep`.
   */
  onUpdate?(model: CausalLM, updates: number): Promise<void> | void;
  /** One line for the user: warnings, facts worth knowing. */
  onMessage?(text: string): void;
  /** Work outside of the steps, as computing reference log-probabilities. `done` reaches `total` at its end. */
  onPhase?(name: string, done: number, total: number): void;
}

export interface TrainResult {
  /** The output folder. */
  readonly output: string;
  readonly steps: number;
  /** Whether the signal ended the run before its last step. */
  readonly interrupted: boolean;
  readonly lastMetrics: Metrics;
}

/** One line of `keelgrad score --json`; names are the file format. */
export interface ScoreRecord {
  /** Position in the data file, from 0. */
  readonly index: number;
  readonly chosen_logps: number;
  readonly rejected_logps: number;
  readonly chosen_tokens: number;
  readonly rejected_tokens: number;
  /** chosen_logps - rejected_logps */
  readonly margin: number;
}

export interface ScoreHooks {
  /** Records arrive in the order of the file. */
  onRecord(record: ScoreRecord): void;
  readonly signal?: AbortSignal;
  onMessage?(text: string): void;
}

export interface ScoreSummary {
  readonly records: number;
  readonly dropped: number;
  readonly interrupted: boolean;
}
