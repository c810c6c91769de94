// PEFT's adapter files: adapter_config.json, tensor names, which modules a target list means.
// Never accepts a setting that changes the numbers and that plain LoRA or rsLoRA does not have.

import { mkdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { didYouMean, KeelgradError, show } from '../errors.js';
import { writeJsonAtomic } from './atomic.js';
import { Fields, isRecord } from './fields.js';
import { readJsonFile } from './json-file.js';
import { readSafetensorsHeader, type TensorLocation } from './safetensors.js';
import { type TensorSource, writeSafetensors } from './safetensors-write.js';

export const ADAPTER_CONFIG = 'adapter_config.json';
export const ADAPTER_WEIGHTS = 'adapter_model.safetensors';
/** The layout of adapter_config.json that is written. */
const PEFT_VERSION = '0.21.2';

export interface AdapterConfig {
  readonly r: number;
  readonly alpha: number;
  readonly dropout: number;
  /** Module names or full paths; a string is `all-linear` or a regular expression over full paths. */
  readonly targetModules: readonly string[] | string;
  /** Scale alpha / sqrt(r) instead of alpha / r. */
  readonly rslora: boolean;
  readonly baseModel: string | null;
}

export const loraScale = ({ r, alpha, rslora }: Pick<AdapterConfig, 'r' | 'alpha' | 'rslora'>): number =>
  alpha / (rslora ? Math.sqrt(r) : r);

/**
 * Every field that PEFT writes for plain LoRA beside those of AdapterConfig, at its default. A file may hold the first
 * group at other values only where they are listed, since they change the model; the second is of no consequence.
 */
const INERT_DEFAULTS = {
  alora_invocation_tokens: null,
  alpha_pattern: {},
  arrow_config: null,
  bias: 'none',
  corda_config: null,
  ensure_weight_tying: false,
  eva_config: null,
  exclude_modules: null,
  fan_in_fan_out: false,
  kasa_config: null,
  layer_replication: null,
  layers_to_transform: null,
  loftq_config: {},
  lora_bias: false,
  lora_ga_config: null,
  megatron_config: null,
  modules_to_save: null,
  monteclora_config: null,
  rank_pattern: {},
  target_parameters: null,
  trainable_token_indices: null,
  use_bdlora: null,
  use_dora: false,
  use_qalora: false,
  velora_config: null,
};
const FREE_DEFAULTS = {
  auto_mapping: null,
  inference_mode: true,
  layers_pattern: null,
  megatron_core: 'megatron.core',
  peft_version: PEFT_VERSION,
  qalora_group_size: 16,
  revision: null,
};
const READ_FIELDS = [
  'base_model_name_or_path',
  'init_lora_weights',
  'lora_alpha',
  'lora_dropout',
  'peft_type',
  'r',
  'target_modules',
  'task_type',
  'use_rslora',
];

const isEmpty = (value: unknown): boolean =>
  value === null || value === false || (typeof value === 'object' && Object.keys(value as object).length === 0);

function refuseUnsupported(fields: Fields): void {
  const free = new Set([...READ_FIELDS, ...Object.keys(FREE_DEFAULTS)]);
  for (const [name, value] of Object.entries(fields.object)) {
    const inert = (INERT_DEFAULTS as Record<string, unknown>)[name];
    if (free.has(name) || isEmpty(value) || isDeepStrictEqual(value, inert)) continue;
    const known = [...free, ...Object.keys(INERT_DEFAULTS)];
    const hint = inert === undefined ? didYouMean(name, known) : '; plain LoRA and rsLoRA are';
    throw new KeelgradError(`${fields.source}: ${name} is ${show(value)}, which is not supported${hint}`);
  }
}

function readTargetModules(fields: Fields): readonly string[] | string {
  const value = fields.object.target_modules;
  if (typeof value === 'string' && value !== '') return value;
  const isName = (name: unknown): boolean => typeof name === 'string' && name !== '';
  if (Array.isArray(value) && value.length > 0 && value.every(isName)) return value;
  throw fields.error('target_modules', 'a list of module names, "all-linear" or a regular expression');
}

/** Initializations that leave the base weights as they are; the others make an adapter fit changed base weights only. */
function checkInitialization(fields: Fields): void {
  const value = fields.object.init_lora_weights ?? true;
  if ([true, false, 'gaussian', 'orthogonal'].some((known) => known === value)) return;
  throw fields.error('init_lora_weights', 'true, false, "gaussian" or "orthogonal" (others change the base weights)');
}

/** Checks a parsed adapter_config.json. `source` is the file's name in messages. */
export function parseAdapterConfig(raw: unknown, source = ADAPTER_CONFIG): AdapterConfig {
  if (!isRecord(raw)) throw new KeelgradError(`${source}: expected a JSON object, found ${show(raw)}`);
  const fields = new Fields(source, raw);
  if (fields.text('peft_type') !== 'LORA') throw fields.error('peft_type', '"LORA"');
  if (fields.text('task_type', 'CAUSAL_LM') !== 'CAUSAL_LM') throw fields.error('task_type', '"CAUSAL_LM" or null');
  refuseUnsupported(fields);
  checkInitialization(fields);
  const isDropout = (value: unknown): value is number => typeof value === 'number' && value >= 0 && value < 1;
  return {
    r: fields.count('r'),
    alpha: fields.positive('lora_alpha'),
    dropout: fields.read('lora_dropout', 0, 'a number from 0 to below 1', isDropout),
    targetModules: readTargetModules(fields),
    rslora: fields.flag('use_rslora', false),
    baseModel: fields.text('base_model_name_or_path', '') || null,
  };
}

/** The object that PEFT writes: all its fields, keys sorted. Loaded by PEFT as it is. */
export function formatAdapterConfig(config: AdapterConfig): Record<string, unknown> {
  const { targetModules } = config;
  const all: Record<string, unknown> = {
    ...INERT_DEFAULTS,
    ...FREE_DEFAULTS,
    base_model_name_or_path: config.baseModel,
    init_lora_weights: true,
    lora_alpha: config.alpha,
    lora_dropout: config.dropout,
    peft_type: 'LORA',
    r: config.r,
    target_modules: typeof targetModules === 'string' ? targetModules : [...targetModules].sort(),
    task_type: 'CAUSAL_LM',
    use_rslora: config.rslora,
  };
  return Object.fromEntries(Object.entries(all).sort(([a], [b]) => (a < b ? -1 : 1)));
}

function pythonRegExp(pattern: string, source: string): RegExp {
  try {
    return new RegExp(`^(?:${pattern.replaceAll('(?P<', '(?<')})$`, 'su');
  } catch {
    const remedy = 'give a list of module names, or a pattern that JavaScript reads too';
    throw new KeelgradError(`${source}: ${show(pattern)} is no regular expression; ${remedy}`);
  }
}

export interface TargetOptions {
  /** Where the targets come from, for messages. */
  source?: string;
  /** Names that match nothing are ignored, as PEFT does with files it made; otherwise they are errors. */
  lenient?: boolean;
}

/**
 * The modules that `targets` means, in the order of `linears` (full paths of the model's linears, `lm_head` included
 * or not), by PEFT's rules: a name matches itself and every path that ends in `.name`; `all-linear` is all but the
 * output head; any other string is a regular expression that has to match a whole path.
 */
export function resolveTargetModules(
  targets: readonly string[] | string,
  linears: readonly string[],
  { source = 'target_modules', lenient = false }: TargetOptions = {},
): string[] {
  const names = new Set(linears.flatMap((path) => [path, path.slice(path.lastIndexOf('.') + 1)]));
  const matches = (name: string, path: string): boolean => path === name || path.endsWith(`.${name}`);
  const list = typeof targets === 'string' ? undefined : targets;
  const unmatched = list?.find((name) => !linears.some((path) => matches(name, path)));
  if (unmatched !== undefined && !lenient) {
    const hint = didYouMean(unmatched, names);
    throw new KeelgradError(`${source}: ${show(unmatched)} matches no linear of the model${hint}`);
  }
  const found = linears.filter(targetTest(targets, source, matches));
  if (found.length > 0) return found;
  throw new KeelgradError(
    `${source}: ${show(targets)} matches no linear of the model; it has ${[...names].join(', ')}`,
  );
}

function targetTest(
  targets: readonly string[] | string,
  source: string,
  matches: (name: string, path: string) => boolean,
): (path: string) => boolean {
  if (typeof targets !== 'string') return (path) => targets.some((name) => matches(name, path));
  if (targets.toLowerCase() === 'all-linear') return (path) => !matches('lm_head', path);
  const pattern = pythonRegExp(targets, source);
  return (path) => pattern.test(path);
}

export type LoraMatrix = 'A' | 'B';

/** `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`: A is `[r, in]`, B is `[out, r]`. */
export const adapterKey = (modulePath: string, matrix: LoraMatrix): string =>
  `base_model.model.${modulePath}.lora_${matrix}.weight`;

export function parseAdapterKey(key: string): { module: string; matrix: LoraMatrix } | undefined {
  const match = /^base_model\.model\.(.+)\.lora_([AB])\.weight$/.exec(key);
  return match ? { module: match[1], matrix: match[2] as LoraMatrix } : undefined;
}

export interface AdapterFiles {
  readonly config: AdapterConfig;
  /** By module path: the two matrices, both present, shapes consistent with the configuration's r. */
  readonly modules: ReadonlyMap<string, Readonly<Record<LoraMatrix, TensorLocation>>>;
}

function checkRank(tensor: TensorLocation, axis: number, r: number): void {
  if (tensor.shape.length === 2 && tensor.shape[axis] === r) return;
  const expected = axis === 0 ? `[${r}, in]` : `[out, ${r}]`;
  throw new KeelgradError(
    `${tensor.file}: tensor "${tensor.name}": expected shape ${expected} by r of ${ADAPTER_CONFIG}, found [${tensor.shape}]`,
  );
}

/** Reads the headers of an adapter folder; the loader reads or maps the tensors, and checks `in` and `out`. */
export async function openAdapter(folder: string): Promise<AdapterFiles> {
  const configPath = join(folder, ADAPTER_CONFIG);
  const config = parseAdapterConfig(await readJsonFile(configPath), configPath);
  const path = join(folder, ADAPTER_WEIGHTS);
  const pickled = await stat(join(folder, 'adapter_model.bin')).catch(() => undefined);
  if (pickled && !(await stat(path).catch(() => undefined))) {
    throw new KeelgradError(`${folder}: adapter_model.bin is not read; save the adapter with safe_serialization=True`);
  }
  const pairs = new Map<string, Partial<Record<LoraMatrix, TensorLocation>>>();
  for (const tensor of (await readSafetensorsHeader(path)).tensors.values()) {
    const key = parseAdapterKey(tensor.name);
    if (!key) throw new KeelgradError(`${path}: tensor "${tensor.name}" is no LoRA matrix of a module`);
    checkRank(tensor, key.matrix === 'A' ? 0 : 1, config.r);
    pairs.set(key.module, { ...pairs.get(key.module), [key.matrix]: tensor });
  }
  const modules = new Map<string, Record<LoraMatrix, TensorLocation>>();
  for (const [module, { A, B }] of pairs) {
    if (!A || !B) throw new KeelgradError(`${path}: tensor "${adapterKey(module, A ? 'B' : 'A')}" is missing`);
    modules.set(module, { A, B });
  }
  return { config, modules };
}

/** Writes both files of an adapter folder. The tensors' names are `adapterKey`s. */
export async function writeAdapter(
  folder: string,
  config: AdapterConfig,
  tensors: Iterable<TensorSource>,
): Promise<void> {
  await mkdir(folder, { recursive: true });
  await writeSafetensors(join(folder, ADAPTER_WEIGHTS), tensors);
  await writeJsonAtomic(join(folder, ADAPTER_CONFIG), formatAdapterConfig(config));
}
