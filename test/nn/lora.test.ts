// Adapters: how they start, what merging does to weights and logits, dropout, and PEFT's recorded merges.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { addLora, type LoraOptions, loadModel } from '../../src/io/model-folder.js';
import { adapterKey } from '../../src/io/peft.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import { linearModules, type ParameterMap } from '../../src/models/parameters.js';
import { mergeAdapters, scaleOf } from '../../src/nn/lora.js';
import { memory } from '../../src/tensor/storage.js';
import type { Tensor } from '../../src/tensor/tensor.js';
import { type FixtureName, fixtureInputs, fixtureNames, makeModelFolder } from '../fixtures/make.js';
import {
  bitsOf,
  GOLDEN_MODELS,
  jointNorm,
  logitsOf,
  lossAndGradients,
  maxAbs,
  maxDifference,
  readGolden,
} from '../models/support.js';
import { describeWithShared, sharedPath } from '../shared.js';

let root = '';
beforeAll(async () => {
  root = mkdtempSync(join(tmpdir(), 'keelgrad-lora-'));
  for (const name of fixtureNames) await makeModelFolder(join(root, name), name);
});
afterAll(() => rmSync(root, { recursive: true }));

const load = (name: FixtureName, dtype: 'float32' | 'float64' | 'bfloat16', lora?: LoraOptions): Promise<CausalLM> =>
  loadModel(join(root, name), { dtype, lora });

/** Gives B values, so that the adapters do something. */
function stir(model: CausalLM, size = 0.2): void {
  for (const [key, t] of model.adapters)
    if (key.includes('lora_B'))
      t.write(Float64Array.from({ length: t.size }, (_, i) => size * Math.sin(i * 1.7 + key.length)));
}

const bitsOfAll = async (map: ParameterMap): Promise<string[]> => Promise.all([...map.values()].map(bitsOf));
const { sequences } = fixtureInputs;

describe('fresh adapters', () => {
  it('have PEFT names and shapes, A within ±1/√in and spread over it, B zero', async () => {
    using model = await load('llama', 'float32', { r: 6 });
    const shapes = linearModules(model.config);
    expect([...model.adapters.keys()]).toEqual(
      [...shapes.keys()].flatMap((m) => [adapterKey(m, 'A'), adapterKey(m, 'B')]),
    );
    for (const [module, [out, width]] of shapes) {
      const [a, b] = (['A', 'B'] as const).map((m) => model.adapters.get(adapterKey(module, m))!);
      expect([a.shape, b.shape]).toEqual([
        [6, width],
        [out, 6],
      ]);
      const values = [...a.dataSync()];
      const scaled = values.map((x) => x * Math.sqrt(width));
      expect(maxAbs(scaled)).toBeLessThanOrEqual(1 + 1e-6);
      expect(maxAbs(scaled)).toBeGreaterThan(0.9);
      expect(Math.abs(scaled.reduce((s, x) => s + x, 0) / scaled.length)).toBeLessThan(
        4 / Math.sqrt(3 * scaled.length),
      );
      expect(maxAbs(b.dataSync())).toBe(0);
    }
  });

  it('are a pure function of the seed, and no two modules start alike', async () => {
    using first = await load('qwen2', 'float32', { seed: 7 });
    using again = await load('qwen2', 'float32', { seed: 7 });
    using other = await load('qwen2', 'float32', { seed: 8 });
    const bits = await bitsOfAll(first.adapters);
    expect(await bitsOfAll(again.adapters)).toEqual(bits);
    const seconds = await bitsOfAll(other.adapters);
    const isA = [...first.adapters.keys()].map((key) => key.includes('lora_A'));
    expect(bits.map((b, i) => b === seconds[i])).toEqual(isA.map((a) => !a));
    const firstValues = [...first.adapters.values()].filter((_, i) => isA[i]).map((t) => t.dataSync()[0]);
    expect(new Set(firstValues.map((x) => x / 2)).size).toBe(firstValues.length);
  });

  it('are float32 beside bfloat16, and their gradients too', async () => {
    using model = await load('qwen2', 'bfloat16', { r: 4 });
    expect(new Set([...model.adapters.values()].map((t) => t.dtype))).toEqual(new Set(['float32']));
    using exact = await load('qwen2', 'float64', { r: 4 });
    for (const m of [model, exact]) stir(m, 0.05);
    const found = lossAndGradients(model, fixtureInputs);
    const wanted = lossAndGradients(exact, fixtureInputs);
    expect(Math.abs(found.loss / wanted.loss - 1)).toBeLessThan(0.02);
    for (const key of model.adapters.keys()) {
      const [f, w] = [found.gradients.get(key)!, wanted.gradients.get(key)!];
      expect(jointNorm([f.map((x, i) => x - w[i])]) / jointNorm([w]), key).toBeLessThan(0.1);
    }
  });

  it('sit on the chosen modules only', async () => {
    using model = await load('llama', 'float32', { targets: ['v_proj', 'model.layers.1.mlp.up_proj'] });
    expect(model.lora!.modules).toEqual([
      'model.layers.0.self_attn.v_proj',
      'model.layers.1.self_attn.v_proj',
      'model.layers.1.mlp.up_proj',
    ]);
    expect(model.adapters.size).toBe(6);
  });

  it.each([
    [{ r: 0 }, 'lora r: expected a positive integer, found 0'],
    [{ r: 2.5 }, 'lora r: expected a positive integer, found 2.5'],
    [{ alpha: Number.NaN }, 'lora alpha: expected a positive number, found NaN'],
    [{ dropout: 1 }, 'lora dropout: expected a number from 0 to below 1, found 1'],
    [{ targets: ['q_prj'] }, 'lora targets: "q_prj" matches no linear of the model; did you mean "q_proj"?'],
    [{ targets: [] }, 'lora targets: [] matches no linear of the model'],
  ] as const)('refuse %j, and leave nothing behind', async (lora, message) => {
    const before = memory();
    await expect(load('qwen2', 'float32', lora)).rejects.toThrow(message);
    expect(memory()).toMatchObject({ storages: before.storages, allocated: before.allocated });
  });

  it('are put on once', async () => {
    using model = await load('qwen2', 'float32', {});
    expect(() => addLora(model)).toThrow('the model has adapters already');
  });
});

