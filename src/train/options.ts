// Options of every command, checked and completed: one path for the command line, config files and library calls.
// Must stay cheap to import (no dependency but the error class) and must not touch models, data or the disk.

import { didYouMean, KeelgradError, show, suggest } from '../errors.js';
import { checkRules, isLive, type Naming } from './option-rules.js';
import type {
  Analysis,
  Chosen,
  Default,
  DefaultRule,
  Method,
  NoDefault,
  OptionSpec,
  TrainMethod,
  Value,
} from './option-spec.js';
import { type OptionKey, type OptionTable, optionTable } from './option-table.js';
import { presetDefaults } from './presets.js';

export { exclusiveOptions, type Naming } from './option-rules.js';
export { type Analysis, analyses, type Method, methods, type TrainMethod } from './option-spec.js';
export { type OptionKey, optionTable } from './option-table.js';
export { linearNames } from './option-training.js';

type Plain<Spec> = Spec extends { choices: readonly (infer C)[] }
  ? C
  : Spec extends { type: 'boolean' }
    ? boolean
    : Spec extends { type: 'integer' | 'number' | 'numbers' }
      ? number
      : string;
type ValueOf<Spec> = Spec extends { type: 'strings' | 'numbers' } ? readonly Plain<Spec>[] : Plain<Spec>;

type KeyOf<M extends Method> = {
  [K in OptionKey]: M extends OptionTable[K]['methods'][number] ? K : never;
}[OptionKey];

type IsPlain<D> = D extends string | number | boolean | readonly unknown[] | DefaultRule ? true : false;

type HasDefault<Spec, M> = Spec extends { required: true }
  ? true
  : Spec extends { default: infer D }
    ? IsPlain<D> extends true
      ? true
      : M extends keyof D
        ? IsPlain<D[M]>
        : false
    : false;

/** What a caller may write: everything optional, keys in camelCase; a list of one as that one. */
export type GivenOptions<M extends Method> = {
  readonly [K in KeyOf<M>]?: ValueOf<OptionTable[K]> | Plain<OptionTable[K]> | undefined;
};

/** Every option of a command with its value; `undefined` only where the table has no default. */
export type ResolvedOptions<M extends Method> = { readonly method: M } & {
  readonly [K in KeyOf<M>]: HasDefault<OptionTable[K], M> extends true
    ? ValueOf<OptionTable[K]>
    : ValueOf<OptionTable[K]> | undefined;
};

export type SftOptions = ResolvedOptions<'sft'>;
export type DpoOptions = ResolvedOptions<'dpo'>;
export type SpoOptions = ResolvedOptions<'spo'>;
export type ScoreOptions = ResolvedOptions<'score'>;
export type DemoOptions = ResolvedOptions<'demo'>;
export type InfoOptions = ResolvedOptions<'info'>;
export type AnalyzeOptions<A extends Analysis> = ResolvedOptions<`analyze ${A}`>;

type ByAnalysis = { [A in Analysis as `analyze ${A}`]: AnalyzeOptions<A> };

interface ByMethod extends ByAnalysis {
  sft: SftOptions;
  dpo: DpoOptions;
  spo: SpoOptions;
  score: ScoreOptions;
  demo: DemoOptions;
  info: InfoOptions;
}
export type Resolved<M extends Method> = ByMethod[M];
export type ResolvedTrainOptions = Resolved<TrainMethod>;
export type ResolvedScoreOptions = ScoreOptions;

const specs: Readonly<Record<string, OptionSpec>> = optionTable;

/** `maxLength` as `max-length`: the spelling of the command line and of config files. */
export const kebabCase = (key: string): string => key.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);

/** The flag of an option. `shuffle` is on by default, so its flag turns it off. */
export const flagOf = (key: string): string => (key === 'shuffle' ? '--no-shuffle' : `--${kebabCase(key)}`);

export const specOf = (key: OptionKey): OptionSpec => specs[key];

export function optionsOf(method: Method): OptionKey[] {
  return (Object.keys(specs) as OptionKey[]).filter((key) => specs[key].methods.includes(method));
}

