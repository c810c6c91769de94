// Model folders: what is saved comes back bit for bit and loads in transformers; what is wrong is one clear message, and
// nothing stays allocated.
import {
  chmodSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { KeelgradError } from '../../src/errors.js';
import { loadModel, saveModel } from '../../src/io/model-folder.js';
import { openCheckpoint } from '../../src/io/safetensors.js';
import { type TensorSource, writeCheckpoint } from '../../src/io/safetensors-write.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import { LM_HEAD } from '../../src/models/parameters.js';
import { cast } from '../../src/ops/movement.js';
import { memory } from '../../src/tensor/storage.js';
import {
  type FixtureName,
  fixtureConfigs,
  fixtureInputs,
  fixtureNames,
  fixtureTensors,
  makeModelFolder,
} from '../fixtures/make.js';
import { askPeers, describeWithPeers } from '../models/peer.js';
import { bitsOf, GOLDEN_MODELS, logitsOf, maxDifference } from '../models/support.js';
import { describeWithShared, sharedPath } from '../shared.js';

let root = '';
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'keelgrad-folder-'));
});
afterEach(() => rmSync(root, { recursive: true, force: true }));

const dtypes = ['float32', 'float64', 'bfloat16'] as const;
type Dtype = (typeof dtypes)[number];
const fileDtype = { float32: 'F32', float64: 'F64', bfloat16: 'BF16' } as const;
const shardings = [
  ['a single file', undefined],
  ['shards', 9000],
] as const;
const { sequences } = fixtureInputs;

async function weightsOf(model: CausalLM, as: Dtype = model.dtype as Dtype): Promise<Record<string, string>> {
  const bits: Record<string, string> = {};
  for (const [name, t] of model.backbone) {
    const converted = cast(t, as);
    bits[name] = await bitsOf(converted);
    converted.dispose();
  }
  return bits;
}

describe.each(fixtureNames)('%s, saved and loaded', (name) => {
  it.each(dtypes.flatMap((dtype) => shardings.map(([how, maxShardBytes]) => [dtype, how, maxShardBytes] as const)))(
    '%s in %s: the same bits',
    async (dtype, _how, maxShardBytes) => {
      using model = await loadModel(await makeModelFolder(join(root, 'in'), name), { dtype });
      const out = join(root, 'out');
      await saveModel(model, out, { maxShardBytes });
      const { files, tensors, metadata } = await openCheckpoint(out);
      expect(files.length > 1).toBe(maxShardBytes !== undefined);
      expect(new Set([...tensors.values()].map((t) => t.dtype))).toEqual(new Set([fileDtype[dtype]]));
      expect(metadata).toEqual({ format: 'pt' });
      using again = await loadModel(out, { dtype });
      expect(await weightsOf(again)).toEqual(await weightsOf(model));
      expect(again.config.dtype).toBe(dtype);
      for (const ids of sequences) expect(logitsOf(again, ids)).toEqual(logitsOf(model, ids));
    },
  );

  it.each(dtypes)('float64 weights saved in %s are rounded once', async (dtype) => {
    using model = await loadModel(await makeModelFolder(join(root, 'in'), name), { dtype: 'float64' });
    for (const t of model.backbone.values()) t.write(t.dataSync().map((x, i) => x * (1 + i * 1e-9)) as Float64Array);
    await saveModel(model, join(root, 'out'), { dtype });
    using again = await loadModel(join(root, 'out'), { dtype });
    expect(await weightsOf(again)).toEqual(await weightsOf(model, dtype));
  });

  it('reads float16 files', async () => {
    using model = await loadModel(await makeModelFolder(join(root, 'in'), name));
    await saveModel(model, join(root, 'half'), { dtype: 'float16' });
    using half = await loadModel(join(root, 'half'));
    for (const [key, t] of half.backbone) {
      const exact = model.backbone.get(key)!.dataSync();
      const units = Array.from(t.dataSync(), (x, i) => Math.abs(x - exact[i]) / Math.max(Math.abs(exact[i]), 2 ** -14));
      expect(Math.max(...units)).toBeLessThanOrEqual(2 ** -11);
    }
  });
});

