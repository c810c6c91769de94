// The causal language model of the Llama and Qwen2 families: a pure function of its parameters over a packed token axis.
// The two differ in their configuration only (which linears have biases, rotary scaling, tied embeddings).
import { checkpoint } from '../autograd/checkpoint.js';
import { KeelgradError } from '../errors.js';
import { adapterKey } from '../io/peft.js';
import { initializeAdapters, type LoraSpec, scaleOf } from '../nn/lora.js';
import { add, less, mul } from '../ops/elementwise.js';
import { type HeadStatistics, vocabHead } from '../ops/head.js';
import { cast, gatherRows, reshape } from '../ops/movement.js';
import { linear } from '../ops/product.js';
import { randomUniform } from '../ops/random.js';
import type { SegmentLayout } from '../ops/segments.js';
import { addRmsNorm, groupedQueryAttention, loraLinear, rmsNorm, rotaryEmbedding, swiglu } from '../ops/transformer.js';
import { accumulationDType, type DType, policyOf } from '../tensor/dtype.js';
import { scope } from '../tensor/scope.js';
import type { Device } from '../tensor/storage.js';
import type { Tensor } from '../tensor/tensor.js';
import type { ModelConfig } from './config.js';
import {
  EMBEDDING,
  FINAL_NORM,
  LM_HEAD,
  linearModules,
  type ModelParameters,
  type ParameterMap,
} from './parameters.js';
import { RopeTable } from './rope.js';

/** Dropout on the input of the adapters' A; every use draws its own mask from the seed and its place. */
export interface AdapterDropout {
  rate: number;
  seed: number;
}

export interface ForwardOptions {
  dropout?: AdapterDropout | null;
  /** Keeps the input of each block alone for backward, which runs the block again. */
  checkpointing?: boolean;
}

/** Where to read off log-probabilities: target n is id `ids[n]` as predicted by row `rows[n]` of the packed axis. */
export interface Targets {
  /** int32 `[N]`. */
  ids: Tensor;
  /** int32 `[N]`: which of `headRows` predicts it. */
  rows: Tensor;
  /** int32 `[R]`: the packed rows that the head runs on, each once. */
  headRows: Tensor;
}

/** The residual stream between two layers, and its norm: what the next layer reads. */
interface Stream {
  readonly x: Tensor;
  readonly normed: Tensor;
}

export class CausalLM {
  readonly config: ModelConfig;
  readonly backbone: ParameterMap;
  /** Empty without LoRA. */
  adapters: ParameterMap = new Map();
  lora: LoraSpec | null = null;
  private readonly rope: RopeTable;

  constructor(config: ModelConfig, backbone: ParameterMap) {
    this.config = config;
    this.backbone = backbone;
    this.rope = new RopeTable(config);
  }

  get dtype(): DType {
    return this.backbone.get(EMBEDDING)!.dtype;
  }

  get device(): Device {
    return this.backbone.get(EMBEDDING)!.device;
  }

  /** The model's own parameters: what every function below takes. */
  get parameters(): ModelParameters {
    return { backbone: this.backbone, adapters: this.lora ? this.adapters : null };
  }

  /** Puts adapters on: freshly initialized ones unless `adapters` are given. They are float32 beside a bfloat16 backbone. */
  attachLora(lora: LoraSpec, options: { seed?: number; adapters?: ParameterMap } = {}): void {
    this.requireNoLora();
    const { seed = 42, adapters } = options;
    const settings = { seed, dtype: policyOf(this.dtype).adapters, device: this.device };
    this.adapters = adapters ?? initializeAdapters(lora, linearModules(this.config), settings);
    this.lora = lora;
  }

  /** @throws KeelgradError where adapters are on already: a second set would replace the first unseen */
  requireNoLora(): void {
    if (this.lora) throw new KeelgradError('the model has adapters already; save or merge them, and load it again');
  }

