// Presets of `keelgrad spo` and `spo()`: named sets of defaults. THE one table of their values. Data only.
// An option that is given overrides its preset; what came of it is in run.json.

/** Values that take the place of the option table's defaults. */
export type Preset = Readonly<Record<string, string | number>>;

/** What the runs of docs/spo.md bear out: no gamma that was tried bettered 0, which costs less than half. */
const recommended = {
  lambda: 1,
  gamma: 0,
  lowerSteps: 1,
  lowerLearningRate: 2e-5,
  learningRate: 1e-5,
  beta: 0.5,
  normOver: 'all',
} as const satisfies Preset;

/**
 * The settings printed for GSM8K (arXiv 2507.07723, table 1), in its summed form of L_SFT. The paper names no gamma: this one has the
 * regularizer weigh about a tenth of the preference gradient on a real model (docs/spo.md).
 */
const paper = {
  lambda: 1,
  gamma: 0.001,
  lowerSteps: 1,
  lowerLearningRate: 2e-5,
  learningRate: 1e-5,
  beta: 0.5,
  normOver: 'all',
  sftReduction: 'sum',
  optimizer: 'adamw',
  batchSize: 4,
  epochs: 3,
  maxLength: 1024,
} as const satisfies Preset;

export const spoPresets = { paper, recommended } as const;
export type SpoPresetName = keyof typeof spoPresets;
export const spoPresetNames = ['paper', 'recommended'] as const satisfies readonly SpoPresetName[];

/** The defaults of a preset; none without one. */
export const presetDefaults = (name: string | undefined): Preset =>
  name !== undefined && Object.hasOwn(spoPresets, name) ? spoPresets[name as SpoPresetName] : {};

const flag = (key: string): string => key.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);

const written = (value: string | number): string =>
  typeof value === 'number' && value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential() : String(value);

const contents = (preset: Preset): string =>
  Object.entries(preset)
    .map(([key, value]) => `${flag(key)} ${written(value)}`)
    .join(', ');

/** What each preset contains, for the help page. */
export const presetHelp: string =
  `a set of defaults; options that are given override them. paper (GSM8K): ${contents(paper)}; it names no gamma, and trains with ` +
  `--dtype bfloat16. recommended: ${contents(recommended)}`;
