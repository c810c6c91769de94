// Blocks that run again in backward: the same values and gradients, bit for bit, for a fraction of the memory.
import { expect, it } from 'vitest';
import { AccumulatingSink } from '../../src/autograd/sinks.js';
import { differentiate } from '../../src/autograd/tape.js';
import { addLora } from '../../src/io/model-folder.js';
import { CausalLM } from '../../src/models/causal-lm.js';
import { parseModelConfig } from '../../src/models/config.js';
import { initializeParameters } from '../../src/models/initialize.js';
import '../../src/ops/methods.js';
import { onesLike } from '../../src/ops/movement.js';
import { gradientBuffer } from '../../src/ops/product.js';
import { SegmentLayout } from '../../src/ops/segments.js';
import { scope } from '../../src/tensor/scope.js';
import { memory, resetPeakMemory, trimMemory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { replaceGroups, tensorsOf } from '../../src/train/task.js';

const both = ['backbone', 'adapters'] as const;
const length = 96;

function makeModel(dtype: 'float32' | 'bfloat16'): CausalLM {
  const config = parseModelConfig({
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    hidden_size: 32,
    intermediate_size: 96,
    num_hidden_layers: 12,
    num_attention_heads: 4,
    num_key_value_heads: 2,
    vocab_size: 64,
    tie_word_embeddings: true,
    rope_theta: 10000,
    rms_norm_eps: 1e-5,
    max_position_embeddings: 256,
    hidden_act: 'silu',
  });
  const weights = initializeParameters(config, { seed: 3, dtype: 'float32' });
  const cast = new Map([...weights].map(([name, t]) => [name, t.cast(dtype)]));
  if (dtype !== 'float32') for (const t of weights.values()) t.dispose();
  const model = new CausalLM(config, cast);
  addLora(model, { r: 4, alpha: 8 });
  return model;
}

/** Gradients of the sum of log-probabilities, accumulated over two passes; and what they took beyond what was there. */
function run(model: CausalLM, checkpointing: boolean, rate: number): { bits: string[]; peak: number } {
  const variables = tensorsOf(model.parameters, both);
  const buffers = variables.map((t) => gradientBuffer(t));
  trimMemory();
  resetPeakMemory();
  const before = memory().allocated;
  const values: string[] = [];
  for (const seed of [1, 2])
    scope(() => {
      using layout = SegmentLayout.sequences([length]);
      const ids = Int32Array.from({ length }, (_, i) => (i * 7 + seed) % 64);
      const order = Int32Array.from(ids.keys());
      const targets = { ids: Tensor.from(ids), rows: Tensor.from(order), headRows: Tensor.from(order) };
      const { result } = differentiate(
        variables,
        (tracked) => {
          const p = replaceGroups(model.parameters, both, tracked);
          const options = { checkpointing, dropout: { rate, seed } };
          return model.logProbs(p, Tensor.from(ids), layout, targets, options).logProbs;
        },
        (y) => [{ tensor: y, cotangent: onesLike(y) }],
        { sinks: buffers.map((t) => new AccumulatingSink(t)) },
      );
      values.push(result.dataSync().join());
    });
  const peak = memory().peak - before;
  const bits = [...values, ...buffers.map((t) => t.dataSync().join())];
  for (const t of buffers) t.dispose();
  return { bits, peak };
}

it.each([
  ['float32', 0],
  ['float32', 0.2],
  ['bfloat16', 0],
] as const)('in %s, adapter dropout %d', (dtype, rate) => {
  using model = makeModel(dtype);
  const plain = run(model, false, rate);
  const start = memory().storages;
  const saving = run(model, true, rate);
  expect(saving.bits).toEqual(plain.bits);
  // A's gradient is 0 as long as B is.
  expect(new Set(plain.bits).size).toBeGreaterThan(plain.bits.length / 2);
  expect(saving.peak).toBeLessThan(plain.peak / 3);
  expect(memory().storages).toBe(start);
});
