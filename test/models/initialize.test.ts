// Fresh weights: the rule of transformers, from a seed.
import { afterEach, describe, expect, it } from 'vitest';
import type { CausalLM } from '../../src/models/causal-lm.js';
import { parseModelConfig } from '../../src/models/config.js';
import { createModel } from '../../src/models/initialize.js';
import { parameterShapes } from '../../src/models/parameters.js';
import { fixtureConfigs } from '../fixtures/make.js';

const models: CausalLM[] = [];
const make = (seed: number, dtype?: 'float32' | 'float64'): CausalLM => {
  const config = parseModelConfig({ ...fixtureConfigs.qwen2, hidden_size: 96, initializer_range: 0.05 });
  const model = createModel(config, { seed, dtype });
  models.push(model);
  return model;
};
afterEach(() => {
  for (const model of models.splice(0)) model.dispose();
});

describe('createModel', () => {
  it('makes every parameter of the configuration, in its shape and dtype', () => {
    const model = make(1, 'float64');
    const shapes = [...model.backbone].map(([name, t]) => [name, t.shape]);
    expect(shapes).toEqual([...parameterShapes(model.config)]);
    expect([...model.backbone.values()].every((t) => t.dtype === 'float64')).toBe(true);
  });

  it('draws matrices from a normal distribution, starts norms at 1 and biases at 0', async () => {
    const model = make(1);
    for (const [name, t] of model.backbone) {
      const values = Array.from(await t.data());
      if (name.endsWith('.bias')) expect(values.every((v) => v === 0)).toBe(true);
      else if (t.ndim === 1) expect(values.every((v) => v === 1)).toBe(true);
      else {
        const n = values.length;
        const mean = values.reduce((a, b) => a + b, 0) / n;
        const deviation = Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / n);
        // Five standard errors of either estimate.
        expect(Math.abs(mean)).toBeLessThan((5 * 0.05) / Math.sqrt(n));
        expect(Math.abs(deviation - 0.05)).toBeLessThan((5 * 0.05) / Math.sqrt(2 * n));
      }
    }
  });

  it('is a function of the seed, and no two matrices are alike', async () => {
    const [a, b, other] = [make(1), make(1), make(2)];
    const read = (model: CausalLM, name: string) => model.backbone.get(name)!.data();
    const [q, k] = ['q_proj', 'o_proj'].map((name) => `model.layers.0.self_attn.${name}.weight`);
    expect(await read(a, q)).toEqual(await read(b, q));
    expect(await read(a, q)).not.toEqual(await read(other, q));
    expect(await read(a, q)).not.toEqual(await read(a, k));
    expect((await read(a, q)).slice(0, 8)).not.toEqual((await read(a, k)).slice(0, 8));
  });
});
