// `keelgrad analyze ...`: progress and interruption around one analysis, then what came out of it and where it is.
import type { AnalysisHooks, AnalysisOutcome } from '../analyze/commands.js';
import type { Analysis, AnalyzeOptions } from '../train/options.js';
import { createProgress } from '../train/progress.js';
import { type CliIo, type Work, withInterrupt } from './io.js';

/** Runs one analysis; its exit code is 0, or 130 where it was stopped before its end. */
export async function analyzeCommand<A extends Analysis>(
  name: A,
  options: AnalyzeOptions<A>,
  io: CliIo,
  work: Work,
): Promise<number> {
  const progress = await createProgress(io.stderr);
  const note = (text: string): void => progress.onMessage(text);
  return withInterrupt(io, note, async (signal) => {
    const hooks: AnalysisHooks = {
      signal,
      onMessage: note,
      onPhase: (phase, done, total) => progress.onPhase(phase, done, total),
    };
    let outcome: AnalysisOutcome | undefined;
    try {
      outcome = await work.runAnalysis(name, options, hooks);
    } finally {
      progress.stop();
    }
    if (!outcome) {
      io.stdout.write('stopped before its end; nothing was written\n');
      return 130;
    }
    for (const finding of outcome.findings) io.stdout.write(`- ${finding}\n`);
    io.stdout.write(`\nreport: ${outcome.page}, with its charts (SVG), tables (CSV) and numbers (JSON) beside it\n`);
    return 0;
  });
}
