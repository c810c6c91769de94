// Adapter folders: PEFT's exact files, both ways; merged models; and what is wrong with one is one clear message.
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { KeelgradError } from '../../src/errors.js';
import { loadAdapter, loadModel, saveAdapter, saveModel } from '../../src/io/model-folder.js';
import { readSafetensorsHeader, readTensorBytes } from '../../src/io/safetensors.js';
import { type TensorSource, writeSafetensors } from '../../src/io/safetensors-write.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import { mergeAdapters } from '../../src/nn/lora.js';
import { memory } from '../../src/tensor/storage.js';
import { fixtureInputs, fixtureNames, makeModelFolder } from '../fixtures/make.js';
import { askPeers, describeWithPeers } from '../models/peer.js';
import { bitsOf, GOLDEN_MODELS, logitsOf, maxDifference } from '../models/support.js';
import { describeWithShared, sharedPath } from '../shared.js';

let root = '';
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'keelgrad-adapter-'));
});
afterEach(() => rmSync(root, { recursive: true, force: true }));

const { sequences } = fixtureInputs;
const CONFIG = 'adapter_config.json';
const WEIGHTS = 'adapter_model.safetensors';

/** Gives B values, so that the adapters do something. */
function stir(model: CausalLM): void {
  for (const [key, t] of model.adapters)
    if (key.includes('lora_B'))
      t.write(Float64Array.from({ length: t.size }, (_, i) => 0.2 * Math.sin(i * 1.7 + key.length)));
}

async function adapterBits(model: CausalLM): Promise<Record<string, string>> {
  const bits: Record<string, string> = {};
  for (const [name, t] of model.adapters) bits[name] = await bitsOf(t);
  return bits;
}

const readConfig = (folder: string): Record<string, unknown> => JSON.parse(readFileSync(join(folder, CONFIG), 'utf8'));

describeWithShared('adapters that PEFT has made', GOLDEN_MODELS, () => {
  it.each([
    ['lora-qwen2-tiny', 'qwen2-tiny'],
    ['lora-qwen2-tiny-rslora', 'qwen2-tiny'],
    ['lora-llama-tiny', 'llama-tiny'],
  ])('%s: loaded and saved again, it is the same file, and the same configuration', async (name, base) => {
    const folder = sharedPath(GOLDEN_MODELS, name);
    using model = await loadModel(sharedPath(GOLDEN_MODELS, base), { adapter: folder });
    await saveAdapter(model, root);
    expect(readFileSync(join(root, WEIGHTS)).equals(readFileSync(join(folder, WEIGHTS)))).toBe(true);
    const sorted = (config: Record<string, unknown>) => ({
      ...config,
      target_modules: [...(config.target_modules as string[])].sort(),
    });
    expect(sorted(readConfig(root))).toEqual(sorted(readConfig(folder)));
  });

  it('belong to one model: on another, the message names module and shapes', async () => {
    const adapter = sharedPath(GOLDEN_MODELS, 'lora-qwen2-tiny');
    await expectFailure(
      () => loadModel(sharedPath(GOLDEN_MODELS, 'llama-tiny'), { adapter }),
      /module "model\.layers\.0\.[a-z_.]+": expected lora_A \[r, \d+\] and lora_B \[\d+, r\], found .*; the adapter belongs to another model/,
    );
  });
});

const settings = [
  ['all seven linears', { r: 4, alpha: 8 }],
  ['rsLoRA on two', { r: 6, alpha: 12, rslora: true, targets: ['q_proj', 'v_proj'] }],
  ['full paths', { r: 1, alpha: 3, dropout: 0, targets: ['model.layers.1.mlp.down_proj', 'o_proj'] }],
] as const;