const isRule = (value: Default | undefined): value is DefaultRule => typeof value === 'object' && 'text' in value;

const isWithout = (value: Default | undefined): value is NoDefault => typeof value === 'object' && 'without' in value;

function defaultOf(key: OptionKey, method: Method): Default | undefined {
  const found = specOf(key).default;
  const plain = typeof found !== 'object' || Array.isArray(found);
  if (plain || isRule(found as Default) || isWithout(found as Default)) return found as Default | undefined;
  return (found as { readonly [M in Method]?: Default })[method];
}

/** The default as a help page prints it, or undefined where there is none to print. */
export function defaultText(key: OptionKey, method: Method): string | undefined {
  const found = defaultOf(key, method);
  if (found === undefined || typeof found === 'boolean') return undefined;
  if (isRule(found)) return found.text;
  if (isWithout(found)) return found.without;
  return typeof found === 'number' && found !== 0 && Math.abs(found) < 1e-3 ? found.toExponential() : String(found);
}

export const libraryNaming: Naming = {
  option: (key) => key,
  setting: (key, value) => `${key}: ${JSON.stringify(value)}`,
  written: (name) => name,
};

export const flagNaming: Naming = {
  option: flagOf,
  setting: (key, value) => (typeof value === 'boolean' ? flagOf(key) : `${flagOf(key)} ${value}`),
  written: (name) => name,
};

const camelCase = (name: string): string =>
  name.replace(/^-+/, '').replace(/[-_]+([a-zA-Z0-9])/g, (_, letter: string) => letter.toUpperCase());

/** The option of `keys` whose flag, or name elsewhere, comes nearest. */
function nearestKey(name: string, keys: readonly OptionKey[]): OptionKey | undefined {
  const names = keys.flatMap((key) =>
    [flagOf(key), ...(specOf(key).alsoCalled ?? [])].map((one) => [one, key] as const),
  );
  const nearest = suggest(
    name,
    names.map(([one]) => one),
  );
  return names.find(([one]) => one === nearest)?.[1];
}

/** `; did you mean --max-length?`, of this command's options first, then of the others'; may be empty. */
function nearestOption(method: Method, name: string, naming: Naming): string {
  const here = nearestKey(name, optionsOf(method));
  if (here !== undefined) return `; did you mean ${naming.option(here)}?`;
  const elsewhere = nearestKey(name, Object.keys(specs) as OptionKey[]);
  return elsewhere === undefined ? '' : `; did you mean ${naming.option(elsewhere)}, of ${owners(elsewhere)}?`;
}

/** The commands that have an option; analyses only where no other has it. */
function owners(key: OptionKey): string {
  const all = specs[key].methods;
  const others = all.filter((method) => !method.startsWith('analyze'));
  return (others.length > 0 ? others : all).map((owner) => `keelgrad ${owner}`).join(', ');
}

/** An option that exists, but not for this command: says who has it and what comes nearest here. */
function foreignOption(method: Method, key: OptionKey, name: string, naming: Naming): KeelgradError {
  const absent = specOf(key).absent?.[method];
  const hasNearest = nearestKey(name, optionsOf(method)) !== undefined;
  const nearest = hasNearest ? nearestOption(method, name, naming) : `; see keelgrad ${method} --help`;
  const advice = absent ? `: ${absent}` : nearest;
  return new KeelgradError(
    `${naming.written(name)} is an option of ${owners(key)}, not of keelgrad ${method}${advice}`,
  );
}

/**
 * The table's key for a name in kebab-case, snake_case or camelCase.
 * @throws KeelgradError for a name that no command has, or that only others have; both name the nearest option.
 */
export function findOption(method: Method, name: string, naming: Naming): OptionKey {
  const key = camelCase(name);
  if (Object.hasOwn(specs, key)) {
    if (specs[key].methods.includes(method)) return key as OptionKey;
    throw foreignOption(method, key as OptionKey, name, naming);
  }
  const advice = nearestOption(method, name, naming) || `; see keelgrad ${method} --help`;
  throw new KeelgradError(`${naming.written(name)} is no option of keelgrad ${method}${advice}`);
}

