// Real checkpoints in float32 against transformers: greedy paths, log-probabilities of answers, sums over pairs.
import { existsSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { type PairIds, packPairs, packSequences, sequenceOf, uploadBatch } from '../../src/data/packing.js';
import { loadModel } from '../../src/io/model-folder.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import { sequenceLogProbs } from '../../src/objectives/logprobs.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { describeWithShared, readSharedJson, sharedPath } from '../shared.js';
import { logitsOf, logSoftmaxRows, maxDifference, scoreSequence } from './support.js';

/** Of float32 against float64, along the recorded paths and pairs (README of the golden models). */
const tolerance = { logits: 3e-4, logProbs: 1e-4, sums: 5e-4 };

interface GreedyPath {
  readonly prompt_ids: readonly number[];
  readonly ids: readonly number[];
  readonly logprobs_f64: readonly number[];
  readonly top5: readonly { readonly ids: readonly number[]; readonly logprobs: readonly number[] }[];
}

interface RecordedPair {
  readonly prompt_ids: readonly number[];
  readonly chosen_ids: readonly number[];
  readonly rejected_ids: readonly number[];
}

const idsOf = (pair: RecordedPair): PairIds => ({
  promptIds: Int32Array.from(pair.prompt_ids),
  chosenIds: Int32Array.from(pair.chosen_ids),
  rejectedIds: Int32Array.from(pair.rejected_ids),
});

function expectGreedy(model: CausalLM, path: GreedyPath): void {
  const { logProbs, argmax } = scoreSequence(model, [...path.prompt_ids, ...path.ids], path.prompt_ids.length);
  expect(argmax).toEqual(path.ids);
  expect(maxDifference(logProbs, path.logprobs_f64)).toBeLessThan(tolerance.logProbs);
}

/** The five likeliest ids at the first positions of the answer. */
function expectTop(model: CausalLM, path: GreedyPath): void {
  const width = model.config.vocabSize;
  const seen = [...path.prompt_ids, ...path.ids.slice(0, path.top5.length - 1)];
  const rows = logSoftmaxRows(logitsOf(model, seen), width);
  path.top5.forEach(({ ids, logprobs }, i) => {
    const row = rows.subarray((path.prompt_ids.length - 1 + i) * width).subarray(0, width);
    const likeliest = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, ids.length);
    // Equals may stand in either order: what counts is that the log-probabilities at these ranks agree.
    const found = likeliest.map((id) => row[id]);
    expect(maxDifference(found, logprobs)).toBeLessThan(tolerance.logProbs);
    expect(
      maxDifference(
        ids.map((id) => row[id]),
        logprobs,
      ),
    ).toBeLessThan(tolerance.logProbs);
  });
}

/** Sums of the answers' log-probabilities: all chosen, then all rejected. */
function pairSums(model: CausalLM, pairs: readonly PairIds[]): number[] {
  const batch = packPairs(pairs);
  using layout = batch.layout;
  return scope(() => {
    const upload = uploadBatch(batch, model.device, 'float32');
    const { logProbs } = model.logProbs(model.parameters, upload.ids, layout, upload.targets);
    return [...sequenceLogProbs(logProbs, upload.sequences, 2 * pairs.length).dataSync()];
  });
}

/** The same, every answer behind its own copy of the prompt. */
function separateSums(model: CausalLM, pairs: readonly PairIds[]): number[] {
  const sides = [
    ...pairs.map((p) => sequenceOf(p.promptIds, p.chosenIds)),
    ...pairs.map((p) => sequenceOf(p.promptIds, p.rejectedIds)),
  ];
  const batch = packSequences(sides);
  using layout = batch.layout;
  return scope(() => {
    const upload = uploadBatch(batch, model.device, 'float32');
    const { logProbs } = model.logProbs(model.parameters, upload.ids, layout, upload.targets);
    return [...sequenceLogProbs(logProbs, upload.sequences, sides.length).dataSync()];
  });
}

// biome-ignore lint/suspicious/noExplicitAny: recorded pairs with sums under different names
function expectPairs(model: CausalLM, recorded: readonly any[], sums: (pair: any) => [number, number]): void {
  const pairs = recorded.map(idsOf);
  const expected = recorded.map(sums);
  const wanted = [...expected.map(([chosen]) => chosen), ...expected.map(([, rejected]) => rejected)];
  const together = pairSums(model, pairs);
  expect(maxDifference(together, wanted)).toBeLessThan(tolerance.sums);
  expect(separateSums(model, pairs)).toEqual(together);
  const [chosen, rejected] = pairSums(model, pairs.slice(0, 1));
  expect([chosen, rejected]).toEqual([together[0], together[pairs.length]]);
}

describeWithShared('stories260K', 'data/models/stories260K/hf', () => {
  const load = () => loadModel(sharedPath('data/models/stories260K/hf'));

  it('follows the greedy paths', async () => {
    using model = await load();
    for (const path of readSharedJson('golden/models/real/stories260K.json').greedy) {
      expectGreedy(model, path);
      expectTop(model, path);
    }
  });

  it('agrees with a numpy model on logits and on mean log-probabilities of texts', async () => {
    using model = await load();
    const golden = readSharedJson('data/models/stories260K/golden.json');
    expect(maxDifference(logitsOf(model, golden.prompt_ids), golden.prompt_logits.flat())).toBeLessThan(
      tolerance.logits,
    );
    for (const { ids, mean_logp } of golden.texts) {
      const { logProbs } = scoreSequence(model, ids);
      expect(Math.abs(logProbs.reduce((sum, x) => sum + x, 0) / logProbs.length - mean_logp)).toBeLessThan(1e-5);
    }
  });
});

describeWithShared('MiniMind2-Small', 'data/models/minimind2-small/hf', () => {
  it('follows the greedy paths and scores the pairs', async () => {
    using model = await loadModel(sharedPath('data/models/minimind2-small/hf'));
    const golden = readSharedJson('golden/models/real/minimind2-small.json');
    for (const path of golden.greedy) expectGreedy(model, path);
    expectTop(model, golden.greedy[0]);
    expectPairs(model, golden.pairs, (pair) => [pair.chosen_sum_f64, pair.rejected_sum_f64]);
  });
});

const smollm2 = process.env.KEELGRAD_SMOLLM2;
if (!smollm2 || !existsSync(smollm2)) {
  const how = 'set KEELGRAD_SMOLLM2 to the folder that make.py of data/models/smollm2-135m-instruct makes';
  console.warn(`skipped: SmolLM2-135M-Instruct: ${how}`);
  describe.skip(`SmolLM2-135M-Instruct (${how})`, () => undefined);
} else
  describeWithShared('SmolLM2-135M-Instruct', 'data/models/smollm2-135m-instruct/golden.json', () => {
    it('follows the greedy paths and scores the pairs', async () => {
      const golden = readSharedJson('data/models/smollm2-135m-instruct/golden.json');
      const before = memory().storages;
      {
        using model = await loadModel(smollm2);
        for (const path of golden.greedy) expectGreedy(model, path);
        expectTop(model, golden.greedy[0]);
        expectPairs(model, golden.pairs, (pair) => [pair.chosen_sum_f64, pair.rejected_sum_f64]);
      }
      expect(memory().storages).toBe(before);
    });
  });
