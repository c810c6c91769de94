// adapter_config.json and tensor names as PEFT has them, both ways.

import { mkdtemp, rename, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  type AdapterConfig,
  adapterKey,
  formatAdapterConfig,
  loraScale,
  openAdapter,
  parseAdapterConfig,
  parseAdapterKey,
  resolveTargetModules,
  writeAdapter,
} from '../../src/io/peft.js';
import type { TensorSource } from '../../src/io/safetensors-write.js';
import { describeWithShared, readSharedJson, sharedPath } from '../shared.js';

const config: AdapterConfig = {
  r: 2,
  alpha: 4,
  dropout: 0,
  targetModules: ['v_proj', 'q_proj'],
  rslora: false,
  baseModel: '../model',
};
const linears = [0, 1].flatMap((layer) =>
  ['self_attn.q_proj', 'self_attn.v_proj', 'mlp.up_proj'].map((name) => `model.layers.${layer}.${name}`),
);
const all = [...linears, 'lm_head'];

describe('adapter_config.json', () => {
  it('survives a round trip, with sorted keys and targets', () => {
    const written = formatAdapterConfig(config);
    expect(Object.keys(written)).toEqual(Object.keys(written).sort());
    expect(written).toMatchObject({ peft_type: 'LORA', task_type: 'CAUSAL_LM', target_modules: ['q_proj', 'v_proj'] });
    expect(parseAdapterConfig(written)).toEqual({ ...config, targetModules: ['q_proj', 'v_proj'] });
    expect(loraScale(config)).toBe(2);
    expect(loraScale({ ...config, rslora: true })).toBe(4 / Math.SQRT2);
  });

  it('accepts files of older versions, and empty fields of newer ones', () => {
    const old = { peft_type: 'LORA', r: 8, lora_alpha: 16, target_modules: 'all-linear' };
    const future = { modules_to_save: [], exclude_modules: [], new_field: null, other: {}, layers_pattern: 'layers' };
    const expected = { r: 8, alpha: 16, dropout: 0, targetModules: 'all-linear', rslora: false, baseModel: null };
    expect(parseAdapterConfig(old)).toEqual(expected);
    expect(parseAdapterConfig({ ...old, ...future })).toEqual(expected);
  });

  const refused: [object, RegExp][] = [
    [{ peft_type: 'IA3' }, /cfg: peft_type: expected "LORA", found "IA3"/],
    [{ task_type: 'SEQ_CLS' }, /task_type: expected "CAUSAL_LM" or null/],
    [{ use_dora: true }, /use_dora is true, which is not supported; plain LoRA/],
    [{ modules_to_save: ['lm_head'] }, /modules_to_save is \["lm_head"\], which is not supported/],
    [{ bias: 'all' }, /bias is "all"/],
    [{ lora_bias: true }, /lora_bias is true/],
    [{ rank_pattern: { q_proj: 3 } }, /rank_pattern is {"q_proj":3}/],
    [{ layers_to_transform: [0] }, /layers_to_transform is \[0\]/],
    [{ use_rslra: true }, /use_rslra is true, which is not supported; did you mean "use_rslora"/],
    [{ init_lora_weights: 'pissa' }, /init_lora_weights: expected true, false.* found "pissa"/],
    [{ r: 0 }, /r: expected a positive integer, found 0/],
    [{ lora_alpha: -1 }, /lora_alpha: expected a positive number/],
    [{ lora_dropout: 1 }, /lora_dropout: expected a number from 0 to below 1/],
    [{ target_modules: [] }, /target_modules: expected a list/],
  ];
  it.each(refused)('refuses %j', (change, message) => {
    expect(() => parseAdapterConfig({ ...formatAdapterConfig(config), ...change }, 'cfg')).toThrow(message);
  });
});

