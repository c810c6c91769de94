// Every loss in training: its value on a batch by hand, whatever is weighed; losses that see a step as a whole, cut into
// micro-batches; labelled data; what data lack.
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { packSequences, sequenceOf } from '../../src/data/packing.js';
import { loadModel } from '../../src/io/model-folder.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import { type PreferenceLossName, type PreferenceLossOptions, preferenceLoss } from '../../src/objectives/index.js';
import { preferenceLossNames } from '../../src/objectives/preference/facts.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { mismatchedPartners } from '../../src/train/mismatch.js';
import { dpo } from '../../src/train/trainers.js';
import { makeModelFolder } from '../fixtures/make.js';
import {
  fixtureCompletions,
  fixturePairs,
  type Given,
  type Run,
  refusal,
  relativeError,
  savedModel,
  temporaryFolder,
  train,
} from './support.js';

const folder = temporaryFolder();
let model: string;
let adapter: string;

beforeAll(async () => {
  model = await makeModelFolder(folder.path('model'), 'qwen2');
  const data = folder.write('adapter.json', fixtureCompletions(4));
  const options = { model, data, 'max-steps': 2, 'learning-rate': 0.05, 'lora-r': 3, output: folder.path('sft') };
  adapter = join((await train('sft', options)).result.output, 'adapter');
});

interface Ids {
  readonly prompt_ids: number[];
  readonly chosen_ids: number[];
  readonly rejected_ids: number[];
  readonly offset?: number;
}
const rows = (count: number): Ids[] => fixturePairs(count).map((pair, i) => ({ ...(pair as Ids), offset: i / 4 }));

let files = 0;
const run = (method: 'dpo' | 'spo', given: Given, records: object[]): Promise<Run> => {
  const data = folder.write(`records${files++}.json`, records);
  return train(method, { model, data, 'no-shuffle': true, dtype: 'float64', 'learning-rate': 1e-3, ...given });
};

/** Per-token log-probabilities of a response and log Σ p² of the distributions it is drawn from, by the full softmax. */
function tokensOf(
  m: CausalLM,
  base: boolean,
  prompt: number[],
  response: number[],
): { logp: number[]; squares: number[] } {
  return scope(() => {
    const packed = packSequences([sequenceOf(Int32Array.from(prompt), Int32Array.from(response))]);
    using layout = packed.layout;
    const parameters = base ? { ...m.parameters, adapters: null } : m.parameters;
    const logits = m.logits(parameters, Tensor.from(packed.ids), layout);
    const [, vocabulary] = logits.shape;
    const all = logits.dataSync();
    const at = response.map((id, t) => {
      const row = Array.from(
        all.subarray((prompt.length + t - 1) * vocabulary, (prompt.length + t) * vocabulary),
        Number,
      );
      const top = Math.max(...row);
      const norm = Math.log(row.reduce((sum, x) => sum + Math.exp(x - top), 0)) + top;
      return { logp: row[id] - norm, square: Math.log(row.reduce((sum, x) => sum + Math.exp(2 * (x - norm)), 0)) };
    });
    return { logp: at.map((x) => x.logp), squares: at.map((x) => x.square) };
  });
}

const total = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);
const average = (values: readonly number[]): number => total(values) / values.length;
const upload = (values: readonly number[]): Tensor => Tensor.from(Float64Array.from(values));

interface Weighing {
  readonly ldAlpha?: number;
  readonly wpo?: boolean;
}

