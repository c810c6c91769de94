// Every option of every command, once: types, checks, defaults, help and config keys all come from this table.
// Data only: it imports nothing but other tables and knows nothing of models, data or the command line's parser.
import { analyzeOptions } from './option-analyze.js';
import { fileOptions, machineOptions } from './option-files.js';
import { lossOptions } from './option-losses.js';
import { objectiveOptions, spoOptions } from './option-objective.js';
import type { OptionSpec } from './option-spec.js';
import { batchOptions, loraOptions, optimizerOptions } from './option-training.js';

/** In the order of the help pages. */
export const optionTable = {
  ...fileOptions,
  ...objectiveOptions,
  ...spoOptions,
  ...lossOptions,
  ...loraOptions,
  ...optimizerOptions,
  ...batchOptions,
  ...analyzeOptions,
  ...machineOptions,
} as const satisfies Record<string, OptionSpec>;

export type OptionTable = typeof optionTable;
export type OptionKey = keyof OptionTable;
