// config.json of both families and both layouts; what must be refused, and what must survive a save.

import { readFileSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { parseModelConfig, readModelConfig, serializeModelConfig } from '../../src/models/config.js';
import { describeWithShared, sharedPath } from '../shared.js';

const llama = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  hidden_size: 48,
  intermediate_size: 110,
  num_hidden_layers: 3,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  vocab_size: 301,
  max_position_embeddings: 1024,
  rms_norm_eps: 1e-5,
  rope_theta: 500000,
  eos_token_id: [2, 5],
  bos_token_id: 1,
  pad_token_id: -1,
};
const qwen2 = { ...llama, architectures: ['Qwen2ForCausalLM'], model_type: 'qwen2' };
const llama3 = { factor: 32, high_freq_factor: 4, low_freq_factor: 1, original_max_position_embeddings: 32 };

describe('parseModelConfig', () => {
  it('fills what files leave out', () => {
    const config = parseModelConfig(llama);
    expect(config).toMatchObject({ architecture: 'llama', headDim: 12, kvHeads: 2, tieWordEmbeddings: false });
    expect(config).toMatchObject({ eosTokenIds: [2, 5], bosTokenId: 1, padTokenId: null, dtype: null });
    expect(config).toMatchObject({ qkvBias: false, oBias: false, mlpBias: false, ropeScaling: null });
    expect(parseModelConfig({ ...llama, num_key_value_heads: null }).kvHeads).toBe(4);
    expect(parseModelConfig({ ...llama, head_dim: 20 }).headDim).toBe(20);
  });

  it('knows the biases that no field of Qwen2 announces, and those that fields of Llama do', () => {
    expect(parseModelConfig(qwen2)).toMatchObject({ qkvBias: true, oBias: false, mlpBias: false });
    const biased = parseModelConfig({ ...llama, attention_bias: true, mlp_bias: true });
    expect(biased).toMatchObject({ qkvBias: true, oBias: true, mlpBias: true });
  });

  it('reads rotary scaling in both layouts', () => {
    const { rope_theta, ...rest } = llama;
    const old = parseModelConfig({ ...llama, rope_scaling: { rope_type: 'llama3', ...llama3 } });
    const older = parseModelConfig({ ...llama, rope_scaling: { type: 'llama3', ...llama3 } });
    const v5 = parseModelConfig({ ...rest, rope_parameters: { rope_type: 'llama3', rope_theta, ...llama3 } });
    expect(old.ropeScaling).toEqual({
      type: 'llama3',
      factor: 32,
      lowFreqFactor: 1,
      highFreqFactor: 4,
      originalMaxPositions: 32,
    });
    for (const other of [older, v5]) {
      expect({ ...other, raw: 0 }).toEqual({ ...old, raw: 0 });
    }
  });

  it('lets an inert sliding window pass and refuses an active one', () => {
    const windowed = { ...qwen2, sliding_window: 16, max_window_layers: 2 };
    expect(parseModelConfig({ ...windowed, use_sliding_window: false }).layers).toBe(3);
    expect(parseModelConfig({ ...windowed, use_sliding_window: true, max_window_layers: 3 }).layers).toBe(3);
    expect(() => parseModelConfig({ ...windowed, use_sliding_window: true })).toThrow(
      /use_sliding_window.*not supported/,
    );
  });

  const refused: [string, object, RegExp][] = [
    [
      'an unknown architecture',
      { architectures: ['MistralForCausalLM'] },
      /architectures.*Mistral.*LlamaForCausalLM, Qwen2/,
    ],
    ['a headless class', { architectures: ['LlamaModel'] }, /supported: LlamaForCausalLM/],
    ['an unknown model_type', { architectures: undefined, model_type: 'gpt2' }, /model_type is "gpt2"; supported/],
    [
      'neither',
      { architectures: undefined, model_type: undefined },
      /architectures: expected one of Llama.*found nothing/,
    ],
    ['a contradiction', { model_type: 'qwen2' }, /model_type is "qwen2"/],
    ['a missing size', { hidden_size: undefined }, /cfg: hidden_size: expected a positive integer, found nothing/],
    ['a fractional size', { num_hidden_layers: 2.5 }, /num_hidden_layers: expected a positive integer, found 2.5/],
    ['a text for a number', { rms_norm_eps: '1e-5' }, /rms_norm_eps: expected a positive number, found "1e-5"/],
    ['heads that do not divide', { num_key_value_heads: 3 }, /num_key_value_heads: expected a divisor/],
    ['a hidden size that does not divide', { hidden_size: 50 }, /hidden_size: expected a multiple/],
    ['an odd head_dim', { head_dim: 5 }, /head_dim: expected an even number/],
    ['another activation', { hidden_act: 'gelu' }, /hidden_act: expected "silu", found "gelu"/],
    [
      'another rotary scaling',
      { rope_scaling: { type: 'yarn', factor: 2 } },
      /rope_scaling.type: expected "default" or/,
    ],
    [
      'incomplete llama3 scaling',
      { rope_scaling: { rope_type: 'llama3' } },
      /rope_scaling.factor: expected a positive/,
    ],
    [
      'contradicting rotary fields',
      { rope_scaling: { rope_type: 'llama3', ...llama3 }, rope_parameters: { rope_theta: 1 } },
      /contradict/,
    ],
    ['rotation of half heads', { partial_rotary_factor: 0.5 }, /partial_rotary_factor is 0.5/],
    ['quantized weights', { quantization_config: { bits: 4 } }, /quantization_config.*not supported/],
    ['a bad token id', { eos_token_id: ['a'] }, /eos_token_id: expected a token id/],
    ['an unknown dtype', { dtype: 'int8' }, /dtype: expected one of float64/],
  ];
  it.each(refused)('refuses %s', (_, change, message) => {
    expect(() => parseModelConfig({ ...llama, ...change }, 'cfg')).toThrow(message);
  });

  it('refuses what is no object', () => {
    expect(() => parseModelConfig([], 'cfg')).toThrow('cfg: expected a JSON object');
  });
});

