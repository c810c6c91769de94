// The tiny models of the golden folder: logits, log-probabilities, hidden states, loss, every gradient, greedy paths.
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { loadModel } from '../../src/io/model-folder.js';
import { CausalLM } from '../../src/models/causal-lm.js';
import { EMBEDDING, FINAL_NORM } from '../../src/models/parameters.js';
import { gatherRows } from '../../src/ops/movement.js';
import { SegmentLayout } from '../../src/ops/segments.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { describeWithShared, readSharedJson, sharedPath } from '../shared.js';
import {
  argmaxRows,
  type Golden,
  idsTensor,
  jointNorm,
  logitsOf,
  logSoftmaxRows,
  lossAndGradients,
  GOLDEN_MODELS as MODELS,
  maxAbs,
  maxDifference,
  type Recorded,
  readGolden,
  scoreSequence,
} from './support.js';

const cases = [
  { name: 'qwen2-tiny', base: 'qwen2-tiny' },
  { name: 'llama-tiny', base: 'llama-tiny' },
  { name: 'llama-tiny-bf16', base: 'llama-tiny-bf16' },
  { name: 'lora-qwen2-tiny', base: 'qwen2-tiny' },
  { name: 'lora-qwen2-tiny-rslora', base: 'qwen2-tiny' },
  { name: 'lora-llama-tiny', base: 'llama-tiny' },
];

interface Tolerance {
  readonly logits: number;
  readonly logProbs: number;
  /** Of a gradient's entries, given what is expected. */
  readonly gradient: (expected: Float64Array) => number;
  /** Relative: of the loss and of the joint norm. */
  readonly norm: number;
}

/** What the golden folder's README justifies. */
const tolerances: Readonly<Record<'float32' | 'float64', Tolerance>> = {
  float64: { logits: 1e-10, logProbs: 1e-10, gradient: () => 1e-9, norm: 1e-10 },
  float32: { logits: 1e-4, logProbs: 1e-4, gradient: (expected) => 5e-5 * maxAbs(expected), norm: 1e-5 },
};

const load = ({ name, base }: { name: string; base: string }, dtype: 'float32' | 'float64' | 'bfloat16') =>
  loadModel(sharedPath(MODELS, base), { dtype, adapter: name === base ? undefined : sharedPath(MODELS, name) });

function expectForward(model: CausalLM, golden: Golden, tolerance: Tolerance): void {
  golden.inputs.sequences.forEach((ids, i) => {
    expect(maxDifference(logitsOf(model, ids), golden.tensors.get(`logits.${i}`)!.values)).toBeLessThan(
      tolerance.logits,
    );
    if (ids.length === 1) return;
    const expected = golden.tensors.get(`logprobs.${i}`)!.values;
    expect(maxDifference(scoreSequence(model, ids).logProbs, expected)).toBeLessThan(tolerance.logProbs);
  });
}

function expectGradients(model: CausalLM, golden: Golden, tolerance: Tolerance): void {
  const { loss, gradients } = lossAndGradients(model, golden.inputs);
  expect(Math.abs(loss / golden.expected.loss - 1)).toBeLessThan(tolerance.norm);
  const names = [...golden.tensors.keys()].filter((name) => name.startsWith('grad.'));
  expect(names.length).toBe(gradients.size);
  for (const [name, found] of gradients) {
    const expected = golden.tensors.get(`grad.${name}`)!.values;
    expect(maxDifference(found, expected), name).toBeLessThanOrEqual(tolerance.gradient(expected));
  }
  expect(Math.abs(jointNorm(gradients.values()) / golden.expected.grad_norm - 1)).toBeLessThan(tolerance.norm);
}

/** Greedy decoding is right when every recorded id is the likeliest after those before it. */
function expectGreedy(model: CausalLM, golden: Golden, tolerance: number): void {
  golden.inputs.greedy_prompts.forEach((prompt, i) => {
    const path = golden.expected.greedy[i];
    const { logProbs, argmax } = scoreSequence(model, [...prompt, ...path.ids], prompt.length);
    expect(argmax).toEqual(path.ids);
    expect(maxDifference(logProbs, path.logprobs)).toBeLessThan(tolerance);
  });
}

for (const entry of cases)
  describeWithShared(entry.name, `${MODELS}/${entry.name}`, () => {
    it.each(['float64', 'float32'] as const)('forward, gradients and greedy paths in %s', async (dtype) => {
      const golden = await readGolden(entry.name);
      const before = memory().storages;
      {
        using model = await load(entry, dtype);
        expectForward(model, golden, tolerances[dtype]);
        expectGradients(model, golden, tolerances[dtype]);
        expectGreedy(model, golden, tolerances[dtype].logProbs);
      }
      expect(memory().storages).toBe(before);
    });
  });

/** x / sqrt(mean(x²) + eps) · weight over rows, on the host. */
function normedRows(x: Recorded, weight: ArrayLike<number>, eps: number): Float64Array {
  const width = weight.length;
  return x.values.map((_, at) => {
    const start = at - (at % width);
    const row = x.values.subarray(start, start + width);
    const square = row.reduce((sum, v) => sum + v * v, 0) / width;
    return (x.values[at] / Math.sqrt(square + eps)) * weight[at - start];
  });
}