describe('what else a saved folder holds', () => {
  it('config.json as it was, but for its dtype', async () => {
    const folder = await makeModelFolder(join(root, 'in'), 'llama');
    using model = await loadModel(folder);
    await saveModel(model, join(root, 'out'), { dtype: 'bfloat16' });
    const before = readFileSync(join(folder, 'config.json'), 'utf8');
    const after = readFileSync(join(root, 'out', 'config.json'), 'utf8');
    expect(after).toBe(before.replace('"torch_dtype": "float32"', '"torch_dtype": "bfloat16"'));
  });

  it('tokenizer files of another folder, whose permissions do not travel, and nothing else of it', async () => {
    const from = await makeModelFolder(join(root, 'in'), 'qwen2');
    const kept = [
      'chat_template.jinja',
      'generation_config.json',
      'merges.txt',
      'special_tokens_map.json',
      'tokenizer.json',
      'tokenizer.model',
      'tokenizer_config.json',
      'vocab.json',
    ];
    for (const file of [...kept, 'README.md', 'optimizer.pt', 'pytorch_model.bin'])
      writeFileSync(join(from, file), file);
    chmodSync(join(from, 'tokenizer.json'), 0o444);
    using model = await loadModel(from);
    const out = join(root, 'a', 'out');
    for (let round = 0; round < 2; round++) await saveModel(model, out, { from });
    expect(readdirSync(out).sort()).toEqual([...kept, 'config.json', 'model.safetensors'].sort());
    for (const file of kept) expect(readFileSync(join(out, file), 'utf8')).toBe(file);
    await saveModel(model, from, { from });
    expect(readFileSync(join(from, 'tokenizer.json'), 'utf8')).toBe('tokenizer.json');
  });

  it('only the weight files of the last save', async () => {
    using model = await loadModel(await makeModelFolder(join(root, 'in'), 'qwen2'));
    const out = join(root, 'out');
    await saveModel(model, out, { maxShardBytes: 9000 });
    await saveModel(model, out);
    expect(readdirSync(out).sort()).toEqual(['config.json', 'model.safetensors']);
  });

  it('a backbone other than its own, under the same configuration', async () => {
    using model = await loadModel(await makeModelFolder(join(root, 'in'), 'qwen2'));
    using other = await loadModel(join(root, 'in'));
    for (const t of other.backbone.values()) t.write(t.dataSync().map((x) => 2 * x) as Float32Array);
    await saveModel(model, join(root, 'out'), { backbone: other.backbone });
    using again = await loadModel(join(root, 'out'));
    expect(await weightsOf(again)).toEqual(await weightsOf(other));
  });
});

