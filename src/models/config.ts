// config.json of the Llama and Qwen2 families, in the layout of transformers 4 and of transformers 5, to one ModelConfig.
// Never guesses: what changes the numbers and is not supported is an error that names the field.

import { isDeepStrictEqual } from 'node:util';
import { KeelgradError, show } from '../errors.js';
import { Fields, isRecord } from '../io/fields.js';
import { parseJson, readTextFileIfPresent } from '../io/json-file.js';

export type Architecture = 'llama' | 'qwen2';
export type ModelFileDtype = 'float64' | 'float32' | 'bfloat16' | 'float16';

/** Llama 3's frequency scaling; positions are unscaled where `ropeScaling` is null. */
export interface Llama3RopeScaling {
  readonly type: 'llama3';
  readonly factor: number;
  readonly lowFreqFactor: number;
  readonly highFreqFactor: number;
  readonly originalMaxPositions: number;
}

export interface ModelConfig {
  readonly architecture: Architecture;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly vocabSize: number;
  readonly maxPositions: number;
  readonly rmsNormEps: number;
  readonly ropeTheta: number;
  readonly ropeScaling: Llama3RopeScaling | null;
  readonly tieWordEmbeddings: boolean;
  /** Biases of q/k/v, of the attention output, and of the three MLP projections. */
  readonly qkvBias: boolean;
  readonly oBias: boolean;
  readonly mlpBias: boolean;
  readonly eosTokenIds: readonly number[];
  readonly bosTokenId: number | null;
  readonly padTokenId: number | null;
  readonly initializerRange: number;
  /** The dtype the file announces; the weights' own headers decide. */
  readonly dtype: ModelFileDtype | null;
  /** The file as it was: what `serializeModelConfig` writes back. */
  readonly raw: Readonly<Record<string, unknown>>;
  readonly rawText?: string;
}

const ARCHITECTURES: Record<string, Architecture> = { LlamaForCausalLM: 'llama', Qwen2ForCausalLM: 'qwen2' };
const SUPPORTED = Object.keys(ARCHITECTURES).join(', ');
const FILE_DTYPES: readonly ModelFileDtype[] = ['float64', 'float32', 'bfloat16', 'float16'];

function readArchitecture(fields: Fields): Architecture {
  const unsupported = (name: string, value: unknown) =>
    new KeelgradError(`${fields.source}: unknown architecture: ${name} is ${show(value)}; supported: ${SUPPORTED}`);
  const { architectures } = fields.object;
  const modelType = fields.has('model_type') ? fields.text('model_type') : undefined;
  const named = Array.isArray(architectures) && architectures.length > 0 ? architectures : undefined;
  const known = named?.find((name) => typeof name === 'string' && Object.hasOwn(ARCHITECTURES, name));
  if (named && known === undefined) throw unsupported('architectures', named);
  const architecture = known !== undefined ? ARCHITECTURES[known] : modelType;
  if (architecture !== 'llama' && architecture !== 'qwen2') {
    throw modelType === undefined
      ? fields.error('architectures', `one of ${SUPPORTED}`)
      : unsupported('model_type', modelType);
  }
  if (modelType !== undefined && modelType !== architecture) throw unsupported('model_type', modelType);
  return architecture;
}

interface Rope {
  ropeTheta: number;
  ropeScaling: Llama3RopeScaling | null;
}

function readLlama3(rope: Fields, maxPositions: number): Llama3RopeScaling {
  const scaling: Llama3RopeScaling = {
    type: 'llama3',
    factor: rope.positive('factor'),
    lowFreqFactor: rope.positive('low_freq_factor'),
    highFreqFactor: rope.positive('high_freq_factor'),
    originalMaxPositions: rope.count('original_max_position_embeddings', maxPositions),
  };
  if (scaling.factor < 1) throw rope.error('factor', 'a number of at least 1');
  if (scaling.highFreqFactor <= scaling.lowFreqFactor) {
    throw rope.error('high_freq_factor', `a number above low_freq_factor (${scaling.lowFreqFactor})`);
  }
  return scaling;
}

