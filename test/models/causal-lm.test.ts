// The model as a function: what it refuses, what it keeps, what it lets go of.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { loadModel } from '../../src/io/model-folder.js';
import { countParameters } from '../../src/models/parameters.js';
import { SegmentLayout } from '../../src/ops/segments.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { fixtureInputs, makeModelFolder } from '../fixtures/make.js';
import { idsTensor, logitsOf, lossAndGradients } from './support.js';

let root = '';
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'keelgrad-model-'));
});
afterEach(() => rmSync(root, { recursive: true, force: true }));

describe('input that the model cannot take', () => {
  it('a sequence longer than its positions', async () => {
    using model = await loadModel(await makeModelFolder(join(root, 'in'), 'qwen2'));
    const ids = Array.from({ length: 48 }, (_, i) => i);
    expect(logitsOf(model, ids).every(Number.isFinite)).toBe(true);
    const before = memory().storages;
    const message = "a sequence of 49 tokens is longer than the model's 48 positions; set a smaller max length";
    expect(() => logitsOf(model, [...ids, 1])).toThrow(message);
    expect(memory().storages).toBe(before);
  });

  it('a prompt and an answer that together are longer', async () => {
    using model = await loadModel(await makeModelFolder(join(root, 'in'), 'qwen2'));
    using layout = new SegmentLayout([{ length: 30 }, { length: 18, parent: 0 }, { length: 19, parent: 0 }]);
    const ids = Array.from({ length: 67 }, () => 1);
    expect(() => scope(() => model.hidden(model.parameters, idsTensor(ids), layout))).toThrow(
      'a sequence of 49 tokens',
    );
  });

  it('an id outside of the vocabulary, at the next read', async () => {
    using model = await loadModel(await makeModelFolder(join(root, 'in'), 'qwen2'));
    const before = memory().storages;
    expect(() => logitsOf(model, [1, 67])).toThrow(/\[gatherRows\].*67/s);
    logitsOf(model, [1, 66]);
    expect(memory().storages).toBeLessThanOrEqual(before + 1); // the rotary table
  });

  it('ids of another number than the layout has rows', async () => {
    using model = await loadModel(await makeModelFolder(join(root, 'in'), 'qwen2'));
    using layout = SegmentLayout.sequences([3]);
    const run = () => scope(() => model.hidden(model.parameters, idsTensor([1, 2]), layout));
    expect(run).toThrow('[hidden] expected 3 ids as in the layout, found 2');
  });
});

describe('what a model holds', () => {
  it('its weights, under their tag, stacked copies, and one rotary table; nothing more after a step, nothing after dispose', async () => {
    const before = memory();
    const model = await loadModel(await makeModelFolder(join(root, 'in'), 'llama'), { lora: { r: 2 } });
    // The a's of linears that read one input lie stacked beside their own tensors.
    const stacked = [...model.adapters].filter(([name]) => /(q|k|v|gate|up)_proj\.lora_A/.test(name));
    const stacks = 2 * model.config.layers;
    const bytes =
      4 * [model.backbone, model.adapters, new Map(stacked)].reduce((n, map) => n + countParameters(map), 0);
    expect(memory().byTag.weights - before.byTag.weights).toBe(bytes);
    lossAndGradients(model, fixtureInputs);
    const held = memory();
    expect(held.storages - before.storages).toBe(model.backbone.size + model.adapters.size + stacks + 1);
    expect(held.byTag.weights).toBe(before.byTag.weights + bytes);
    expect(held.byTag.activations).toBe(before.byTag.activations);
    for (let step = 0; step < 3; step++) lossAndGradients(model, fixtureInputs);
    expect(memory()).toMatchObject({ storages: held.storages, allocated: held.allocated });
    model.dispose();
    expect(memory()).toMatchObject({ storages: before.storages, allocated: before.allocated });
  });

  it('a rotary table that grows without changing what it held', async () => {
    using model = await loadModel(
      await makeModelFolder(join(root, 'in'), 'llama', { config: { max_position_embeddings: 256 } }),
    );
    const short = logitsOf(model, [3, 1, 4, 1, 5]);
    logitsOf(
      model,
      Array.from({ length: 200 }, (_, i) => i % 61),
    );
    expect(logitsOf(model, [3, 1, 4, 1, 5])).toEqual(short);
  });

  it('parameters that a caller may replace for one call', async () => {
    using model = await loadModel(await makeModelFolder(join(root, 'in'), 'qwen2'));
    const name = 'model.norm.weight';
    const logits = logitsOf(model, [1, 2, 3]);
    using twice = scope(() => model.backbone.get(name)!.mul(2));
    const doubled = logitsOf(model, [1, 2, 3], { backbone: new Map(model.backbone).set(name, twice), adapters: null });
    expect(doubled).toEqual(logits.map((x) => 2 * x));
    const lacking = new Map(model.backbone);
    lacking.delete(name);
    expect(() => logitsOf(model, [1], { backbone: lacking, adapters: null })).toThrow(
      `the model has no parameter ${name}`,
    );
  });
});