function checkMethod(method: Method, raw: unknown, naming: Naming): void {
  if (raw === method || raw === undefined) return;
  throw new KeelgradError(`${naming.written('method')}: expected ${show(method)}, found ${show(raw)}`);
}

/** Keys of a config file or a library call in the table's spelling; null and undefined count as not given. */
export function normalizeKeys(
  method: Method,
  given: Readonly<Record<string, unknown>>,
  naming: Naming = libraryNaming,
): Partial<Record<OptionKey, unknown>> {
  const result: Partial<Record<OptionKey, unknown>> = {};
  for (const [name, raw] of Object.entries(given)) {
    if (name === 'method') {
      checkMethod(method, raw, naming);
      continue;
    }
    const negated = camelCase(name) === 'noShuffle' && typeof raw === 'boolean';
    const key = findOption(method, negated ? 'shuffle' : name, naming);
    if (raw === null || raw === undefined) continue;
    if (key in result)
      throw new KeelgradError(`${naming.written(name)} is given twice, in two spellings; leave one out`);
    result[key] = negated ? !raw : raw;
  }
  return result;
}

const numeral = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

function toNumber(raw: unknown): number {
  if (typeof raw === 'number') return raw;
  return typeof raw === 'string' && numeral.test(raw.trim()) ? Number(raw) : Number.NaN;
}

function describeBounds(spec: OptionSpec): string {
  const bounds: string[] = [];
  if (spec.above !== undefined) bounds.push(`above ${spec.above}`);
  if (spec.min !== undefined) bounds.push(`of at least ${spec.min}`);
  if (spec.below !== undefined) bounds.push(`below ${spec.below}`);
  if (spec.max !== undefined) bounds.push(`of at most ${spec.max}`);
  return bounds.join(' and ');
}

/** `a number above 0`, `one of a, b`: what an option takes, in words. */
export function describeExpected(spec: OptionSpec): string {
  if (spec.choices) return `${spec.type === 'strings' ? 'names out of' : 'one of'} ${spec.choices.join(', ')}`;
  if (spec.type === 'boolean') return 'true or false';
  if (spec.type === 'string') return { FILE: 'a file', TEXT: 'some text' }[spec.placeholder ?? ''] ?? 'a folder';
  if (spec.type === 'strings') return 'names, separated by commas';
  const noun = spec.type === 'integer' ? 'a whole number' : spec.type === 'numbers' ? 'numbers, each' : 'a number';
  return `${noun} ${describeBounds(spec)}`.trim();
}

const inBounds = (spec: OptionSpec, value: number): boolean =>
  Number.isFinite(value) &&
  (spec.type !== 'integer' || Number.isSafeInteger(value)) &&
  value >= (spec.min ?? Number.NEGATIVE_INFINITY) &&
  value <= (spec.max ?? Number.POSITIVE_INFINITY) &&
  value > (spec.above ?? Number.NEGATIVE_INFINITY) &&
  value < (spec.below ?? Number.POSITIVE_INFINITY);

const items = (raw: unknown): unknown[] =>
  Array.isArray(raw) ? raw : typeof raw === 'string' ? raw.split(',').map((item) => item.trim()) : [raw];

/** The value in the option's type, or undefined when it is none. */
function convert(spec: OptionSpec, raw: unknown): Value | undefined {
  switch (spec.type) {
    case 'boolean':
      return typeof raw === 'boolean' ? raw : undefined;
    case 'integer':
    case 'number': {
      const value = toNumber(raw);
      return inBounds(spec, value) ? value : undefined;
    }
    case 'numbers': {
      const values = items(raw).map(toNumber);
      return values.length > 0 && values.every((value) => inBounds(spec, value)) ? values : undefined;
    }
    case 'string':
      return typeof raw === 'string' && raw !== '' && (spec.choices?.includes(raw) ?? true) ? raw : undefined;
    case 'strings': {
      const names = items(raw);
      const good = names.every((name) => typeof name === 'string' && name && (spec.choices?.includes(name) ?? true));
      return good && names.length > 0 ? (names as string[]) : undefined;
    }
  }
}