describe.each(fixtureNames)('adapters on %s', (name) => {
  it.each(settings)('%s: saved and loaded, the same bits and logits', async (_what, lora) => {
    const base = await makeModelFolder(join(root, 'base'), name);
    using model = await loadModel(base, { dtype: 'float64', lora });
    stir(model);
    await saveAdapter(model, join(root, 'adapter'), { dtype: 'float64' });
    using again = await loadModel(base, { dtype: 'float64', adapter: join(root, 'adapter') });
    expect(await adapterBits(again)).toEqual(await adapterBits(model));
    expect(again.lora!.modules).toEqual(model.lora!.modules);
    for (const ids of sequences) expect(logitsOf(again, ids)).toEqual(logitsOf(model, ids));
    expect(readConfig(join(root, 'adapter'))).toMatchObject({
      base_model_name_or_path: base,
      lora_alpha: lora.alpha,
      lora_dropout: 'dropout' in lora ? 0 : 0.05,
      peft_type: 'LORA',
      r: lora.r,
      task_type: 'CAUSAL_LM',
      use_rslora: 'rslora' in lora,
    });
  });

  it('float32 and bfloat16 files, beside a bfloat16 backbone', async () => {
    const base = await makeModelFolder(join(root, 'base'), name);
    using model = await loadModel(base, { dtype: 'bfloat16', lora: { r: 3 } });
    stir(model);
    await saveAdapter(model, join(root, 'wide'));
    await saveAdapter(model, join(root, 'narrow'), { dtype: 'bfloat16', baseModel: '../model' });
    const dtypesOf = async (folder: string): Promise<string[]> => {
      const { tensors } = await readSafetensorsHeader(join(root, folder, WEIGHTS));
      return [...new Set([...tensors.values()].map((t) => t.dtype))];
    };
    expect([await dtypesOf('wide'), await dtypesOf('narrow')]).toEqual([['F32'], ['BF16']]);
    expect(readConfig(join(root, 'narrow')).base_model_name_or_path).toBe('../model');
    using wide = await loadModel(base, { dtype: 'bfloat16', adapter: join(root, 'wide') });
    using narrow = await loadModel(base, { dtype: 'bfloat16', adapter: join(root, 'narrow') });
    expect(await adapterBits(wide)).toEqual(await adapterBits(model));
    // The product rounds adapters to bfloat16 in any case.
    for (const ids of sequences) expect(logitsOf(narrow, ids)).toEqual(logitsOf(model, ids));
  });

  it('merged, saved and loaded again without them: the logits of the adapters', async () => {
    const base = await makeModelFolder(join(root, 'base'), name);
    using model = await loadModel(base, { dtype: 'float64', lora: { r: 4 } });
    stir(model);
    const adapted = sequences.map((ids) => logitsOf(model, ids));
    mergeAdapters(model.backbone, model.adapters, model.lora!);
    await saveModel(model, join(root, 'merged'));
    using merged = await loadModel(join(root, 'merged'), { dtype: 'float64' });
    expect(merged.lora).toBeNull();
    expect(merged.backbone.has('lm_head.weight')).toBe(!merged.config.tieWordEmbeddings);
    sequences.forEach((ids, i) => {
      expect(maxDifference(logitsOf(merged, ids), adapted[i])).toBeLessThan(1e-12);
    });
  });
});

it('a model without adapters has none to save', async () => {
  using model = await loadModel(await makeModelFolder(join(root, 'base'), 'qwen2'));
  await expect(saveAdapter(model, join(root, 'adapter'))).rejects.toThrow('the model has no adapters to save');
});

/** Runs `f`, which has to fail with a KeelgradError of one line, and checks that memory is as it was. */
async function expectFailure(f: () => Promise<unknown>, message: RegExp): Promise<void> {
  const before = memory();
  const error = await f().then(
    () => undefined,
    (e: unknown) => e,
  );
  expect(error).toBeInstanceOf(KeelgradError);
  expect((error as Error).message).toMatch(message);
  expect((error as Error).message).not.toContain('\n');
  expect(memory()).toMatchObject({ storages: before.storages, allocated: before.allocated });
}