describe('resolveTargetModules', () => {
  it('matches names, endings and full paths, in the order of the model', () => {
    expect(resolveTargetModules(['up_proj', 'q_proj'], all)).toEqual(
      linears.filter((path) => !path.includes('v_proj')),
    );
    expect(resolveTargetModules(['0.self_attn.q_proj'], all)).toEqual(['model.layers.0.self_attn.q_proj']);
    expect(resolveTargetModules(['model.layers.1.mlp.up_proj', 'lm_head'], all)).toEqual([linears[5], 'lm_head']);
  });

  it('knows all-linear and regular expressions', () => {
    expect(resolveTargetModules('all-linear', all)).toEqual(linears);
    expect(resolveTargetModules('.*\\.0\\.(?P<part>self_attn)\\..*', all)).toEqual(linears.slice(0, 2));
    expect(resolveTargetModules('.*_proj', all)).toEqual(linears);
  });

  it('refuses what matches nothing', () => {
    expect(() => resolveTargetModules(['q_prj'], all)).toThrow(/"q_prj" matches no linear.*did you mean "q_proj"/);
    expect(() => resolveTargetModules('q_proj', all)).toThrow(/"q_proj" matches no linear of the model; it has/);
    expect(() => resolveTargetModules('(', all, { source: '--lora-targets' })).toThrow(
      /--lora-targets.*no regular expr/,
    );
    expect(resolveTargetModules(['q_proj', 'c_attn'], all, { lenient: true })).toHaveLength(2);
    expect(() => resolveTargetModules(['c_attn'], all, { lenient: true })).toThrow(/matches no linear/);
  });
});

describe('adapter folders', () => {
  let folder: string;
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'keelgrad-'));
  });
  afterEach(() => rm(folder, { recursive: true }));

  const zeros = (name: string, shape: [number, number]): TensorSource => ({
    name,
    dtype: 'F32',
    shape,
    data: () => new Uint8Array(shape[0] * shape[1] * 4),
  });
  const pair = (module: string) => [zeros(adapterKey(module, 'A'), [2, 3]), zeros(adapterKey(module, 'B'), [5, 2])];

  it('come back as they were written', async () => {
    await writeAdapter(folder, config, linears.flatMap(pair));
    const { modules, config: read } = await openAdapter(folder);
    expect(read).toEqual({ ...config, targetModules: ['q_proj', 'v_proj'] });
    expect([...modules.keys()].sort()).toEqual([...linears].sort());
    expect(modules.get(linears[0])!.B.shape).toEqual([5, 2]);
    expect(parseAdapterKey(adapterKey(linears[0], 'B'))).toEqual({ module: linears[0], matrix: 'B' });
  });

  it('name what is wrong', async () => {
    await expect(openAdapter(folder)).rejects.toThrow(/adapter_config.json: no such file/);
    const [a, b] = pair(linears[0]);
    await writeAdapter(folder, config, [a]);
    await expect(openAdapter(folder)).rejects.toThrow(/q_proj.lora_B.weight" is missing/);
    await writeAdapter(folder, { ...config, r: 3 }, [a, b]);
    await expect(openAdapter(folder)).rejects.toThrow(/lora_[AB].weight": expected shape .*3.* found \[/);
    await writeAdapter(folder, config, [a, b, zeros('base_model.model.x.lora_embedding_A', [2, 2])]);
    await expect(openAdapter(folder)).rejects.toThrow(/"base_model.model.x.lora_embedding_A" is no LoRA matrix/);
    await rename(join(folder, 'adapter_model.safetensors'), join(folder, 'adapter_model.bin'));
    await expect(openAdapter(folder)).rejects.toThrow(/adapter_model.bin is not read/);
    await rm(join(folder, 'adapter_model.bin'));
    await expect(openAdapter(folder)).rejects.toThrow(/adapter_model.safetensors: cannot be opened/);
    await writeFile(join(folder, 'adapter_config.json'), '[]');
    await expect(openAdapter(folder)).rejects.toThrow(/expected a JSON object/);
  });
});

describeWithShared('adapters made by PEFT', 'golden/models', () => {
  const folders = [
    'golden/models/lora-qwen2-tiny',
    'golden/models/lora-qwen2-tiny-rslora',
    'golden/models/lora-llama-tiny',
    'golden/training/dpo_lora_zero/adapter_init',
    'golden/training/dpo_lora_nonzero/adapter_final_float64',
  ];
  it.each(folders)('%s: the configuration is written as it was read', async (name) => {
    const { config: read, modules } = await openAdapter(sharedPath(name));
    const recorded = readSharedJson(name, 'adapter_config.json');
    expect(formatAdapterConfig(read)).toEqual(recorded);
    expect(Object.keys(formatAdapterConfig(read))).toEqual(Object.keys(recorded));
    expect(resolveTargetModules(read.targetModules, [...modules.keys(), 'lm_head'])).toEqual([...modules.keys()]);
  });
});