/** The loss of one batch under a policy with the adapter and a reference without, token by token on the host. */
function byHand(
  m: CausalLM,
  pairs: readonly Ids[],
  options: PreferenceLossOptions,
  { ldAlpha = 1, wpo }: Weighing,
): number {
  const scored = pairs.map(({ prompt_ids, chosen_ids, rejected_ids }) => {
    const shorter = Math.min(chosen_ids.length, rejected_ids.length);
    const weigh = (logp: number[]): number => total(logp.map((x, t) => (t < shorter ? x : ldAlpha * x)));
    const half = (ids: number[]) => {
      const [policy, reference] = [tokensOf(m, false, prompt_ids, ids), tokensOf(m, true, prompt_ids, ids)];
      const likelihood = Math.exp(average(policy.logp.map((x, t) => x - policy.squares[t])));
      return { policy: weigh(policy.logp), plain: total(policy.logp), reference: weigh(reference.logp), likelihood };
    };
    return { chosen: half(chosen_ids), rejected: half(rejected_ids) };
  });
  return scope(() =>
    preferenceLoss(
      {
        chosen: upload(scored.map((s) => s.chosen.policy)),
        rejected: upload(scored.map((s) => s.rejected.policy)),
        refChosen: upload(scored.map((s) => s.chosen.reference)),
        refRejected: upload(scored.map((s) => s.rejected.reference)),
        chosenLengths: upload(pairs.map((p) => p.chosen_ids.length)),
        rejectedLengths: upload(pairs.map((p) => p.rejected_ids.length)),
        chosenUnweighted: upload(scored.map((s) => s.chosen.plain)),
        offsets: upload(pairs.map((p) => p.offset!)),
        kl: upload([klByHand(m, pairs)]).reshape([]),
        ...(wpo && { weights: upload(scored.map((s) => s.chosen.likelihood * s.rejected.likelihood)) }),
      },
      options,
    ).item(),
  );
}

/** max(0, mean over each prompt with the responses of the record before it). */
function klByHand(m: CausalLM, pairs: readonly Ids[]): number {
  const ratios = pairs.flatMap(({ prompt_ids }, i) => {
    const other = pairs[(i + pairs.length - 1) % pairs.length];
    return [other.chosen_ids, other.rejected_ids].map(
      (ids) => total(tokensOf(m, false, prompt_ids, ids).logp) - total(tokensOf(m, true, prompt_ids, ids).logp),
    );
  });
  return Math.max(0, average(ratios));
}

/** Options that a loss needs, or without which it would be another. */
const settings: { readonly [N in PreferenceLossName]?: Partial<PreferenceLossOptions> } = {
  robust: { labelSmoothing: 0.1 },
  cdpo: { labelSmoothing: 0.1 },
  exo_pair: { labelSmoothing: 0.1 },
  aot: { labelSmoothing: 0.1 },
  simpo: { simpoGamma: 1 },
  alphapo: { simpoGamma: 1, alphapoAlpha: -0.5 },
  dpop: { dpopLambda: 3 },
  kto: { ktoUndesirableWeight: 1.5 },
};
const referenceFreeLosses = ['simpo', 'alphapo', 'cpo', 'orpo', 'slic'];
const withoutBeta = ['orpo', 'slic'];

