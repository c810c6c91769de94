// The causal language model of the Llama and Qwen2 families: a pure function of its parameters over a packed token axis.
// The two differ in their configuration only (which linears have biases, rotary scaling, tied embeddings).
import { checkpoint } from '../autograd/checkpoint.js';
import { KeelgradError } from '../errors.js';
import { adapterKey } from '../io/peft.js';
import { AdapterCopies } from '../nn/adapter-copies.js';
import { initializeAdapters, type LoraSpec, scaleOf } from '../nn/lora.js';
import { add, less, mul } from '../ops/elementwise.js';
import { type HeadStatistics, vocabHead } from '../ops/head.js';
import { type AdaptedLinear, type Adapter, adaptedLinears } from '../ops/lora.js';
import { cast, gatherRows, reshape } from '../ops/movement.js';
import { linear } from '../ops/product.js';
import { randomUniform } from '../ops/random.js';
import type { SegmentLayout } from '../ops/segments.js';
import { addRmsNorm, groupedQueryAttention, rmsNorm, rotaryEmbedding, swiglu } from '../ops/transformer.js';
import { accumulationDType, type DType, policyOf } from '../tensor/dtype.js';
import { scope } from '../tensor/scope.js';
import type { Device } from '../tensor/storage.js';
import type { Tensor } from '../tensor/tensor.js';
import type { ModelConfig } from './config.js';
import {
  EMBEDDING,
  FINAL_NORM,
  LM_HEAD,
  linearGroups,
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
  /** Keeps only what enters each block for backward, which runs the block again. */
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
  private copies: AdapterCopies | null = null;

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
    this.copies = new AdapterCopies(this.adapterGroups(), this.dtype);
  }

  /** The adapters that read one input, together. */
  private adapterGroups(): Adapter[][] {
    return Array.from({ length: this.config.layers }, (_, layer) =>
      Object.values(linearGroups).map((names) =>
        names.flatMap((name) => adapterOf(this.adapters, modulePath(layer, name)) ?? []),
      ),
    )
      .flat()
      .filter((group) => group.length > 0);
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
      let state: Stream = { x: embedded, normed: rmsNorm(embedded, this.inputNorm(p, 0), this.config.rmsNormEps) };
      for (let layer = 0; layer < this.config.layers; layer++) {
        const input = state;
        const block = options.checkpointing ? this.checkpointedBlock : this.block;
        state = scope(() => block.call(this, p, layer, input, layout, options));
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
    this.copies?.dispose();
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

  /** The weight of the norm in front of a layer; behind the last one that is the final norm. */
  private inputNorm(p: ModelParameters, layer: number): Tensor {
    return this.weight(p, this.inputNormName(layer));
  }

  private inputNormName(layer: number): string {
    return layer < this.config.layers ? modulePath(layer, 'input_layernorm.weight') : FINAL_NORM;
  }

  /** The residual stream behind a layer and its norm for the next one, from those behind the layer before. */
  private block(
    p: ModelParameters,
    layer: number,
    { x, normed }: Stream,
    layout: SegmentLayout,
    options: ForwardOptions,
  ): Stream {
    const eps = this.config.rmsNormEps;
    const attended = scope(() => this.attention(p, layer, normed, layout, options));
    const norm = this.weight(p, modulePath(layer, 'post_attention_layernorm.weight'));
    const [middle, inner] = addRmsNorm(x, attended, norm, eps);
    attended.dispose();
    const changed = scope(() => {
      const [gate, up] = this.project(p, layer, linearGroups.gated, inner, options);
      return this.project(p, layer, linearGroups.down, swiglu(gate, up), options)[0];
    });
    const [out, next] = addRmsNorm(middle, changed, this.inputNorm(p, layer + 1), eps);
    return { x: out, normed: next };
  }

  private checkpointedBlock(
    p: ModelParameters,
    layer: number,
    { x, normed }: Stream,
    layout: SegmentLayout,
    options: ForwardOptions,
  ): Stream {
    const next = this.inputNormName(layer + 1);
    const own = (map: ParameterMap | null): [string, Tensor][] =>
      [...(map ?? [])].filter(([name]) => name === next || name.includes(modulePath(layer, '')));
    const [backbone, adapters] = [own(p.backbone), own(p.adapters)];
    const named = (entries: readonly [string, Tensor][], tensors: readonly Tensor[]): ParameterMap =>
      new Map(entries.map(([name], i) => [name, tensors[i]]));
    const [sum, norm] = checkpoint(
      (x, normed, ...tensors) => {
        const split = backbone.length;
        const parameters = {
          backbone: named(backbone, tensors.slice(0, split)),
          adapters: p.adapters && named(adapters, tensors.slice(split)),
        };
        const after = this.block(parameters, layer, { x, normed }, layout, options);
        return [after.x, after.normed] as const;
      },
      x,
      normed,
      ...[...backbone, ...adapters].map(([, t]) => t),
    );
    return { x: sum, normed: norm };
  }

  private attention(
    p: ModelParameters,
    layer: number,
    x: Tensor,
    layout: SegmentLayout,
    options: ForwardOptions,
  ): Tensor {
    const { heads, headDim } = this.config;
    const rows = x.shape[0];
    const [queries, keys, values] = this.project(p, layer, linearGroups.attention, x, options).map((t) =>
      reshape(t, [rows, t.shape[1] / headDim, headDim]),
    );
    const { positions } = layout.on(x.device);
    const table = this.rope.get(layout.maxContext, accumulationDType(x.dtype), x.device);
    const [q, k] = [queries, keys].map((t) => rotaryEmbedding(t, positions, table));
    const mixed = groupedQueryAttention(q, k, values, layout);
    return this.project(p, layer, linearGroups.attended, reshape(mixed, [rows, heads * headDim]), options)[0];
  }

  /** Linears of one input, with their adapters where they have them. */
  private project(
    p: ModelParameters,
    layer: number,
    names: readonly string[],
    x: Tensor,
    { dropout }: ForwardOptions,
  ): readonly Tensor[] {
    const modules = names.map((name) => modulePath(layer, name));
    const linears = modules.map((module) => ({
      weight: this.weight(p, `${module}.weight`),
      bias: p.backbone.get(`${module}.bias`) ?? null,
      adapter: this.lora && p.adapters && adapterOf(p.adapters, module),
    }));
    if (dropout && dropout.rate > 0) return linears.map((part, i) => this.projectDropped(part, x, dropout, modules[i]));
    const adapters = linears.flatMap(({ adapter }) => adapter ?? []);
    return adaptedLinears(x, linears, this.lora ? scaleOf(this.lora) : 1, this.copies?.of(adapters));
  }

  /** Each adapter draws a mask of its own: they have no input in common. */
  private projectDropped({ weight, bias, adapter }: AdaptedLinear, x: Tensor, dropout: AdapterDropout, module: string) {
    const base = linear(x, weight, bias);
    if (!adapter) return base;
    const low = linear(this.drop(x, dropout, module), cast(adapter.a, x.dtype));
    return add(base, mul(linear(low, cast(adapter.b, x.dtype)), scaleOf(this.lora!)));
  }

  private drop(x: Tensor, { rate, seed }: AdapterDropout, module: string): Tensor {
    const offset = this.lora!.modules.indexOf(module) * 2 ** 32;
    const keep = cast(less(randomUniform(x.shape, { seed, offset, device: x.device }), 1 - rate), x.dtype);
    return mul(x, mul(keep, 1 / (1 - rate)));
  }
}

/** A module's path, or a parameter's name, inside of the model. */
const modulePath = (layer: number, name: string): string => `model.layers.${layer}.${name}`;

function adapterOf(adapters: ParameterMap, module: string): Adapter | null {
  const [a, b] = (['A', 'B'] as const).map((matrix) => adapters.get(adapterKey(module, matrix)));
  return a && b ? { a, b } : null;
}