function readRopeObject(fields: Fields, name: string, theta: number, maxPositions: number): Rope {
  const value = fields.object[name];
  if (!isRecord(value)) throw fields.error(name, 'null or an object');
  const rope = new Fields(fields.source, value, `${name}.`);
  const nested = Object.keys(value).find((key) => isRecord(value[key]));
  if (nested !== undefined) throw rope.error(nested, 'one set of values for all layers');
  rope.inert('partial_rotary_factor', [1], 'only rotation of whole heads is supported');
  const typeName = rope.has('rope_type') ? 'rope_type' : 'type';
  const type = rope.text(typeName, 'default');
  if (type !== 'default' && type !== 'llama3') throw rope.error(typeName, '"default" or "llama3"');
  const ropeScaling = type === 'llama3' ? readLlama3(rope, maxPositions) : null;
  return { ropeTheta: rope.positive('rope_theta', theta), ropeScaling };
}

/** Old layout: rope_theta and rope_scaling. New: rope_parameters holding both. Where a file has both, they must agree. */
function readRope(fields: Fields, maxPositions: number): Rope {
  const theta = fields.positive('rope_theta', 10000);
  const names = ['rope_parameters', 'rope_scaling'].filter((name) => fields.has(name));
  const [first, second] = names.map((name) => readRopeObject(fields, name, theta, maxPositions));
  if (second && !isDeepStrictEqual(first, second)) {
    throw new KeelgradError(`${fields.source}: rope_parameters and rope_scaling contradict each other; remove one`);
  }
  return first ?? { ropeTheta: theta, ropeScaling: null };
}

/** Windows apply only while they are switched on and reach a layer; then they are not supported. */
function checkSlidingWindow(fields: Fields, architecture: Architecture, layers: number): void {
  const types = fields.object.layer_types ?? [];
  if (!Array.isArray(types)) throw fields.error('layer_types', 'a list');
  const other = types.find((type) => type !== 'full_attention' && type !== 'sliding_attention');
  if (other !== undefined) throw fields.error('layer_types', '"full_attention" in every layer');
  if (architecture !== 'qwen2' || !fields.flag('use_sliding_window', false) || fields.object.sliding_window === null)
    return;
  const windowed =
    types.length > 0 ? types.includes('sliding_attention') : fields.count('max_window_layers', 28) < layers;
  if (!windowed) return;
  throw new KeelgradError(
    `${fields.source}: use_sliding_window is true: attention windows are not supported; use a model with full attention`,
  );
}

function readTokenIds(fields: Fields, name: string): number[] {
  if (!fields.has(name)) return [];
  const value = fields.object[name];
  const ids = Array.isArray(value) ? value : [value];
  if (!ids.every((id) => Number.isSafeInteger(id) && id >= -1))
    throw fields.error(name, 'a token id, a list of them or null');
  return ids.filter((id) => id >= 0);
}

function readDtype(fields: Fields): ModelFileDtype | null {
  const name = fields.has('dtype') ? 'dtype' : 'torch_dtype';
  if (!fields.has(name)) return null;
  const dtype = fields.text(name).replace(/^torch\./, '') as ModelFileDtype;
  if (!FILE_DTYPES.includes(dtype)) throw fields.error(name, `one of ${FILE_DTYPES.join(', ')}`);
  return dtype;
}

function readHeads(fields: Fields, hiddenSize: number): Pick<ModelConfig, 'heads' | 'kvHeads' | 'headDim'> {
  const heads = fields.count('num_attention_heads');
  const kvHeads = fields.count('num_key_value_heads', heads);
  if (heads % kvHeads !== 0) throw fields.error('num_key_value_heads', `a divisor of num_attention_heads (${heads})`);
  if (!fields.has('head_dim') && hiddenSize % heads !== 0) {
    throw fields.error('hidden_size', `a multiple of num_attention_heads (${heads}) where head_dim is absent`);
  }
  const headDim = fields.count('head_dim', hiddenSize / heads);
  if (headDim % 2 !== 0)
    throw new KeelgradError(`${fields.source}: head_dim: expected an even number, found ${headDim}`);
  return { heads, kvHeads, headDim };
}