describe('the first loss of a run is that of its batch', () => {
  const pairs = rows(5);

  async function expectFirst(
    method: 'dpo' | 'spo',
    loss: PreferenceLossOptions,
    weighing: Weighing = {},
  ): Promise<void> {
    using policy = await loadModel(model, { dtype: 'float64', adapter });
    const { beta, ...rest } = loss;
    const names = [loss.lossType ?? 'sigmoid'].flat();
    const free = names.every((name) => referenceFreeLosses.includes(name));
    const given = {
      adapter,
      ...rest,
      ...weighing,
      ...(!names.every((name) => withoutBeta.includes(name)) && { beta }),
      ...(!free && { reference: 'base' }),
      'max-steps': 1,
      'batch-size': pairs.length,
    };
    const { metrics } = await run(method, given, pairs);
    const expected = byHand(policy, pairs, loss, weighing);
    const found = metrics[0][method === 'spo' ? 'spo/dpo' : 'loss'];
    expect(Math.abs(found - expected)).toBeLessThan(1e-11 * Math.max(1, Math.abs(expected)));
    const weight = loss.nllWeight ?? (names.includes('cpo') || names.includes('orpo') ? 1 : 0);
    expect('nll_loss' in metrics[0]).toBe(weight > 0);
    if (weight > 0) {
      const without = byHand(policy, pairs, { ...loss, nllWeight: 0, nllReduction: undefined }, weighing);
      expect(metrics[0].nll_loss).toBeCloseTo((expected - without) / weight, 11);
    }
    if (names.includes('kto')) expect(metrics[0].kl).toBeCloseTo(klByHand(policy, pairs), 12);
  }

  it.each(preferenceLossNames)('%s', async (lossType) => {
    const loss = { beta: 0.3, lossType, ...settings[lossType] };
    await expectFirst('dpo', loss);
    await expectFirst('spo', loss);
  });

  it.each([
    ['sigmoid', {}, { wpo: true }],
    ['sigmoid', {}, { ldAlpha: 0.3 }],
    ['ipo', {}, { ldAlpha: 0 }],
    ['apo_zero', {}, { ldAlpha: 0.5, wpo: true }],
    ['robust', { labelSmoothing: 0.2 }, { wpo: true }],
    ['sigmoid', { nllWeight: 0.5 }, { ldAlpha: 0.3 }],
    ['sigmoid', { nllWeight: 0.5, nllReduction: 'sequence-mean' }, {}],
    ['sigmoid', { nllWeight: 0.5, nllReduction: 'sequence-sum' }, { ldAlpha: 0.3, wpo: true }],
    ['hinge', { fDivergenceType: 'alpha_divergence', fAlphaDivergenceCoef: 2 }, {}],
    [['sigmoid', 'sft'], { lossWeights: [0.5, 2] }, { ldAlpha: 0.3 }],
    [['sigmoid', 'bco_pair', 'simpo'], { lossWeights: [1, 0.5, 0.25], simpoGamma: 1 }, {}],
  ] as const)('%j %j %j', async (lossType, options, weighing) => {
    const loss = { beta: 0.3, lossType, ...options } as PreferenceLossOptions;
    await expectFirst('dpo', loss, weighing);
    await expectFirst('spo', loss, weighing);
  });
});

describe('losses that see a step as a whole', () => {
  const cuts: readonly Given[] = [
    { 'batch-size': 2, 'gradient-accumulation-steps': 2 },
    { 'batch-size': 1, 'gradient-accumulation-steps': 4 },
  ];
  const losses: readonly Given[] = [
    { 'loss-type': 'aot', 'label-smoothing': 0.1 },
    { 'loss-type': 'aot_unpaired' },
    { 'loss-type': 'beta_dpo' },
    { 'loss-type': 'kto' },
    { 'loss-type': 'sigmoid,sft,aot', 'loss-weights': '1,0.5,0.3', 'ld-alpha': 0.3 },
    { 'loss-type': 'beta_dpo', wpo: true },
    { 'nll-weight': 1 },
    { 'loss-type': 'cpo' },
    { 'loss-type': 'sft' },
  ];

  it.each(['dpo', 'spo'] as const)('%s: the same step however its batch is cut', async (method) => {
    for (const loss of losses) {
      const free = loss['loss-type'] === 'cpo';
      const options = {
        ...loss,
        adapter,
        ...(!free && { reference: 'base' }),
        'max-steps': 3,
        ...(method === 'dpo' && { train: 'both' }),
      };
      const whole = await run(method, { ...options, 'batch-size': 4 }, rows(8));
      for (const cut of cuts) {
        const found = await run(method, { ...options, ...cut }, rows(8));
        for (const name of ['loss', 'grad_norm', ...(loss['loss-type'] === 'kto' ? ['kl'] : [])])
          found.metrics.forEach((step, i) => {
            expect(Math.abs(step[name] - whole.metrics[i][name]), `${JSON.stringify(loss)} ${name}`).toBeLessThan(
              1e-11 * Math.max(1, Math.abs(whole.metrics[i][name])),
            );
          });
        expect(
          relativeError(await savedModel(found.result.output), await savedModel(whole.result.output)),
        ).toBeLessThan(1e-10);
      }
    }
  });

  it('kto: the KL estimate starts at 0, where policy and reference are the same', async () => {
    const { metrics } = await run(
      'dpo',
      { 'loss-type': 'kto', 'max-steps': 8, 'learning-rate': 0.02, 'batch-size': 4 },
      rows(8),
    );
    expect(metrics[0].kl).toBe(0);
    expect(metrics[0].loss).toBeCloseTo(0.5, 12);
    expect(metrics.every(({ kl }) => kl >= 0)).toBe(true);
  });

  it('leave nothing behind', async () => {
    using policy = await loadModel(model, { lora: { r: 4, seed: 1 } });
    const go = async (lossType: readonly PreferenceLossName[], maxSteps: number): Promise<void> => {
      const options = { lossType, maxSteps, batchSize: 1, gradientAccumulationSteps: 3 };
      for await (const { step } of dpo(policy, rows(6), options)) if (step === 4) break;
    };
    await go(['sigmoid'], 1); // the model's table of rotations
    const start = memory().storages;
    await go(['beta_dpo', 'kto', 'aot'], 3);
    await go(['beta_dpo', 'kto'], 9);
    expect(memory().storages).toBe(start);
  });
});

