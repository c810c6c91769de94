// What a command may touch of the outside: its streams, signals and the work behind it, all replaceable in tests.
// Loads nothing heavy: the work is imported when it is called for.

import type { AnalysisHooks, AnalysisOutcome } from '../analyze/commands.js';
import type { RuntimeInfo } from '../native/info.js';
import type { ScoreHooks, ScoreSummary, TrainHooks, TrainResult } from '../train/hooks.js';
import type {
  Analysis,
  AnalyzeOptions,
  DemoOptions,
  ResolvedScoreOptions,
  ResolvedTrainOptions,
} from '../train/options.js';
import type { ProgressStream } from '../train/progress.js';

export interface CliIo {
  readonly stdout: ProgressStream;
  readonly stderr: ProgressStream;
  readonly env: Readonly<Record<string, string | undefined>>;
  readonly signals: {
    on(name: 'SIGINT' | 'SIGTERM', listener: () => void): unknown;
    off(name: 'SIGINT' | 'SIGTERM', listener: () => void): unknown;
  };
  /** Ends the process at once. */
  exit(code: number): void;
}

/** Handed to the demo beside its options. */
export interface DemoContext {
  readonly stdout: ProgressStream;
  readonly stderr: ProgressStream;
  readonly signal: AbortSignal;
}

/** The functions that commands call, once their options are known good. */
export interface Work {
  runTraining(options: ResolvedTrainOptions, hooks: TrainHooks): Promise<TrainResult>;
  scoreFile(options: ResolvedScoreOptions, hooks: ScoreHooks): Promise<ScoreSummary>;
  runDemo(options: DemoOptions, context: DemoContext): Promise<void>;
  runAnalysis<A extends Analysis>(
    name: A,
    options: AnalyzeOptions<A>,
    hooks: AnalysisHooks,
  ): Promise<AnalysisOutcome | undefined>;
  runtimeInfo(): Promise<RuntimeInfo>;
}

export const defaultWork: Work = {
  runTraining: async (options, hooks) => (await import('../train/run.js')).runTraining(options, hooks),
  scoreFile: async (options, hooks) => (await import('../train/score.js')).scoreFile(options, hooks),
  runDemo: async (options, context) => (await import('./demo.js')).runDemo(options, context),
  runAnalysis: async (name, options, hooks) =>
    (await import('../analyze/commands.js')).runAnalysis(name, options, hooks),
  runtimeInfo: async () => (await import('../native/info.js')).runtimeInfo(),
};

/**
 * Runs `body` with a signal that Ctrl-C (or SIGTERM) aborts, so that it can finish its step and save.
 * The second Ctrl-C ends the process at once, with the code shells expect.
 */
export async function withInterrupt<T>(
  io: CliIo,
  announce: (text: string) => void,
  body: (signal: AbortSignal) => Promise<T>,
): Promise<T> {
  const controller = new AbortController();
  const onSignal = (): void => {
    if (controller.signal.aborted) {
      io.exit(130);
      return;
    }
    controller.abort();
    announce('stopping after the current step; press Ctrl-C again to stop at once, without saving');
  };
  io.signals.on('SIGINT', onSignal);
  io.signals.on('SIGTERM', onSignal);
  try {
    return await body(controller.signal);
  } finally {
    io.signals.off('SIGINT', onSignal);
    io.signals.off('SIGTERM', onSignal);
  }
}