describe('readModelConfig and serializeModelConfig', () => {
  it('keeps the layout and changes the dtype alone', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'keelgrad-'));
    try {
      const path = join(folder, 'config.json');
      const text = `{\n  "torch_dtype": "bfloat16",\n  "rms_norm_eps": 1e-05, ${JSON.stringify(llama).slice(1)}\n`;
      await writeFile(path, text);
      const config = await readModelConfig(path);
      expect(serializeModelConfig(config, 'float32')).toBe(text.replace('bfloat16', 'float32'));
      await writeFile(path, '{ "a": ');
      await expect(readModelConfig(path)).rejects.toThrow(/config.json: not valid JSON/);
      await expect(readModelConfig(join(folder, 'x.json'))).rejects.toThrow(/no such file/);
    } finally {
      await rm(folder, { recursive: true });
    }
  });

  it('adds the field of the layout where there is none', () => {
    const saved = (raw: object) => JSON.parse(serializeModelConfig(parseModelConfig(raw), 'float64'));
    expect(saved(llama)).toEqual({ ...llama, torch_dtype: 'float64' });
    expect(saved({ ...llama, rope_parameters: { rope_theta: 500000 } })).toHaveProperty('dtype', 'float64');
    expect(saved({ ...llama, dtype: 'float32', torch_dtype: 'float32' })).toMatchObject({
      torch_dtype: 'float64',
      dtype: 'float64',
    });
  });
});

describeWithShared('recorded configurations', 'data/configs', () => {
  const real: [string, object][] = [
    ['llama-3.2-1b-instruct', { headDim: 64, kvHeads: 8, eosTokenIds: [128001, 128008, 128009], dtype: 'float16' }],
    ['llama-3.2-3b-instruct', { headDim: 128, ropeTheta: 500000, tieWordEmbeddings: true }],
    ['qwen2.5-0.5b-instruct', { architecture: 'qwen2', headDim: 64, qkvBias: true, vocabSize: 151936, layers: 24 }],
    ['smollm2-135m-instruct', { headDim: 64, heads: 9, kvHeads: 3, dtype: 'bfloat16', padTokenId: 2 }],
    ['smollm2-360m-instruct', { headDim: 64, layers: 32 }],
    ['tinyllama-1.1b-chat-v1.0', { dtype: 'float32', tieWordEmbeddings: false, ropeScaling: null }],
  ];
  it.each(real)('reads %s', async (name, expected) => {
    const path = sharedPath('data/configs', name, 'config.json');
    const config = await readModelConfig(path);
    expect(config).toMatchObject(expected);
    const saved = serializeModelConfig(config, 'float64');
    expect(saved.replace('float64', config.dtype ?? '')).toBe(readFileSync(path, 'utf8'));
  });

  it.each(['qwen2-tiny', 'llama-tiny'])('finds the same model in both layouts of %s', async (name) => {
    const old = await readModelConfig(sharedPath('golden/models', name, 'config.json'));
    const v5 = await readModelConfig(sharedPath('golden/models', name, 'config.v5.json'));
    const same = { raw: 0, rawText: '', eosTokenIds: [] };
    expect({ ...v5, ...same }).toEqual({ ...old, ...same });
  });
});
