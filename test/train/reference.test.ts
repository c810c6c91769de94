// The reference: equal to the policy bit for bit at the start, fixed from then on, from the records where they bring it.
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { loadModel } from '../../src/io/model-folder.js';
import type { TrainMethod } from '../../src/train/options.js';
import { referenceLogProbs } from '../../src/train/reference.js';
import { type FixtureName, fixtureNames, makeModelFolder } from '../fixtures/make.js';
import { fixtureCompletions, fixturePairs, type Given, score, stable, temporaryFolder, train } from './support.js';

const folder = temporaryFolder();
const models = {} as Record<FixtureName, string>;
let adapter: string;
let pairs: string;

beforeAll(async () => {
  for (const name of fixtureNames) models[name] = await makeModelFolder(folder.path(name), name);
  pairs = folder.write('pairs.json', fixturePairs(6));
  const data = folder.write('completions.json', fixtureCompletions(6));
  const given = { model: models.llama, data, 'max-steps': 3, 'learning-rate': 0.02 };
  adapter = join((await train('sft', given)).result.output, 'adapter');
});

const run = (method: TrainMethod, given: Given) =>
  train(method, { model: models.llama, data: pairs, 'batch-size': 2, 'max-steps': 3, 'learning-rate': 1e-3, ...given });

describe('the first step', () => {
  const cases = fixtureNames.flatMap((name) =>
    (['float64', 'float32', 'bfloat16'] as const).map((dtype) => ({ name, dtype })),
  );

  // Vocabularies of 61 and 67: no multiples of a vector.
  it.each(cases)('finds policy and reference equal bit for bit: $name in $dtype', async ({ name, dtype }) => {
    for (const [method, given] of [
      ['dpo', {}],
      ['dpo', { train: 'full' }],
      ['spo', {}],
    ] as const) {
      const [first] = (await run(method, { ...given, model: models[name], dtype, 'max-steps': 1 })).metrics;
      const nothing = [
        'rewards/chosen',
        'rewards/rejected',
        'rewards/margins',
        'logps/chosen_delta',
        'logps/rejected_delta',
      ];
      for (const metric of [...nothing, 'rewards/accuracies']) expect(first[metric], metric).toBe(0);
      expect(first[method === 'spo' ? 'spo/dpo' : 'loss']).toBe(dtype === 'float64' ? Math.LN2 : Math.fround(Math.LN2));
    }
  });

  it.each(['dpo', 'spo'] as const)(
    '%s from an adapter: the reference has it too, unless it is the base',
    async (method) => {
      const [initial] = (await run(method, { adapter })).metrics;
      expect(initial['rewards/margins']).toBe(0);
      const [base] = (await run(method, { adapter, reference: 'base' })).metrics;
      expect(base['rewards/margins']).not.toBe(0);
      const scores = async (given: Given) => (await score({ model: models.llama, data: pairs, ...given })).records;
      const [policy, reference] = [await scores({ adapter }), await scores({})];
      const moved = policy.map((r, i) => r.chosen_logps - reference[i].chosen_logps);
      const all = (await run(method, { adapter, reference: 'base', 'batch-size': 6, 'max-steps': 1 })).metrics[0];
      expect(all['logps/chosen_delta']).toBeCloseTo(moved.reduce((a, b) => a + b, 0) / 6, 12);
    },
  );
});

describe('afterwards', () => {
  it.each([
    ['dpo', { train: 'full' }],
    ['spo', {}],
  ] as const)('%s: stays where it was while the weights move', async (method, given) => {
    const { metrics } = await run(method, { ...given, 'batch-size': 6, 'no-shuffle': true });
    const reference = metrics.map((step) => step['logps/chosen'] - step['logps/chosen_delta']);
    expect(new Set(metrics.map((step) => step['logps/chosen'])).size).toBe(3);
    for (const value of reference) expect(value).toBeCloseTo(reference[0], 10);
  });

  it('none: rewards are those of the policy alone, without differences', async () => {
    const [step] = (await run('dpo', { reference: 'none', beta: 0.25 })).metrics;
    expect(step['rewards/chosen']).toBeCloseTo(0.25 * step['logps/chosen'], 12);
    expect(step).not.toHaveProperty(['logps/chosen_delta']);
  });
});

describe('records that bring their own', () => {
  const withReference = (indices: readonly number[], shift = 0): object[] =>
    fixturePairs(6).map((pair, i) =>
      indices.includes(i) ? { ...pair, ref_chosen_logps: -5 - i + shift, ref_rejected_logps: -7 } : pair,
    );

  it('are taken at their word, and cost no pass', async () => {
    const phases: string[] = [];
    const data = folder.write('own.json', withReference([0, 1, 2, 3, 4, 5]));
    const options = { data, 'batch-size': 6, 'max-steps': 1, 'no-shuffle': true };
    const given = { model: models.llama, ...options, 'learning-rate': 1e-3 };
    const { metrics } = await train('dpo', given, { onPhase: (name) => phases.push(name) });
    expect(phases).toEqual([]);
    expect(metrics[0]['logps/chosen'] - metrics[0]['logps/chosen_delta']).toBeCloseTo(-7.5, 12);
    expect(metrics[0]['logps/rejected'] - metrics[0]['logps/rejected_delta']).toBeCloseTo(-7, 12);
    const other = folder.write('other.json', withReference([0, 1, 2, 3, 4, 5], 1));
    const shifted = await train('dpo', { ...given, data: other });
    expect(stable(shifted.metrics)).not.toEqual(stable(metrics));
  });

  it('stand beside records that do not', async () => {
    using model = await loadModel(models.llama);
    const examples = fixturePairs(6).map((pair, index) => {
      const { prompt_ids, chosen_ids, rejected_ids } = pair as Record<string, number[]>;
      const own = index % 2 === 0 ? { refChosenLogp: index, refRejectedLogp: -index } : {};
      const ids = { promptIds: prompt_ids, chosenIds: chosen_ids, rejectedIds: rejected_ids };
      const typed = Object.fromEntries(Object.entries(ids).map(([k, v]) => [k, Int32Array.from(v)])) as Record<
        keyof typeof ids,
        Int32Array
      >;
      return { index, line: index, ...typed, ...own };
    });
    const done: number[][] = [];
    const table = await referenceLogProbs(model, examples, {
      kind: 'initial',
      visited: [0, 1, 2, 3],
      batchSize: 2,
      onProgress: (...progress) => done.push(progress),
    });
    expect(done).toEqual([[2, 2]]);
    expect([table!.chosen[0], table!.chosen[2], table!.rejected[2]]).toEqual([0, 2, -2]);
    expect(table!.chosen[1]).toBeLessThan(0);
    expect([...table!.chosen.slice(4)]).toEqual([Number.NaN, Number.NaN]);
    expect(await referenceLogProbs(model, examples, { kind: 'none', visited: [0], batchSize: 2 })).toBeNull();
  });
});