/** Pairs as labelled responses: all chosen, then all rejected. */
const labelled = (pairs: readonly Ids[]): object[] => [
  ...pairs.map(({ prompt_ids, chosen_ids }) => ({ prompt_ids, completion_ids: chosen_ids, label: true })),
  ...pairs.map(({ prompt_ids, rejected_ids }) => ({ prompt_ids, completion_ids: rejected_ids, label: false })),
];

describe('labelled responses without pairs', () => {
  const options = { reference: 'base', 'max-steps': 1, train: 'both', optimizer: 'sgd', 'max-grad-norm': 0 };

  it.each([
    ['kto', 1],
    ['apo_zero_unpaired', 1],
    // TRL adds the two responses of a pair, and takes the mean over single responses.
    ['bco_pair', 2],
    ['kto,bco_pair', undefined],
  ] as const)('%s: all of some pairs are worth those pairs', async (loss, factor) => {
    const pairs = rows(4);
    const given = {
      ...options,
      adapter,
      'loss-type': loss,
      ...(loss.startsWith('kto') && { 'kto-undesirable-weight': 1.5 }),
    };
    const paired = (await run('dpo', { ...given, 'batch-size': 4 }, pairs)).metrics[0];
    for (const cut of [{ 'batch-size': 8 }, { 'batch-size': 2, 'gradient-accumulation-steps': 4 }]) {
      const found = (await run('dpo', { ...given, ...cut }, labelled(pairs))).metrics[0];
      const same = ['rewards/chosen', 'rewards/rejected', 'rewards/margins', 'logps/chosen', 'logps/rejected'];
      const more = ['logps/chosen_delta', 'logits/chosen', 'logits/rejected', 'entropy', 'num_tokens', 'kl'];
      for (const name of [...same, ...more].filter((one) => one in paired))
        expect(found[name], name).toBeCloseTo(paired[name], 11);
      if (factor === undefined) continue;
      expect(found.loss * factor).toBeCloseTo(paired.loss, 12);
      expect(found.grad_norm * factor).toBeCloseTo(paired.grad_norm, 11);
    }
  });

  it('leaves out metrics of a kind that a step has none of', async () => {
    const records = labelled(rows(2)).slice(0, 2);
    const { metrics } = await run('dpo', { ...options, 'loss-type': 'kto', adapter, 'batch-size': 2 }, records);
    expect(metrics[0]).toHaveProperty(['rewards/chosen']);
    expect(Object.keys(metrics[0]).filter((name) => /rejected|margins/.test(name))).toEqual([]);
  });

  it("takes text, and TRL's fields", async () => {
    const record = { prompt: 'a', completion: 'b', label: true };
    expect(await refusal(run('dpo', { 'loss-type': 'kto' }, [record, record]))).toMatch(/tokenizer/);
  });

  it.each([
    [
      'dpo',
      {},
      'sigmoid compares the two responses of a pair, and these records have one response and its label; use bco_pair, kto, apo_zero_unpaired, or pairs',
    ],
    ['dpo', { 'loss-type': 'kto,hinge' }, 'hinge compares the two responses'],
    ['dpo', { 'loss-type': 'kto', 'nll-weight': 1 }, 'leave out nll weight'],
    ['dpo', { 'loss-type': 'kto', 'ld-alpha': 0.5 }, 'ld alpha is for pairs'],
    ['dpo', { 'loss-type': 'kto', wpo: true }, 'wpo is for pairs'],
    ['spo', { 'loss-type': 'kto' }, 'spo needs pairs'],
  ] as const)('%s %j is refused', async (method, given, message) => {
    expect(await refusal(run(method, given, labelled(rows(2))))).toContain(message);
  });

  it('refuses records of another kind among them, and labels that are none', async () => {
    const records = labelled(rows(2));
    const kto = { 'loss-type': 'kto' };
    expect(await refusal(run('dpo', kto, [...records, rows(1)[0]]))).toMatch(
      /json:\d+: expected prompt, completion and label/,
    );
    expect(await refusal(run('dpo', kto, [...rows(1), ...records]))).toMatch(
      /json:1: expected a pair .*, found a completion with its label/,
    );
    expect(await refusal(run('dpo', kto, [{ ...records[0], label: 1 }]))).toMatch(
      /label: expected true or false, found 1/,
    );
  });
});