describeWithShared('hidden states of the golden models', MODELS, () => {
  it.each(['qwen2-tiny', 'llama-tiny', 'llama-tiny-bf16'])(
    '%s: embeddings, after each layer, after the final norm',
    async (name) => {
      const { inputs, tensors } = await readGolden(name);
      using model = await load({ name, base: name }, 'float64');
      const ids = inputs.sequences[0];
      using layout = SegmentLayout.sequences([ids.length]);
      const hidden = (m: CausalLM): Float64Array =>
        scope(() => m.hidden(m.parameters, idsTensor(ids), layout).dataSync() as Float64Array);
      const embeddings = scope(() => gatherRows(model.backbone.get(EMBEDDING)!, idsTensor(ids)).dataSync());
      expect(maxDifference(embeddings, tensors.get('hidden.embeddings')!.values)).toBe(0);
      expect(maxDifference(hidden(model), tensors.get('hidden.final_norm')!.values)).toBeLessThan(1e-10);
      const norm = model.backbone.get(FINAL_NORM)!.dataSync();
      for (let layer = 0; layer < model.config.layers; layer++) {
        // The first layers alone: their output goes through the same final norm.
        const first = new CausalLM({ ...model.config, layers: layer + 1 }, model.backbone);
        const expected = normedRows(tensors.get(`hidden.layer.${layer}`)!, norm, model.config.rmsNormEps);
        expect(maxDifference(hidden(first), expected), `layer ${layer}`).toBeLessThan(1e-10);
      }
    },
  );
});

describeWithShared('configurations in the layout of transformers 5', MODELS, () => {
  it.each(['qwen2-tiny', 'llama-tiny'])('%s is the same model', async (name) => {
    const folder = await mkdtemp(join(tmpdir(), 'keelgrad-'));
    try {
      await cp(sharedPath(MODELS, name), folder, { recursive: true });
      await cp(join(folder, 'config.v5.json'), join(folder, 'config.json'));
      using old = await load({ name, base: name }, 'float32');
      using model = await loadModel(folder);
      for (const ids of readSharedJson(MODELS, name, 'inputs.json').sequences)
        expect(logitsOf(model, ids)).toEqual(logitsOf(old, ids));
    } finally {
      await rm(folder, { recursive: true });
    }
  });

  it('llama3 rotary scaling is no ornament', async () => {
    const { inputs, tensors } = await readGolden('llama-tiny');
    const folder = await mkdtemp(join(tmpdir(), 'keelgrad-'));
    try {
      await cp(sharedPath(MODELS, 'llama-tiny'), folder, { recursive: true });
      const config = JSON.parse(await readFile(join(folder, 'config.json'), 'utf8'));
      await writeFile(join(folder, 'config.json'), JSON.stringify({ ...config, rope_scaling: null }));
      using model = await loadModel(folder, { dtype: 'float64' });
      const moved = inputs.sequences.map((ids, i) =>
        maxDifference(logitsOf(model, ids), tensors.get(`logits.${i}`)!.values),
      );
      expect(Math.max(...moved)).toBeGreaterThan(1);
    } finally {
      await rm(folder, { recursive: true });
    }
  });
});

describeWithShared('llama-tiny-bf16 in bfloat16', `${MODELS}/llama-tiny-bf16`, () => {
  const name = 'llama-tiny-bf16';

  it('is no farther from float64 than twice what transformers is', async () => {
    const { inputs, expected, tensors } = await readGolden(name);
    const limits = expected.deviation_of_bfloat16;
    using model = await load({ name, base: name }, 'bfloat16');
    const width = model.config.vocabSize;
    let [worst, squares, count, same, rows] = [0, 0, 0, 0, 0];
    inputs.sequences.forEach((ids, i) => {
      const reference = tensors.get(`logits.${i}`)!.values;
      const logits = logitsOf(model, ids);
      worst = Math.max(worst, maxDifference(logits, reference));
      logits.forEach((x, at) => {
        squares += (x - reference[at]) ** 2;
      });
      count += logits.length;
      const likeliest = argmaxRows(reference, width);
      same += argmaxRows(logits, width).filter((id, row) => id === likeliest[row]).length;
      rows += ids.length;
      const logProbs = ids.length > 1 ? scoreSequence(model, ids).logProbs : new Float64Array();
      const wanted = tensors.get(`logprobs.${i}`)?.values ?? logProbs;
      expect(maxDifference(logProbs, wanted)).toBeLessThan(2 * limits.logprobs_max_abs);
    });
    expect(worst).toBeLessThan(2 * limits.logits_max_abs);
    expect(Math.sqrt(squares / count)).toBeLessThan(2 * limits.logits_rms);
    expect(same / rows).toBeGreaterThan(1 - 2 * (1 - limits.argmax_agreement));
  });

  it('has gradients within the same rule', async () => {
    const { inputs, expected, tensors } = await readGolden(name);
    const limits = expected.deviation_of_bfloat16;
    using model = await load({ name, base: name }, 'bfloat16');
    const { gradients } = lossAndGradients(model, inputs);
    for (const [parameter, found] of gradients) {
      const wanted = tensors.get(`grad.${parameter}`)!.values;
      const limit = 2 * limits.grad_max_rel_to_tensor_max * maxAbs(wanted);
      expect(maxDifference(found, wanted), parameter).toBeLessThan(limit);
    }
    expect(Math.abs(jointNorm(gradients.values()) / expected.grad_norm - 1)).toBeLessThan(0.01);
  });
});

describe('log-softmax of the tests themselves', () => {
  it('sums to one in every row', () => {
    const rows = logSoftmaxRows(Float64Array.of(1, 2, 3, -1000, 0, 1000), 3);
    expect(rows.subarray(0, 3).reduce((sum, x) => sum + Math.exp(x), 0)).toBeCloseTo(1, 14);
    expect(rows[5]).toBe(0);
  });
});