  /** Hidden states after the final norm: `[T, hidden]` for int32 `ids [T]` laid out by `layout`. */
  hidden(p: ModelParameters, ids: Tensor, layout: SegmentLayout, options: ForwardOptions = {}): Tensor {
    if (ids.size !== layout.total)
      throw new RangeError(`[hidden] expected ${layout.total} ids as in the layout, found ${ids.size}`);
    return scope(() => {
      const embedded = gatherRows(this.weight(p, EMBEDDING), ids);
      if (options.checkpointing) return this.recomputed(p, embedded, layout, options);
      let state: Stream = { x: embedded, normed: rmsNorm(embedded, this.inputNorm(p, 0), this.config.rmsNormEps) };
      for (let layer = 0; layer < this.config.layers; layer++) {
        const input = state;
        state = scope(() => this.block(p, layer, input, layout, options));
        input.x.dispose();
        input.normed.dispose();
      }
      return state.normed;
    });
  }

  /** The output matrix `[V, hidden]`: the embedding when tied. */
  headWeight(p: ModelParameters): Tensor {
    return this.weight(p, this.config.tieWordEmbeddings ? EMBEDDING : LM_HEAD);
  }

  /** Log-probabilities `[N]` of targets, never holding `[T, V]`; statistics of the head's rows on request. */
  logProbs(
    p: ModelParameters,
    ids: Tensor,
    layout: SegmentLayout,
    targets: Targets,
    options: ForwardOptions & { statistics?: boolean } = {},
  ): { logProbs: Tensor; statistics: HeadStatistics | null } {
    return scope(() => {
      const hidden = this.hidden(p, ids, layout, options);
      const rows = gatherRows(hidden, targets.headRows);
      return vocabHead(rows, this.headWeight(p), targets.rows, targets.ids, { statistics: options.statistics });
    });
  }

  /** Logits `[T, V]` of every position: for inspection and small vocabularies; training never makes them. */
  logits(p: ModelParameters, ids: Tensor, layout: SegmentLayout): Tensor {
    return scope(() => linear(this.hidden(p, ids, layout), this.headWeight(p)));
  }