describe('what data lack', () => {
  it('an offset, for odpo alone', async () => {
    const records = rows(3).map((row, i) => (i === 1 ? { ...row, offset: undefined } : row));
    expect(await refusal(run('dpo', { 'loss-type': 'odpo' }, records))).toMatch(
      /^line \d+ of the data: expected a field "offset"/,
    );
    expect((await run('dpo', { 'max-steps': 1 }, records)).metrics).toHaveLength(1);
    expect(await refusal(run('dpo', { 'loss-type': 'odpo' }, [{ ...rows(1)[0], offset: 'much' }]))).toMatch(
      /offset: expected a finite number, found "much"/,
    );
  });

  it('a second prompt, for kto', async () => {
    const records = rows(3).map((row) => ({ ...row, prompt_ids: [5] }));
    expect(await refusal(run('dpo', { 'loss-type': 'kto' }, records))).toMatch(
      /these records have one prompt alone; use apo_zero_unpaired/,
    );
  });

  it('log-probabilities of tokens, for LD-DPO', async () => {
    const records = rows(2).map((row) => ({ ...row, ref_chosen_logps: -1, ref_rejected_logps: -2 }));
    expect(await refusal(run('dpo', { 'ld-alpha': 0.5 }, records))).toMatch(
      /LD-DPO weighs tokens; remove ref_chosen_logps/,
    );
  });
});

describe('mismatched partners', () => {
  const prompts = (...names: string[]): Int32Array[] =>
    names.map((name) => Int32Array.from(name, (c) => c.charCodeAt(0)));

  it('are the nearest records before with another prompt', () => {
    expect(mismatchedPartners(prompts('a', 'b', 'c'))).toEqual([2, 0, 1]);
    expect(mismatchedPartners(prompts('a', 'a', 'b', 'b', 'b', 'a'))).toEqual([4, 4, 1, 1, 1, 4]);
    expect(mismatchedPartners(prompts('ab', 'a'))).toEqual([1, 0]);
    expect(() => mismatchedPartners(prompts('a', 'a'))).toThrow(/one prompt alone/);
    expect(() => mismatchedPartners(prompts('a'))).toThrow(/one prompt alone/);
  });
});

describe('sft', () => {
  it.each(['token-mean', 'sum'])('dft, %s: each token weighed by its probability', async (reduction) => {
    using m = await loadModel(model, { dtype: 'float64' });
    const records = fixtureCompletions(4) as { prompt_ids: number[]; completion_ids: number[] }[];
    const data = folder.write('dft.json', records);
    const given = { model, data, 'sft-loss': 'dft', 'sft-reduction': reduction, dtype: 'float64', 'max-steps': 1 };
    const tokens = records.flatMap((r) => tokensOf(m, true, r.prompt_ids, r.completion_ids).logp);
    const expected = -total(tokens.map((x) => x * Math.exp(x))) / (reduction === 'sum' ? 4 : tokens.length);
    for (const cut of [{ 'batch-size': 4 }, { 'batch-size': 2, 'gradient-accumulation-steps': 2 }])
      expect((await train('sft', { ...given, ...cut })).metrics[0].loss).toBeCloseTo(expected, 12);
  });
});
