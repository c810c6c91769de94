// What an option of a command is: the shape of a row of the option table, and the names that rows share.
// Types and plain names only.
/** The analyses of `keelgrad analyze`. */
export const analyses = ['theory', 'dynamics', 'mass-shift', 'sensitivity', 'terms'] as const;
export type Analysis = (typeof analyses)[number];
export type AnalyzeMethod = `analyze ${Analysis}`;
export const methods = [
  'sft',
  'dpo',
  'spo',
  'score',
  'analyze theory',
  'analyze dynamics',
  'analyze mass-shift',
  'analyze sensitivity',
  'analyze terms',
  'demo',
  'info',
] as const;
export type Method = (typeof methods)[number];
export type TrainMethod = 'sft' | 'dpo' | 'spo';

export type Scalar = string | number | boolean;
export type Value = Scalar | readonly string[] | readonly number[];

/** Option values by key, for rules that look at several. */
export type Chosen = Readonly<Record<string, Value | undefined>>;

/** A default that depends on other options: on what was given, and on defaults that are plain values. */
export interface DefaultRule {
  /** What the help page prints. */
  readonly text: string;
  readonly value: (chosen: Chosen) => Value;
}

/** No value unless given; help pages print what that means. */
export interface NoDefault {
  readonly without: string;
}

export type Default = Value | DefaultRule | NoDefault;

export interface OptionSpec {
  /** `strings` and `numbers` are lists, comma-separated on the command line. */
  readonly type: 'string' | 'integer' | 'number' | 'boolean' | 'strings' | 'numbers';
  readonly methods: readonly Method[];
  readonly group: string;
  /** What stands for the value on a help page. */
  readonly placeholder?: string;
  /** Names of the same thing elsewhere: not accepted, but suggested from. */
  readonly alsoCalled?: readonly string[];
  readonly choices?: readonly string[];
  /** One for all methods, or one per method. */
  readonly default?: Default | { readonly [M in Method]?: Default };
  readonly required?: true;
  readonly min?: number;
  readonly max?: number;
  /** Exclusive bounds. */
  readonly above?: number;
  readonly below?: number;
  /** Advice for a value outside of the bounds or choices. */
  readonly remedy?: string;
  /** Why a command that a user may expect to have this option does not. */
  readonly absent?: { readonly [M in Method]?: string };
  readonly help: string;
  /** The help of one command where it differs. */
  readonly helpOf?: { readonly [M in Method]?: string };
}

/** The commands that train. */
export const trainMethods = ['sft', 'dpo', 'spo'] as const;
/** Those that read a model and data. */
export const modelMethods = ['sft', 'dpo', 'spo', 'score'] as const;

/** All analyses, those that train, and those whose levels have options of their own. */
export const analyzeMethods = [
  'analyze theory',
  'analyze dynamics',
  'analyze mass-shift',
  'analyze sensitivity',
  'analyze terms',
] as const;
export const followMethods = ['analyze dynamics', 'analyze mass-shift', 'analyze sensitivity'] as const;
/** The commands that take SPO's gradient. */
export const spoMethods = ['spo', ...followMethods, 'analyze terms'] as const;

/** Headings of the help pages. */
export const groups = {
  files: 'Model and data',
  objective: 'Objective',
  losses: 'Parameters of losses',
  lora: 'Adapter (LoRA)',
  optimizer: 'Optimizer',
  batches: 'Steps and batches',
  analysis: 'Analysis',
  machine: 'Machine and run',
} as const;