describe('a folder that is no adapter of the model', () => {
  const make = async (): Promise<{ base: string; adapter: string }> => {
    const base = await makeModelFolder(join(root, 'base'), 'llama');
    using model = await loadModel(base, { lora: { r: 2, targets: ['q_proj', 'v_proj'] } });
    await saveAdapter(model, join(root, 'adapter'));
    return { base, adapter: join(root, 'adapter') };
  };
  const rewrite = async (adapter: string, change: (tensors: TensorSource[]) => TensorSource[]): Promise<void> => {
    const path = join(adapter, WEIGHTS);
    const sources: TensorSource[] = [];
    for (const t of (await readSafetensorsHeader(path)).tensors.values()) {
      const bytes = await readTensorBytes(t);
      sources.push({ name: t.name, dtype: t.dtype, shape: t.shape, data: () => bytes });
    }
    await writeSafetensors(path, change(sources));
  };
  const configure = (adapter: string, change: Record<string, unknown>): void =>
    writeFileSync(join(adapter, CONFIG), JSON.stringify({ ...readConfig(adapter), ...change }));
  const first = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight';
  const swap = (change: (t: TensorSource) => TensorSource | null) => (tensors: TensorSource[]) =>
    tensors.flatMap((t) => (t.name === first ? (change(t) ?? []) : t));

  const wrong: readonly [string, (adapter: string) => unknown, RegExp][] = [
    ['no configuration', (a) => rmSync(join(a, CONFIG)), /adapter_config\.json: no such file/],
    ['no weights', (a) => rmSync(join(a, WEIGHTS)), /adapter_model\.safetensors: cannot be opened: no such file/],
    [
      'truncated weights',
      (a) => truncateSync(join(a, WEIGHTS), 2000),
      /tensor ".*": .* found 2000; the file is truncated/,
    ],
    [
      'a missing matrix',
      (a) =>
        rewrite(
          a,
          swap(() => null),
        ),
      /tensor "base_model.*q_proj\.lora_A\.weight" is missing/,
    ],
    [
      'a missing module',
      (a) => rewrite(a, (all) => all.filter((t) => !t.name.includes('layers.0.self_attn.q_proj'))),
      /adapter: tensor "base_model.*layers\.0\.self_attn\.q_proj\.lora_A\.weight" is missing; target_modules names its module/,
    ],
    [
      'an unknown module',
      (a) => rewrite(a, (all) => all.map((t) => ({ ...t, name: t.name.replace('v_proj', 'v_porj') }))),
      /module "model\.layers\.0\.self_attn\.v_porj" is not a linear of the model; did you mean "model\.layers\.0\.self_attn\.v_proj"\?/,
    ],
    [
      'a tensor that is no matrix of LoRA',
      (a) =>
        rewrite(
          a,
          swap((t) => ({ ...t, name: 'base_model.model.lm_head.weight' })),
        ),
      /tensor "base_model\.model\.lm_head\.weight" is no LoRA matrix of a module/,
    ],
    [
      'another rank than configured',
      (a) => configure(a, { r: 3 }),
      /lora_[AB]\.weight": expected shape \[.*\] by r of adapter_config\.json, found \[.*\]/,
    ],
    [
      'integer matrices behind good ones',
      (a) =>
        rewrite(a, (all) =>
          all.map((t) => (t.name.includes('layers.1.self_attn.v_proj.lora_B') ? { ...t, dtype: 'I32' } : t)),
        ),
      /tensor "base_model.*layers\.1\.self_attn\.v_proj\.lora_B\.weight": expected F32, F64, BF16 or F16 weights, found I32/,
    ],
    [
      'DoRA',
      (a) => configure(a, { use_dora: true }),
      /use_dora is true, which is not supported; plain LoRA and rsLoRA are/,
    ],
    ['another method', (a) => configure(a, { peft_type: 'IA3' }), /peft_type: expected "LORA", found "IA3"/],
    [
      'targets that the model does not have',
      (a) => configure(a, { target_modules: ['c_attn'] }),
      /adapter_config\.json: \["c_attn"\] matches no linear of the model; it has/,
    ],
  ];

  it.each(wrong)('%s', async (_what, spoil, message) => {
    const { base, adapter } = await make();
    await spoil(adapter);
    await expectFailure(() => loadModel(base, { adapter }), message);
  });

  it('of another model', async () => {
    const { adapter } = await make();
    const other = await makeModelFolder(join(root, 'other'), 'qwen2');
    const message =
      /module "model\.layers\.0\.self_attn\.q_proj": expected lora_A \[r, 36\] and lora_B \[36, r\], found \[2,24\] and \[40,2\]; the adapter belongs to another model/;
    await expectFailure(() => loadModel(other, { adapter }), message);
  });

  it('where there are adapters already', async () => {
    const { base, adapter } = await make();
    using model = await loadModel(base, { lora: { r: 2 } });
    await expectFailure(() => loadAdapter(model, adapter), /the model has adapters already/);
  });
});

describeWithPeers('PEFT', () => {
  it('loads our adapters, with the same logits', async () => {
    const jobs = [];
    const expected: Float64Array[][] = [];
    for (const name of fixtureNames)
      for (const [what, lora] of settings) {
        const folder = await makeModelFolder(join(root, name), name);
        using model = await loadModel(folder, { dtype: 'float64', lora });
        stir(model);
        const adapter = join(root, `${name} ${what}`);
        await saveAdapter(model, adapter, { dtype: 'float64' });
        expected.push(sequences.map((ids) => logitsOf(model, ids)));
        jobs.push({ folder, adapter, sequences });
      }
    const answers: number[][][] = await askPeers(['logits'], jobs);
    const worst = answers.map((logits, job) => Math.max(...logits.map((l, i) => maxDifference(l, expected[job][i]))));
    expect(Math.max(...worst)).toBeLessThan(1e-10);
  });

  it('makes adapters that we load, with the same logits', async () => {
    const options = [
      { r: 4, lora_alpha: 8, target_modules: 'all-linear' },
      { r: 3, lora_alpha: 5, use_rslora: true, target_modules: ['k_proj', 'up_proj'] },
      { r: 2, lora_alpha: 4, target_modules: '.*layers\\.1.*(q|v)_proj' },
    ];
    const made = [];
    for (const name of fixtureNames) {
      const folder = await makeModelFolder(join(root, name), name);
      for (const [i, each] of options.entries()) made.push({ folder, out: join(root, `${name}-${i}`), options: each });
    }
    await askPeers(['adapters'], made);
    const jobs = made.map(({ folder, out }) => ({ folder, adapter: out, sequences }));
    const answers: number[][][] = await askPeers(['logits'], jobs);
    for (const [job, { folder, adapter }] of jobs.entries()) {
      using model = await loadModel(folder, { dtype: 'float64', adapter });
      sequences.forEach((ids, i) => {
        expect(maxDifference(logitsOf(model, ids), answers[job][i])).toBeLessThan(1e-10);
      });
    }
  });
});