  dispose(): void {
    for (const map of [this.backbone, this.adapters]) for (const t of map.values()) t.dispose();
    this.rope.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  private weight(p: ModelParameters, name: string): Tensor {
    const t = p.backbone.get(name);
    if (!t) throw new KeelgradError(`the model has no parameter ${name}`);
    return t;
  }

  /** The residual stream behind all layers, and its norm; each layer keeps its input alone and runs again in backward. */
  private recomputed(p: ModelParameters, embedded: Tensor, layout: SegmentLayout, options: ForwardOptions): Tensor {
    let x = embedded;
    for (let layer = 0; layer < this.config.layers; layer++) {
      const input = x;
      x = scope(() => this.checkpointedBlock(p, layer, input, layout, options));
      input.dispose();
    }
    return rmsNorm(x, this.weight(p, FINAL_NORM), this.config.rmsNormEps);
  }

  private checkpointedBlock(
    p: ModelParameters,
    layer: number,
    x: Tensor,
    layout: SegmentLayout,
    options: ForwardOptions,
  ): Tensor {
    const own = (map: ParameterMap | null): [string, Tensor][] =>
      [...(map ?? [])].filter(([name]) => name.includes(`model.layers.${layer}.`));
    const [backbone, adapters] = [own(p.backbone), own(p.adapters)];
    const named = (entries: readonly [string, Tensor][], tensors: readonly Tensor[]): ParameterMap =>
      new Map(entries.map(([name], i) => [name, tensors[i]]));
    return checkpoint(
      (input, ...tensors) => {
        const split = backbone.length;
        const parameters = {
          backbone: named(backbone, tensors.slice(0, split)),
          adapters: p.adapters && named(adapters, tensors.slice(split)),
        };
        const normed = rmsNorm(input, this.inputNorm(parameters, layer), this.config.rmsNormEps);
        return add(...this.summands(parameters, layer, { x: input, normed }, layout, options));
      },
      x,
      ...[...backbone, ...adapters].map(([, t]) => t),
    );
  }

  /** The weight of the norm in front of a layer; behind the last one that is the final norm. */
  private inputNorm(p: ModelParameters, layer: number): Tensor {
    return this.weight(p, layer < this.config.layers ? `model.layers.${layer}.input_layernorm.weight` : FINAL_NORM);
  }

  /** The residual stream behind a layer and its norm for the next one, from those behind the layer before. */
  private block(
    p: ModelParameters,
    layer: number,
    before: Stream,
    layout: SegmentLayout,
    options: ForwardOptions,
  ): Stream {
    const [middle, changed] = this.summands(p, layer, before, layout, options);
    const [x, normed] = addRmsNorm(middle, changed, this.inputNorm(p, layer + 1), this.config.rmsNormEps);
    return { x, normed };
  }

  /** The residual stream inside a layer and what its second half adds to it. */
  private summands(
    p: ModelParameters,
    layer: number,
    { x, normed }: Stream,
    layout: SegmentLayout,
    options: ForwardOptions,
  ): [Tensor, Tensor] {
    const prefix = `model.layers.${layer}`;
    const eps = this.config.rmsNormEps;
    const attended = scope(() => this.attention(p, prefix, normed, layout, options));
    const norm = this.weight(p, `${prefix}.post_attention_layernorm.weight`);
    const [middle, inner] = addRmsNorm(x, attended, norm, eps);
    attended.dispose();
    const changed = scope(() => {
      const gate = this.project(p, `${prefix}.mlp.gate_proj`, inner, options);
      const up = this.project(p, `${prefix}.mlp.up_proj`, inner, options);
      return this.project(p, `${prefix}.mlp.down_proj`, swiglu(gate, up), options);
    });
    return [middle, changed];
  }

  private attention(
    p: ModelParameters,
    prefix: string,
    x: Tensor,
    layout: SegmentLayout,
    options: ForwardOptions,
  ): Tensor {
    const { heads, kvHeads, headDim } = this.config;
    const rows = x.shape[0];
    const project = (name: string, count: number): Tensor =>
      reshape(this.project(p, `${prefix}.self_attn.${name}`, x, options), [rows, count, headDim]);
    const { positions } = layout.on(x.device);
    const table = this.rope.get(layout.maxContext, accumulationDType(x.dtype), x.device);
    const q = rotaryEmbedding(project('q_proj', heads), positions, table);
    const k = rotaryEmbedding(project('k_proj', kvHeads), positions, table);
    const mixed = groupedQueryAttention(q, k, project('v_proj', kvHeads), layout);
    return this.project(p, `${prefix}.self_attn.o_proj`, reshape(mixed, [rows, heads * headDim]), options);
  }

  /** A linear layer, with its adapter where it has one. */
  private project(p: ModelParameters, module: string, x: Tensor, { dropout }: ForwardOptions): Tensor {
    const weight = this.weight(p, `${module}.weight`);
    const bias = p.backbone.get(`${module}.bias`) ?? null;
    const a = p.adapters?.get(adapterKey(module, 'A'));
    const b = p.adapters?.get(adapterKey(module, 'B'));
    if (!this.lora || !a || !b) return linear(x, weight, bias);
    const scale = scaleOf(this.lora);
    if (!dropout || dropout.rate === 0) return loraLinear(x, weight, bias, a, b, scale);
    const dropped = this.drop(x, dropout, module);
    const low = linear(dropped, cast(a, x.dtype));
    return add(linear(x, weight, bias), mul(linear(low, cast(b, x.dtype)), scale));
  }

  private drop(x: Tensor, { rate, seed }: AdapterDropout, module: string): Tensor {
    const offset = this.lora!.modules.indexOf(module) * 2 ** 32;
    const keep = cast(less(randomUniform(x.shape, { seed, offset, device: x.device }), 1 - rate), x.dtype);
    return mul(x, mul(keep, 1 / (1 - rate)));
  }
}