function refuseUnsupported(fields: Fields): void {
  const activation = fields.text('hidden_act', 'silu');
  if (activation !== 'silu') throw fields.error('hidden_act', '"silu"');
  fields.inert('rope_interleaved', [false], 'interleaved rotary pairs are not supported');
  fields.inert('partial_rotary_factor', [1], 'only rotation of whole heads is supported');
  fields.inert('quantization_config', [{}], 'quantized weights are not supported; use the unquantized model');
}

/** Checks a parsed config.json. `source` is the file's name in messages. */
export function parseModelConfig(raw: unknown, source = 'config.json'): ModelConfig {
  if (!isRecord(raw)) throw new KeelgradError(`${source}: expected a JSON object, found ${show(raw)}`);
  const fields = new Fields(source, raw);
  const architecture = readArchitecture(fields);
  refuseUnsupported(fields);
  const layers = fields.count('num_hidden_layers');
  checkSlidingWindow(fields, architecture, layers);
  const isLlama = architecture === 'llama';
  const hiddenSize = fields.count('hidden_size');
  const maxPositions = fields.count('max_position_embeddings', isLlama ? 2048 : 32768);
  const attentionBias = isLlama && fields.flag('attention_bias', false);
  return {
    architecture,
    hiddenSize,
    intermediateSize: fields.count('intermediate_size'),
    layers,
    ...readHeads(fields, hiddenSize),
    vocabSize: fields.count('vocab_size'),
    maxPositions,
    rmsNormEps: fields.positive('rms_norm_eps', 1e-6),
    ...readRope(fields, maxPositions),
    tieWordEmbeddings: fields.flag('tie_word_embeddings', false),
    qkvBias: attentionBias || !isLlama,
    oBias: attentionBias,
    mlpBias: isLlama && fields.flag('mlp_bias', false),
    eosTokenIds: readTokenIds(fields, 'eos_token_id'),
    bosTokenId: readTokenIds(fields, 'bos_token_id')[0] ?? null,
    padTokenId: readTokenIds(fields, 'pad_token_id')[0] ?? null,
    initializerRange: fields.positive('initializer_range', 0.02),
    dtype: readDtype(fields),
    raw,
  };
}

/** Reads and checks a config.json. */
export async function readModelConfig(path: string): Promise<ModelConfig> {
  const rawText = await readTextFileIfPresent(path);
  if (rawText === undefined) throw new KeelgradError(`${path}: no such file; expected a Hugging Face model folder`);
  return { ...parseModelConfig(parseJson(rawText, path), path), rawText };
}

/**
 * The config.json to save beside weights of `dtype`: the file as it was, in its layout, with the dtype's own field
 * changed (`torch_dtype`, `dtype`, or both; added where there is none). Python's spellings of floats are kept.
 */
export function serializeModelConfig(config: ModelConfig, dtype: ModelFileDtype): string {
  const present = ['dtype', 'torch_dtype'].filter((name) => Object.hasOwn(config.raw, name));
  const names = present.length > 0 ? present : [Object.hasOwn(config.raw, 'rope_parameters') ? 'dtype' : 'torch_dtype'];
  const wanted = { ...config.raw, ...Object.fromEntries(names.map((name) => [name, dtype])) };
  const edited = config.rawText?.replace(/("(?:torch_)?dtype"\s*:\s*)(?:"[^"]*"|null)/g, `$1"${dtype}"`);
  if (edited !== undefined && isDeepStrictEqual(JSON.parse(edited), wanted)) return edited;
  return `${JSON.stringify(wanted, null, 2)}\n`;
}