/** For choices: the one that was probably meant. */
function nearestChoice(spec: OptionSpec, raw: unknown): string {
  const wrong = items(raw).find((item) => typeof item === 'string' && !spec.choices?.includes(item));
  return spec.choices && typeof wrong === 'string' ? didYouMean(wrong, spec.choices) : '';
}

function checked(key: OptionKey, raw: unknown, naming: Naming): Value {
  const spec = specOf(key);
  const value = convert(spec, raw);
  if (value !== undefined) return value;
  const found = typeof raw === 'string' && numeral.test(raw) ? raw : show(raw);
  const advice = nearestChoice(spec, raw) || (spec.remedy ? `; ${spec.remedy}` : '');
  throw new KeelgradError(`${naming.option(key)}: expected ${describeExpected(spec)}, found ${found}${advice}`);
}

function checkRequired(method: Method, chosen: Chosen, naming: Naming): void {
  const missing = optionsOf(method).filter((key) => specOf(key).required && chosen[key] === undefined);
  if (missing.length === 0) return;
  const usage = missing.map((key) => `${naming.option(key)} ${specOf(key).placeholder}`).join(' ');
  throw new KeelgradError(`keelgrad ${method} needs ${usage}; see keelgrad ${method} --help`);
}

export interface ResolveSettings {
  /** How messages spell options; camelCase keys by default. */
  naming?: Naming;
  /** Whether model, data and output must be given; library calls that hand over objects say no. */
  requirePaths?: boolean;
}

/**
 * Checks what was given for a command and completes it by its preset and the table's defaults.
 * @param given values by name (camelCase, kebab-case or snake_case); strings are read as the command line's.
 * @throws KeelgradError for unknown names, values out of range, and combinations in which an option would do nothing.
 */
export function resolveOptions<M extends Method>(
  method: M,
  given: Readonly<Record<string, unknown>>,
  settings: ResolveSettings = {},
): Resolved<M> {
  const { naming = libraryNaming, requirePaths = true } = settings;
  const values = normalizeKeys(method, given, naming);
  const preset = presetDefaults('preset' in values ? (checked('preset', values.preset, naming) as string) : undefined);
  const chosen: Record<string, Value | undefined> = {};
  const rules: [OptionKey, DefaultRule][] = [];
  for (const key of optionsOf(method)) {
    const fallback = preset[key] ?? defaultOf(key, method);
    if (key in values) chosen[key] = checked(key, values[key], naming);
    else if (isRule(fallback)) rules.push([key, fallback]);
    else chosen[key] = isWithout(fallback) ? undefined : fallback;
  }
  const plain = { ...chosen };
  for (const [key, rule] of rules) chosen[key] = rule.value(plain);
  if (requirePaths) checkRequired(method, chosen, naming);
  const isGiven = (key: OptionKey): boolean => key in values;
  checkRules({ method, chosen, isGiven, naming });
  return { method, ...chosen } as unknown as Resolved<M>;
}

/** What run.json records: kebab-case keys as in a config file, without options that had no value or no part. */
export function describeOptions(options: Resolved<Method>): Record<string, Value> {
  const chosen = options as unknown as Chosen;
  const entries = optionsOf(options.method).filter(
    (key) => chosen[key] !== undefined && isLive(key, chosen, options.method),
  );
  return Object.fromEntries(entries.map((key) => [kebabCase(key), chosen[key] as Value]));
}

/** Steps of a whole run and of its warmup, from the optimizer steps of one pass over the data. */
export function planSteps(
  options: Pick<SftOptions, 'maxSteps' | 'epochs' | 'warmupRatio' | 'warmupSteps'>,
  stepsPerEpoch: number,
): { totalSteps: number; warmupSteps: number } {
  const totalSteps = options.maxSteps ?? Math.ceil(options.epochs * stepsPerEpoch);
  const { warmupRatio, warmupSteps } = options;
  return { totalSteps, warmupSteps: warmupRatio === undefined ? warmupSteps : Math.ceil(totalSteps * warmupRatio) };
}