describe('what a folder may hold besides', () => {
  const withExtra = async (name: FixtureName, extra: TensorSource[]): Promise<string> => {
    const folder = await makeModelFolder(join(root, 'in'), name);
    await writeCheckpoint(folder, [...fixtureTensors(fixtureConfigs[name]), ...extra]);
    return folder;
  };
  const zerosOf = (name: string, shape: number[]): TensorSource => ({
    name,
    dtype: 'F32',
    shape,
    data: () => new Uint8Array(4 * shape.reduce((n, m) => n * m, 1)),
  });

  it('a copy of the tied head, and rotary buffers of old files', async () => {
    const folder = await withExtra('qwen2', [
      zerosOf(LM_HEAD, [67, 36]),
      zerosOf('model.layers.0.self_attn.rotary_emb.inv_freq', [3]),
    ]);
    using model = await loadModel(folder);
    using plain = await loadModel(await makeModelFolder(join(root, 'plain'), 'qwen2'));
    expect(logitsOf(model, sequences[0])).toEqual(logitsOf(plain, sequences[0]));
  });
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

describe('a folder that is no model', () => {
  const rewrite = async (change: (tensors: TensorSource[]) => TensorSource[]): Promise<string> => {
    const folder = await makeModelFolder(join(root, 'in'), 'llama');
    await writeCheckpoint(folder, change(fixtureTensors(fixtureConfigs.llama)));
    return folder;
  };
  const replace = (name: string, change: (t: TensorSource) => TensorSource) => (tensors: TensorSource[]) =>
    tensors.map((t) => (t.name === name ? change(t) : t));

  const wrong: readonly [string, () => Promise<string>, RegExp][] = [
    [
      'no folder',
      async () => join(root, 'absent'),
      /absent\/config\.json: no such file; expected a Hugging Face model folder/,
    ],
    [
      'no weights',
      async () => {
        const folder = await makeModelFolder(join(root, 'in'), 'llama');
        rmSync(join(folder, 'model.safetensors'));
        return folder;
      },
      /in: expected model\.safetensors or model\.safetensors\.index\.json, found neither/,
    ],
    [
      'a missing tensor',
      () => rewrite((all) => all.filter((t) => t.name !== 'model.layers.1.mlp.up_proj.bias')),
      /in: tensor "model\.layers\.1\.mlp\.up_proj\.bias" is missing; expected shape \[35\] by config\.json/,
    ],
    [
      'a missing head of an untied model',
      () => rewrite((all) => all.filter((t) => t.name !== LM_HEAD)),
      /tensor "lm_head\.weight" is missing; expected shape \[61,24\]/,
    ],
    [
      'an unknown tensor',
      () => rewrite(replace('model.norm.weight', (t) => ({ ...t, name: 'model.nrom.weight' }))),
      /in: tensor "model\.nrom\.weight" is unknown to this architecture; did you mean "model\.norm\.weight"\?/,
    ],
    [
      'more layers than configured',
      () =>
        makeModelFolder(join(root, 'in'), 'llama').then((folder) => {
          writeFileSync(join(folder, 'config.json'), JSON.stringify({ ...fixtureConfigs.llama, num_hidden_layers: 1 }));
          return folder;
        }),
      /tensor "model\.layers\.1\.[a-z_.]+" is unknown to this architecture/,
    ],
    [
      'a tensor of another shape',
      () => rewrite(replace('model.layers.0.self_attn.k_proj.weight', (t) => ({ ...t, shape: [24, 20] }))),
      /model\.safetensors: tensor "model\.layers\.0\.self_attn\.k_proj\.weight": expected shape \[20,24\] by config\.json, found \[24,20\]/,
    ],
    [
      'integer weights behind good ones',
      () => rewrite(replace('model.norm.weight', (t) => ({ ...t, dtype: 'I8', data: () => new Uint8Array(24) }))),
      /tensor "model\.norm\.weight": expected F32, F64, BF16 or F16 weights, found I8; convert the model first/,
    ],
    [
      'a missing shard',
      async () => {
        const folder = await makeModelFolder(join(root, 'in'), 'llama', { maxShardBytes: 9000 });
        rmSync(join(folder, readdirSync(folder).filter((file) => /-of-/.test(file))[1]));
        return folder;
      },
      /in: 1 of \d shards missing: model-00002-of-0000\d\.safetensors/,
    ],
    [
      'a truncated file',
      async () => {
        const folder = await makeModelFolder(join(root, 'in'), 'llama');
        truncateSync(join(folder, 'model.safetensors'), 20_000);
        return folder;
      },
      /model\.safetensors: tensor ".*": data_offsets .* need a file of \d+ bytes, found 20000; the file is truncated, fetch it again/,
    ],
    [
      'an unknown architecture',
      () =>
        makeModelFolder(join(root, 'in'), 'llama', { config: {} }).then((folder) => {
          writeFileSync(
            join(folder, 'config.json'),
            JSON.stringify({ ...fixtureConfigs.llama, architectures: ['GPT2LMHeadModel'], model_type: 'gpt2' }),
          );
          return folder;
        }),
      /config\.json: unknown architecture: architectures is \["GPT2LMHeadModel"\]; supported: LlamaForCausalLM, Qwen2ForCausalLM/,
    ],
  ];

  it.each(wrong)('%s', async (_what, make, message) => {
    const folder = await make();
    await expectFailure(() => loadModel(folder), message);
  });

  it('new adapters and an adapter at once', async () => {
    const folder = await makeModelFolder(join(root, 'in'), 'llama');
    await expectFailure(() => loadModel(folder, { lora: {}, adapter: folder }), /expected lora or adapter, found both/);
  });

  it('a path of a file', async () => {
    writeFileSync(join(root, 'file'), '');
    await expectFailure(() => loadModel(join(root, 'file')), /file\/config\.json: cannot be read/);
  });
});

describe('saving where nothing can be written', () => {
  it('names the place and leaves the old files', async () => {
    using model = await loadModel(await makeModelFolder(join(root, 'in'), 'qwen2'));
    const out = join(root, 'out');
    mkdirSync(join(out, '.model.safetensors.new'), { recursive: true });
    writeFileSync(join(out, 'config.json'), 'old');
    await expectFailure(() => saveModel(model, out), /out\/\.model\.safetensors\.new: cannot be written/);
    expect(readFileSync(join(out, 'config.json'), 'utf8')).toBe('old');
  });
});

describeWithShared('golden folders, saved again', GOLDEN_MODELS, () => {
  it.each(['qwen2-tiny', 'llama-tiny', 'llama-tiny-bf16'])('%s: the same weights and configuration', async (name) => {
    const folder = sharedPath(GOLDEN_MODELS, name);
    const dtype = name.endsWith('bf16') ? 'bfloat16' : 'float32';
    using model = await loadModel(folder, { dtype });
    await saveModel(model, root, { from: folder });
    using again = await loadModel(root, { dtype });
    expect(await weightsOf(again)).toEqual(await weightsOf(model));
    expect(readFileSync(join(root, 'config.json'), 'utf8')).toBe(readFileSync(join(folder, 'config.json'), 'utf8'));
  });
});

describeWithPeers('transformers', () => {
  it('loads what is saved, with the same logits', async () => {
    const jobs = [];
    const expected: Float64Array[][] = [];
    for (const name of fixtureNames)
      for (const [how, maxShardBytes] of shardings)
        for (const dtype of dtypes) {
          const folder = join(root, `${name} ${how} ${dtype}`);
          using model = await loadModel(await makeModelFolder(join(root, 'in'), name));
          await saveModel(model, folder, { dtype, maxShardBytes });
          using saved = await loadModel(folder, { dtype: 'float64' });
          expected.push(sequences.map((ids) => logitsOf(saved, ids)));
          jobs.push({ folder, adapter: null, sequences });
        }
    const answers: number[][][] = await askPeers(['logits'], jobs);
    const worst = answers.map((logits, job) => Math.max(...logits.map((l, i) => maxDifference(l, expected[job][i]))));
    expect(worst.length).toBe(12);
    expect(Math.max(...worst)).toBeLessThan(1e-10);
  });
});
