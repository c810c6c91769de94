// Parameters by name: which tensors a model of a configuration has, and which of its linears can carry adapters.
// Names are those of Hugging Face's files.

import type { Tensor } from '../tensor/tensor.js';
import type { ModelConfig } from './config.js';

/** Tensors by name, in file order. */
export type ParameterMap = Map<string, Tensor>;

/** A model as a function's argument: backbone θ, and adapters φ (null: switched off or absent). */
export interface ModelParameters {
  backbone: ParameterMap;
  adapters: ParameterMap | null;
}

/** The seven linears of a layer, by module path inside it. */
export const layerLinears = [
  'self_attn.q_proj',
  'self_attn.k_proj',
  'self_attn.v_proj',
  'self_attn.o_proj',
  'mlp.gate_proj',
  'mlp.up_proj',
  'mlp.down_proj',
] as const;
export type LayerLinear = (typeof layerLinears)[number];

/** Those of them that read one input stand together. */
export const linearGroups = {
  attention: ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
  attended: ['self_attn.o_proj'],
  gated: ['mlp.gate_proj', 'mlp.up_proj'],
  down: ['mlp.down_proj'],
} as const satisfies Record<string, readonly LayerLinear[]>;

export const EMBEDDING = 'model.embed_tokens.weight';
export const FINAL_NORM = 'model.norm.weight';
export const LM_HEAD = 'lm_head.weight';

/** `[out, in]` of a layer's linear. */
export function linearShape(config: ModelConfig, name: LayerLinear): [number, number] {
  const { hiddenSize, intermediateSize, heads, kvHeads, headDim } = config;
  switch (name) {
    case 'self_attn.q_proj':
      return [heads * headDim, hiddenSize];
    case 'self_attn.k_proj':
    case 'self_attn.v_proj':
      return [kvHeads * headDim, hiddenSize];
    case 'self_attn.o_proj':
      return [hiddenSize, heads * headDim];
    case 'mlp.down_proj':
      return [hiddenSize, intermediateSize];
    default:
      return [intermediateSize, hiddenSize];
  }
}

function hasBias(config: ModelConfig, name: LayerLinear): boolean {
  if (name === 'self_attn.o_proj') return config.oBias;
  return name.startsWith('mlp.') ? config.mlpBias : config.qkvBias;
}

/** Every parameter of the backbone with its shape. A tied head is the embedding and is not listed. */
export function parameterShapes(config: ModelConfig): Map<string, number[]> {
  const shapes = new Map<string, number[]>();
  shapes.set(EMBEDDING, [config.vocabSize, config.hiddenSize]);
  for (let layer = 0; layer < config.layers; layer++) {
    const prefix = `model.layers.${layer}`;
    shapes.set(`${prefix}.input_layernorm.weight`, [config.hiddenSize]);
    for (const name of layerLinears) {
      const shape = linearShape(config, name);
      shapes.set(`${prefix}.${name}.weight`, shape);
      if (hasBias(config, name)) shapes.set(`${prefix}.${name}.bias`, [shape[0]]);
    }
    shapes.set(`${prefix}.post_attention_layernorm.weight`, [config.hiddenSize]);
  }
  shapes.set(FINAL_NORM, [config.hiddenSize]);
  if (!config.tieWordEmbeddings) shapes.set(LM_HEAD, [config.vocabSize, config.hiddenSize]);
  return shapes;
}

/** Module paths of all linears that adapters can be put on, in order, with their `[out, in]`. */
export function linearModules(config: ModelConfig): Map<string, [number, number]> {
  const modules = new Map<string, [number, number]>();
  for (let layer = 0; layer < config.layers; layer++)
    for (const name of layerLinears) modules.set(`model.layers.${layer}.${name}`, linearShape(config, name));
  return modules;
}

/** Number of elements in all tensors. */
export function countParameters(map: ParameterMap | null): number {
  let total = 0;
  for (const t of map?.values() ?? []) total += t.size;
  return total;
}