describe('merging', () => {
  it.each(fixtureNames.flatMap((name) => [false, true].map((rslora) => [name, rslora] as const)))(
    '%s, rsLoRA %s: merged weights give the logits of the adapters, and come back',
    async (name, rslora) => {
      using model = await load(name, 'float64', { r: 5, alpha: 8, rslora, targets: ['q_proj', 'o_proj', 'down_proj'] });
      expect(scaleOf(model.lora!)).toBe(8 / (rslora ? Math.sqrt(5) : 5));
      stir(model);
      const base = { backbone: model.backbone, adapters: null };
      const original = new Map([...model.backbone].map(([key, t]) => [key, t.dataSync()]));
      const adapted = sequences.map((ids) => logitsOf(model, ids));
      expect(maxDifference(adapted[0], logitsOf(model, sequences[0], base))).toBeGreaterThan(0.1);
      mergeAdapters(model.backbone, model.adapters, model.lora!);
      const merged = sequences.map((ids) => logitsOf(model, ids, base));
      expect(Math.max(...merged.map((logits, i) => maxDifference(logits, adapted[i])))).toBeLessThan(1e-12);
      mergeAdapters(model.backbone, model.adapters, model.lora!, -1);
      for (const [key, t] of model.backbone)
        expect(maxDifference(t.dataSync(), original.get(key)!)).toBeLessThan(1e-15);
    },
  );

  it('rounds a bfloat16 weight once', async () => {
    using model = await load('qwen2', 'bfloat16', { r: 3, targets: ['k_proj'] });
    using exact = await load('qwen2', 'float64', { r: 3, targets: ['k_proj'] });
    stir(model);
    exact.adapters.forEach((t, key) => {
      t.write(model.adapters.get(key)!.dataSync());
    });
    exact.backbone.forEach((t, key) => {
      t.write(model.backbone.get(key)!.dataSync());
    });
    mergeAdapters(model.backbone, model.adapters, model.lora!);
    mergeAdapters(exact.backbone, exact.adapters, exact.lora!);
    const found = model.backbone.get('model.layers.0.self_attn.k_proj.weight')!.dataSync();
    const wanted = exact.backbone.get('model.layers.0.self_attn.k_proj.weight')!.dataSync();
    // Half a unit in the last of eight bits, and float32's own rounding where the sum lies halfway.
    const units = Array.from(found, (x, i) => Math.abs(x - wanted[i]) / (Math.abs(wanted[i]) * 2 ** -8));
    expect(Math.max(...units)).toBeLessThanOrEqual(1 + 1e-4);
  });
});

