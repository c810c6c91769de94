// `keelgrad sft`, `dpo` and `spo`: progress, interruption and the closing lines around one training call.
// Contains no training: what the options mean is decided behind `runTraining`.

import type { TrainResult } from '../train/hooks.js';
import type { ResolvedTrainOptions } from '../train/options.js';
import { createProgress, formatMetrics } from '../train/progress.js';
import { type CliIo, type Work, withInterrupt } from './io.js';

function describeResult(
  options: ResolvedTrainOptions,
  { output, steps, interrupted, lastMetrics }: TrainResult,
): string {
  const state = interrupted ? `${options.method} stopped after step` : `${options.method} finished at step`;
  const metrics = formatMetrics(lastMetrics);
  return `${state} ${steps}${metrics && `: ${metrics}`}\nsaved in ${output}\n`;
}

/** Returns the exit code: 0, or 130 for a run that Ctrl-C ended early (all of it saved). */
export async function trainCommand(options: ResolvedTrainOptions, io: CliIo, work: Work): Promise<number> {
  const progress = await createProgress(io.stderr);
  try {
    const result = await withInterrupt(
      io,
      (text) => progress.onMessage(text),
      (signal) =>
        work.runTraining(options, {
          signal,
          onStart: (info) => progress.onStart(info),
          onStep: (step) => progress.onStep(step),
          onMessage: (text) => progress.onMessage(text),
          onPhase: (name, done, total) => progress.onPhase(name, done, total),
        }),
    );
    progress.stop();
    io.stdout.write(describeResult(options, result));
    return result.interrupted ? 130 : 0;
  } finally {
    progress.stop();
  }
}
