// A token's value depends on the tokens it may see and on nothing else: not on its neighbours on the packed axis, their
// number or order, nor on whether its prompt is shared. Values bit for bit, gradients up to the order of sums.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { valueAndGrad } from '../../src/autograd/transforms.js';
import {
  type PackedBatch,
  type PairIds,
  packPairs,
  packSequences,
  sequenceOf,
  uploadBatch,
} from '../../src/data/packing.js';
import { addLora, loadModel } from '../../src/io/model-folder.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import type { ModelParameters } from '../../src/models/parameters.js';
import { runtimeInfo, setThreads } from '../../src/native/info.js';
import { sequenceLogProbs } from '../../src/objectives/logprobs.js';
import { accumulationDType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import type { Tensor } from '../../src/tensor/tensor.js';
import { type FixtureName, fixtureNames, makeModelFolder } from '../fixtures/make.js';
import { maxAbs, maxDifference } from './support.js';

let root = '';
beforeAll(async () => {
  root = mkdtempSync(join(tmpdir(), 'keelgrad-packing-'));
  for (const name of fixtureNames) await makeModelFolder(join(root, name), name);
});
afterAll(() => rmSync(root, { recursive: true }));

const dtypes = ['float32', 'float64', 'bfloat16'] as const;
const cases = fixtureNames.flatMap((name) => dtypes.map((dtype) => [name, dtype] as const));
const load = (name: FixtureName, dtype: (typeof dtypes)[number]): Promise<CausalLM> =>
  loadModel(join(root, name), { dtype });

const ids = (length: number, salt: number): Int32Array =>
  Int32Array.from({ length }, (_, i) => (i * i * 5 + i * salt + salt) % 61);
const pair = (prompt: number, chosen: number, rejected: number, salt: number): PairIds => ({
  promptIds: ids(prompt, salt),
  chosenIds: ids(chosen, salt + 1),
  rejectedIds: ids(rejected, salt + 2),
});
/** Lengths around the edges of tiles; answers and prompts of one token, whose segments hold no row or one. */
const pairs = [
  pair(7, 5, 9, 3),
  pair(1, 1, 1, 8),
  pair(17, 16, 1, 13),
  pair(3, 33, 30, 21),
  pair(16, 15, 17, 34),
  pair(31, 2, 3, 55),
];

interface Scores {
  /** By sequence: all chosen, then all rejected. */
  readonly sums: number[];
  /** Token log-probabilities by sequence. */
  readonly tokens: number[][];
  /** Entropy at the row before each token, by sequence. */
  readonly entropy: number[][];
}

function forward(
  model: CausalLM,
  p: ModelParameters,
  batch: PackedBatch,
): { sums: Tensor; tokens: Tensor; entropy: Tensor } {
  const upload = uploadBatch(batch, model.device, accumulationDType(model.dtype));
  const run = model.logProbs(p, upload.ids, batch.layout, upload.targets, { statistics: true });
  const sums = sequenceLogProbs(run.logProbs, upload.sequences, batch.lengths.length);
  return { sums, tokens: run.logProbs, entropy: run.statistics!.entropy };
}

function score(model: CausalLM, batch: PackedBatch, p: ModelParameters = model.parameters): Scores {
  using _layout = batch.layout;
  return scope(() => {
    const run = forward(model, p, batch);
    const [values, entropy] = [run.tokens.dataSync(), run.entropy.dataSync()];
    const bySequence = (pick: (n: number) => number): number[][] =>
      [...batch.lengths].map((_, s) => [...batch.sequences.keys()].filter((n) => batch.sequences[n] === s).map(pick));
    return {
      sums: [...run.sums.dataSync()],
      tokens: bySequence((n) => values[n]),
      entropy: bySequence((n) => entropy[batch.targetRows[n]]),
    };
  });
}

/** Scores of single batches, put in the order of one batch of all. */
function gather(parts: readonly Scores[]): Scores {
  const halves = <T>(pick: (s: Scores) => T[]): T[] => [
    ...parts.map((part) => pick(part)[0]),
    ...parts.map((part) => pick(part)[1]),
  ];
  return { sums: halves((s) => s.sums), tokens: halves((s) => s.tokens), entropy: halves((s) => s.entropy) };
}

const separate = (of: readonly PairIds[]): PackedBatch =>
  packSequences([
    ...of.map((p) => sequenceOf(p.promptIds, p.chosenIds)),
    ...of.map((p) => sequenceOf(p.promptIds, p.rejectedIds)),
  ]);

describe.each(cases)('%s in %s', (name, dtype) => {
  it('a batch of pairs equals the pairs one by one, bit for bit', async () => {
    using model = await load(name, dtype);
    const together = score(model, packPairs(pairs));
    expect(gather(pairs.map((p) => score(model, packPairs([p]))))).toEqual(together);
    expect(together.tokens.map((t) => t.length)).toEqual([5, 1, 16, 33, 15, 2, 9, 1, 1, 30, 17, 3]);
    const reversed = score(model, packPairs([...pairs].reverse()));
    expect(reversed.sums.slice(0, pairs.length).reverse()).toEqual(together.sums.slice(0, pairs.length));
  });

  it('a shared prompt equals a copy before each answer, bit for bit', async () => {
    using model = await load(name, dtype);
    const shared = score(model, packPairs(pairs));
    expect(score(model, separate(pairs))).toEqual(shared);
    for (const p of pairs) expect(score(model, separate([p]))).toEqual(score(model, packPairs([p])));
  });

  it('a policy with fresh adapters equals its base, bit for bit', async () => {
    using model = await load(name, dtype);
    const base = score(model, packPairs(pairs));
    addLora(model, { r: 5, alpha: 7 });
    expect(score(model, packPairs(pairs))).toEqual(base);
    expect(score(model, packPairs(pairs), { ...model.parameters, adapters: null })).toEqual(base);
  });

  it('is the same on every run and with any number of threads', async () => {
    using model = await load(name, dtype);
    const first = score(model, packPairs(pairs));
    const { threads } = runtimeInfo();
    try {
      for (const count of [1, 2, 3]) {
        setThreads(count);
        expect(score(model, packPairs(pairs))).toEqual(first);
      }
    } finally {
      setThreads(threads);
    }
  });
});

/** Gradients of a weighted sum of sequence log-probabilities, every sequence with a weight of its own. */
function gradients(model: CausalLM, batch: PackedBatch, weights: readonly number[]): Map<string, Float64Array> {
  using _layout = batch.layout;
  return scope(() => {
    const loss = (p: ModelParameters): Tensor => {
      const { sums } = forward(model, p, batch);
      const scale = uploadWeights(sums, weights);
      return sums.mul(scale).sum();
    };
    const [, [g]] = valueAndGrad(loss)(model.parameters);
    const named = [...g.backbone, ...(g.adapters ?? [])];
    return new Map(named.map(([key, t]) => [key, Float64Array.from(t.cast('float64').dataSync())]));
  });
}

const uploadWeights = (like: Tensor, weights: readonly number[]): Tensor => {
  const t = like.detach().mul(0);
  t.write(weights);
  return t;
};

const chosenWeight = (i: number): number => 0.5 + 0.25 * i;
const rejectedWeight = (i: number): number => -1 + 0.125 * i;
const pairWeights = [...pairs.map((_, i) => chosenWeight(i)), ...pairs.map((_, i) => rejectedWeight(i))];

function sumMaps(parts: readonly Map<string, Float64Array>[]): Map<string, Float64Array> {
  const [first, ...rest] = parts;
  return new Map([...first].map(([key, g]) => [key, g.map((x, i) => rest.reduce((s, m) => s + m.get(key)![i], x))]));
}

function expectClose(found: Map<string, Float64Array>, wanted: Map<string, Float64Array>, relative: number): void {
  expect([...found.keys()]).toEqual([...wanted.keys()]);
  for (const [key, g] of wanted)
    expect(maxDifference(found.get(key)!, g), key).toBeLessThanOrEqual(relative * maxAbs(g));
}

describe.each([
  ['float64', 1e-12],
  ['float32', 2e-5],
  ['bfloat16', 0.05],
] as const)('gradients of packed batches in %s', (dtype, relative) => {
  it.each(fixtureNames)(
    '%s, adapters included: together, one by one, with and without shared prompts',
    async (name) => {
      using model = await load(name, dtype);
      addLora(model, { r: 3, alpha: 6, targets: ['q_proj', 'v_proj', 'down_proj'] });
      score(model, packPairs(pairs)); // makes the rotary table, which the model keeps
      const before = memory().storages;
      const together = gradients(model, packPairs(pairs), pairWeights);
      const single = pairs.map((p, i) => gradients(model, packPairs([p]), [chosenWeight(i), rejectedWeight(i)]));
      expectClose(together, sumMaps(single), relative);
      expectClose(gradients(model, separate(pairs), pairWeights), together, relative);
      expect(memory().storages).toBe(before);
    },
  );
});