describeWithShared('merging what PEFT has recorded', GOLDEN_MODELS, () => {
  it.each([
    ['lora-qwen2-tiny', 'qwen2-tiny'],
    ['lora-qwen2-tiny-rslora', 'qwen2-tiny'],
    ['lora-llama-tiny', 'llama-tiny'],
  ])('%s: scaling, merged weights, merged logits', async (name, base) => {
    const { inputs, expected, tensors } = await readGolden(name);
    const options = { dtype: 'float64', adapter: sharedPath(GOLDEN_MODELS, name) } as const;
    using model = await loadModel(sharedPath(GOLDEN_MODELS, base), options);
    expect(scaleOf(model.lora!)).toBeCloseTo(expected.scaling, 14);
    mergeAdapters(model.backbone, model.adapters, model.lora!);
    const merged = [...tensors.keys()].filter((key) => key.startsWith('merged.'));
    expect(merged.length).toBe(3);
    for (const key of merged) {
      const weight = model.backbone.get(key.slice('merged.'.length))!;
      expect(maxDifference(weight.dataSync(), tensors.get(key)!.values), key).toBeLessThan(1e-14);
    }
    inputs.sequences.forEach((ids, i) => {
      const logits = logitsOf(model, ids, { backbone: model.backbone, adapters: null });
      expect(maxDifference(logits, tensors.get(`merged_logits.${i}`)!.values)).toBeLessThan(1e-10);
    });
  });
});

describe('dropout of adapters', () => {
  const loss = (model: CausalLM, rate: number, seed: number): number =>
    lossAndGradients(model, fixtureInputs, { dropout: { rate, seed } }).loss;

  it('is drawn from its seed, is off at rate 0, and touches the adapters only', async () => {
    using model = await load('qwen2', 'float64', { r: 4 });
    const base = lossAndGradients(model, fixtureInputs).loss;
    expect(loss(model, 0.5, 1)).toBe(base);
    stir(model);
    const plain = lossAndGradients(model, fixtureInputs).loss;
    expect(loss(model, 0, 1)).toBe(plain);
    expect(loss(model, 0.5, 1)).not.toBe(plain);
    expect(loss(model, 0.5, 1)).toBe(loss(model, 0.5, 1));
    expect(loss(model, 0.5, 1)).not.toBe(loss(model, 0.5, 2));
  });

  it('keeps the mean of what the adapters add', async () => {
    using model = await load('llama', 'float64', { r: 4, targets: ['down_proj'] });
    stir(model, 1e-3);
    const base = lossAndGradients(model, fixtureInputs, { dropout: { rate: 0, seed: 0 } }).loss;
    const draws = Array.from({ length: 60 }, (_, seed) => loss(model, 0.3, seed));
    const mean = draws.reduce((s, x) => s + x, 0) / draws.length;
    const deviation = Math.sqrt(draws.reduce((s, x) => s + (x - mean) ** 2, 0) / draws.length);
    expect(deviation).toBeGreaterThan(0);
    expect(Math.abs(mean - base)).toBeLessThan((4 * deviation) / Math.sqrt(draws.length));
  });

  it('has the gradient of the masked function', async () => {
    using model = await load('qwen2', 'float64', { r: 4 });
    stir(model);
    const options = { dropout: { rate: 0.4, seed: 9 } };
    const { gradients } = lossAndGradients(model, fixtureInputs, options);
    const moved = (step: number): number => {
      const shift = (sign: number): void =>
        model.adapters.forEach((t: Tensor, key) => {
          const g = gradients.get(key)!;
          t.write(t.dataSync().map((x, i) => x + sign * step * g[i]) as Float64Array);
        });
      shift(1);
      const { loss: value } = lossAndGradients(model, fixtureInputs, options);
      shift(-1);
      return value;
    };
    const square = [...model.adapters.keys()].reduce((s, key) => gradients.get(key)!.reduce((t, x) => t + x * x, s), 0);
    const step = 1e-7 / Math.sqrt(square);
    expect((moved(step) - moved(-step)) / (2 * step) / square).toBeCloseTo(1, 8);
  });
});
