// Hugging Face model folders and PEFT adapter folders to models and back.
// Nothing is allocated before names, shapes and dtypes have been checked, and nothing stays allocated after an error.
import { mkdir, readdir, readFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { didYouMean, KeelgradError } from '../errors.js';
import { CausalLM } from '../models/causal-lm.js';
import { type ModelFileDtype, readModelConfig, serializeModelConfig } from '../models/config.js';
import { LM_HEAD, linearModules, type ParameterMap, parameterShapes } from '../models/parameters.js';
import type { LoraSpec } from '../nn/lora.js';
import { type DType, policyOf } from '../tensor/dtype.js';
import { sameShape } from '../tensor/shape.js';
import { type Device, defaultDevice } from '../tensor/storage.js';
import { writeFileAtomic } from './atomic.js';
import { type AdapterConfig, adapterKey, openAdapter, resolveTargetModules, writeAdapter } from './peft.js';
import { type Checkpoint, openCheckpoint, type TensorLocation } from './safetensors.js';
import { writeCheckpoint } from './safetensors-write.js';
import { checkReadable, tensorSource, WeightReader } from './weights.js';

export interface LoadOptions {
  /** Dtype of the backbone in memory and of its arithmetic; float32 by default. */
  dtype?: 'float32' | 'float64' | 'bfloat16';
  device?: Device;
  /** New adapters: r 16, alpha 32, dropout 0.05 on all seven linears unless given. */
  lora?: LoraOptions;
  /** A PEFT adapter folder to put on; not together with `lora`. */
  adapter?: string;
}

export interface LoraOptions {
  r?: number;
  alpha?: number;
  dropout?: number;
  /** Names, full module paths, or `all-linear`. */
  targets?: readonly string[] | string;
  rslora?: boolean;
  seed?: number;
  /** Written to adapter_config.json as base_model_name_or_path. */
  baseModel?: string;
}

/** Buffers that old files carry and that are computed here. */
const ignored = /\.rotary_emb\.inv_freq$/;

function checkNames(
  folder: string,
  checkpoint: Checkpoint,
  expected: ReadonlyMap<string, number[]>,
  tied: boolean,
): void {
  for (const name of checkpoint.tensors.keys()) {
    if (expected.has(name) || ignored.test(name) || (tied && name === LM_HEAD)) continue;
    throw new KeelgradError(
      `${folder}: tensor "${name}" is unknown to this architecture${didYouMean(name, expected.keys())}`,
    );
  }
  for (const [name, shape] of expected) {
    const found = checkpoint.tensors.get(name);
    if (!found)
      throw new KeelgradError(
        `${folder}: tensor "${name}" is missing; expected shape [${shape}] by config.json. Is the download complete?`,
      );
    if (!sameShape(found.shape, shape))
      throw new KeelgradError(
        `${found.file}: tensor "${name}": expected shape [${shape}] by config.json, found [${found.shape}]; the files belong to different models`,
      );
  }
}

/**
 * Loads a Llama or Qwen2 model from a Hugging Face folder (single file or sharded; float32, float64, bfloat16, float16).
 *
 * @throws KeelgradError naming file and tensor where something is missing, unknown, or of the wrong shape
 */
export async function loadModel(folder: string, options: LoadOptions = {}): Promise<CausalLM> {
  const { dtype = 'float32', device = defaultDevice() } = options;
  if (options.lora && options.adapter)
    throw new KeelgradError('expected lora or adapter, found both; an adapter brings its own settings');
  const config = await readModelConfig(join(folder, 'config.json'));
  const checkpoint = await openCheckpoint(folder);
  const shapes = parameterShapes(config);
  checkNames(folder, checkpoint, shapes, config.tieWordEmbeddings);
  const model = new CausalLM(
    config,
    await readAll([...shapes.keys()], (name) => checkpoint.tensors.get(name)!, dtype, device),
  );
  try {
    if (options.lora) addLora(model, { baseModel: folder, ...options.lora });
    if (options.adapter) await loadAdapter(model, options.adapter);
    return model;
  } catch (error) {
    model.dispose();
    throw error;
  }
}

/** Copies tensors into a map, all or none. */
async function readAll(
  names: readonly string[],
  locate: (name: string) => TensorLocation,
  dtype: DType,
  device: Device,
): Promise<ParameterMap> {
  checkReadable(names.map(locate));
  const map: ParameterMap = new Map();
  using reader = new WeightReader();
  try {
    for (const name of names) map.set(name, reader.read(locate(name), dtype, device));
    await reader.settled();
    return map;
  } catch (error) {
    for (const t of map.values()) t.dispose();
    throw error;
  }
}

/** Puts new adapters on a model. */
export function addLora(model: CausalLM, options: LoraOptions = {}): void {
  const {
    r = 16,
    alpha = 32,
    dropout = 0.05,
    rslora = false,
    seed,
    targets = 'all-linear',
    baseModel = null,
  } = options;
  checkLora(r, alpha, dropout);
  const linears = [...linearModules(model.config).keys()];
  const modules = resolveTargetModules(targets, linears, { source: 'lora targets' });
  const names =
    targets === 'all-linear' ? [...new Set(linears.map((path) => path.slice(path.lastIndexOf('.') + 1)))] : targets;
  model.attachLora({ config: { r, alpha, dropout, rslora, targetModules: names, baseModel }, modules }, { seed });
}

function checkLora(r: number, alpha: number, dropout: number): void {
  const fail = (name: string, expected: string, found: number): never => {
    throw new KeelgradError(`lora ${name}: expected ${expected}, found ${found}`);
  };
  if (!Number.isSafeInteger(r) || r < 1) fail('r', 'a positive integer', r);
  if (!(alpha > 0 && Number.isFinite(alpha))) fail('alpha', 'a positive number', alpha);
  if (!(dropout >= 0 && dropout < 1)) fail('dropout', 'a number from 0 to below 1', dropout);
}

/** Loads a PEFT adapter folder onto a model. */
export async function loadAdapter(model: CausalLM, folder: string): Promise<void> {
  const { config, modules } = await openAdapter(folder);
  const shapes = linearModules(model.config);
  for (const [module, { A, B }] of modules) checkAdapterModule(module, A, B, shapes.get(module), shapes.keys());
  const expected = resolveTargetModules(config.targetModules, [...shapes.keys()], {
    source: `${folder}/adapter_config.json`,
    lenient: true,
  });
  const absent = expected.find((module) => !modules.has(module));
  if (absent)
    throw new KeelgradError(
      `${folder}: tensor "${adapterKey(absent, 'A')}" is missing; target_modules names its module`,
    );
  const order = [...shapes.keys()].filter((module) => modules.has(module));
  const locations = new Map<string, TensorLocation>();
  for (const module of order)
    for (const matrix of ['A', 'B'] as const) locations.set(adapterKey(module, matrix), modules.get(module)![matrix]);
  model.requireNoLora();
  const dtype = policyOf(model.dtype).adapters;
  const adapters = await readAll([...locations.keys()], (key) => locations.get(key)!, dtype, model.device);
  model.attachLora({ config, modules: order }, { adapters });
}

function checkAdapterModule(
  module: string,
  a: TensorLocation,
  b: TensorLocation,
  shape: readonly [number, number] | undefined,
  known: Iterable<string>,
): void {
  if (!shape)
    throw new KeelgradError(`${a.file}: module "${module}" is not a linear of the model${didYouMean(module, known)}`);
  if (a.shape[1] !== shape[1] || b.shape[0] !== shape[0])
    throw new KeelgradError(
      `${a.file}: module "${module}": expected lora_A [r, ${shape[1]}] and lora_B [${shape[0]}, r], found [${a.shape}] and [${b.shape}]; the adapter belongs to another model`,
    );
}

/** Files beside the weights that make a folder usable by other tools; copied as they are. */
const companions =
  /^(tokenizer.*|special_tokens_map\.json|generation_config\.json|chat_template.*|vocab\.(json|txt)|merges\.txt|added_tokens\.json|.*\.tiktoken|LICENSE.*)$/;

/** Writes a Hugging Face folder: config, weights in `dtype` (of `backbone`, by default the model's), the tokenizer files of `from`. */
export async function saveModel(
  model: CausalLM,
  folder: string,
  options: { dtype?: ModelFileDtype; backbone?: ParameterMap; from?: string; maxShardBytes?: number } = {},
): Promise<void> {
  const backbone = options.backbone ?? model.backbone;
  const dtype: DType = options.dtype ?? (model.dtype as ModelFileDtype);
  await mkdir(folder, { recursive: true });
  const sources = [...backbone].map(([name, t]) => tensorSource(name, t, dtype));
  await writeCheckpoint(folder, sources, { maxShardBytes: options.maxShardBytes });
  await writeFileAtomic(join(folder, 'config.json'), serializeModelConfig(model.config, dtype as ModelFileDtype));
  if (options.from && resolve(options.from) !== resolve(folder)) await copyCompanions(options.from, folder);
}

/** Contents only: a folder of read-only files must not make a copy that a second save cannot replace. */
async function copyCompanions(from: string, folder: string): Promise<void> {
  for (const name of await readdir(from))
    if (companions.test(name)) await writeFileAtomic(join(folder, name), await readFile(join(from, name)));
}

/** Writes a PEFT adapter folder: adapter_model.safetensors and adapter_config.json. */
export async function saveAdapter(
  model: CausalLM,
  folder: string,
  options: { dtype?: ModelFileDtype; adapters?: ParameterMap; baseModel?: string } = {},
): Promise<void> {
  const lora: LoraSpec | null = model.lora;
  if (!lora) throw new KeelgradError('the model has no adapters to save; load it with lora or adapter');
  const adapters = options.adapters ?? model.adapters;
  const config: AdapterConfig = { ...lora.config, baseModel: options.baseModel ?? lora.config.baseModel };
  const sources = [...adapters].map(([name, t]) => tensorSource(name, t, options.dtype ?? (t.dtype as ModelFileDtype)));
  await writeAdapter(folder, config, sources);
}
