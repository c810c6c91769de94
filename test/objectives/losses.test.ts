// Preference and SFT losses against TRL and against the papers' formulas: values, gradients, rewards, refusals.
import { existsSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { valueAndGrad } from '../../src/autograd/transforms.js';
import { KeelgradError } from '../../src/errors.js';
import {
  dpoLoss,
  implicitReward,
  margin,
  type PairLogProbs,
  type PreferenceLossOptions,
  preferenceLoss,
  sequenceLogProbs,
  sftLoss,
} from '../../src/objectives/index.js';
import type { DType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { pairMetrics } from '../../src/train/batch-metrics.js';
import { maxDifference } from '../models/support.js';
import { describeWithShared, readSharedJson, sharedPath } from '../shared.js';

const FILE = 'golden/losses/losses.json';

interface Batch {
  readonly policy_chosen_token_logps: number[][];
  readonly policy_rejected_token_logps: number[][];
  readonly policy_chosen_logps: number[];
  readonly policy_rejected_logps: number[];
  readonly ref_chosen_logps: number[];
  readonly ref_rejected_logps: number[];
  readonly chosen_lengths: number[];
  readonly rejected_lengths: number[];
}

interface Result {
  readonly batch: string;
  readonly loss: number;
  readonly per_example_loss: number[] | null;
  readonly rewards_chosen?: number[];
  readonly rewards_rejected?: number[];
  readonly grad_policy_logps?: { readonly chosen: number[]; readonly rejected: number[] };
  readonly grad_policy_token_logps?: number[][] | { readonly chosen: number[][] };
  readonly metrics?: Readonly<Record<string, number>>;
}

interface Case {
  readonly id: string;
  readonly options: PreferenceLossOptions;
  readonly results: readonly Result[];
}

/** The losses of `keelgrad dpo`'s core; each is its own formula, pair by pair (but sft, one number for a batch). */
const ours = ['sigmoid', 'ipo', 'ipo_sum', 'robust', 'sft'];
const taken = ['loss_type', 'loss_weights', 'beta', 'label_smoothing'];

/** The recorded cases that name losses and options of ours. */
function casesOf(golden: Readonly<Record<string, never>>): Case[] {
  const trl = (golden.trl as { id: string; trainer: string; config: never; results: Result[] }[])
    .filter(({ id }) => id !== 'trl-037') // TRL's sigmoid ignores label smoothing; here it is refused
    .filter(
      ({ trainer, config }) => trainer === 'DPOTrainer' && Object.keys(config).every((key) => taken.includes(key)),
    )
    .map(({ id, config, results }) => ({ id, results, options: trlOptions(config) }))
    .filter(({ options }) => [options.lossType].flat().every((name) => ours.includes(name as string)));
  const formulas = (golden.reference as { id: string; loss: string; config: { tau: number }; results: Result[] }[])
    .filter(({ loss }) => loss === 'ipo_sum')
    .map(({ id, config, results }) => ({ id, results, options: { lossType: 'ipo_sum' as const, beta: config.tau } }));
  return [...trl, ...formulas];
}

function trlOptions(config: {
  loss_type: PreferenceLossOptions['lossType'];
  beta: number;
  loss_weights?: number[];
  label_smoothing?: number;
}): PreferenceLossOptions {
  const { loss_type: lossType, beta, loss_weights: lossWeights, label_smoothing: labelSmoothing } = config;
  return { lossType, beta, ...(lossWeights && { lossWeights }), ...(labelSmoothing && { labelSmoothing }) };
}

function pairsOf(batch: Batch, dtype: DType = 'float64'): PairLogProbs {
  const upload = (values: number[]): Tensor => Tensor.from(Float64Array.from(values), { dtype });
  return {
    chosen: upload(batch.policy_chosen_logps),
    rejected: upload(batch.policy_rejected_logps),
    refChosen: upload(batch.ref_chosen_logps),
    refRejected: upload(batch.ref_rejected_logps),
    chosenLengths: upload(batch.chosen_lengths),
    rejectedLengths: upload(batch.rejected_lengths),
  };
}

/** A batch of one pair of another. */
const onlyPair = (batch: Batch, i: number): Batch =>
  Object.fromEntries(Object.entries(batch).map(([name, values]) => [name, [values[i]]])) as never;

/** The loss with its gradients for the policy's log-probabilities, on the host. */
function evaluate(pairs: PairLogProbs, options: PreferenceLossOptions) {
  return scope(() => {
    const loss = (chosen: Tensor, rejected: Tensor): Tensor => preferenceLoss({ ...pairs, chosen, rejected }, options);
    const [value, [chosen, rejected]] = valueAndGrad(loss)(pairs.chosen, pairs.rejected);
    return { loss: value.item(), chosen: [...chosen.dataSync()], rejected: [...rejected.dataSync()] };
  });
}

const relative = (found: number, expected: number): number =>
  Math.abs(found - expected) / Math.max(1, Math.abs(expected));

describeWithShared('recorded preference losses', FILE, () => {
  const golden = existsSync(sharedPath(FILE)) ? readSharedJson(FILE) : { trl: [], reference: [] };
  const cases = casesOf(golden);

  it('covers every loss that exists, alone and in sums', () => {
    expect(new Set(cases.flatMap(({ options }) => options.lossType))).toEqual(new Set(ours));
    expect(cases.filter(({ options }) => [options.lossType].flat().length > 1).map(({ id }) => id)).toEqual([
      'trl-065',
      'trl-067',
    ]);
  });

  describe.each(cases)('$id $options', ({ options, results }) => {
    it.each(results)('$batch', (result) => {
      scope(() => {
        const batch: Batch = golden.batches[result.batch];
        const pairs = pairsOf(batch);
        const found = evaluate(pairs, options);
        expect(relative(found.loss, result.loss)).toBeLessThan(1e-13);
        expect(maxDifference(found.chosen, result.grad_policy_logps!.chosen)).toBeLessThan(1e-12);
        expect(maxDifference(found.rejected, result.grad_policy_logps!.rejected)).toBeLessThan(1e-12);
        const single = [options.lossType].flat();
        if (result.per_example_loss && single.length === 1) {
          expect(result.per_example_loss).toHaveLength(batch.chosen_lengths.length);
          for (const [i, expected] of result.per_example_loss.entries())
            expect(relative(evaluate(pairsOf(onlyPair(batch, i)), options).loss, expected)).toBeLessThan(1e-13);
        }
        const float32 = evaluate(pairsOf(batch, 'float32'), options);
        expect(relative(float32.loss, result.loss)).toBeLessThan(1e-6);
      });
    });

    it.each(results.filter((result) => result.rewards_chosen))('$batch: rewards and their metrics', (result) => {
      const batch: Batch = golden.batches[result.batch];
      const values = {
        chosen: batch.policy_chosen_logps,
        rejected: batch.policy_rejected_logps,
        refChosen: batch.ref_chosen_logps,
        refRejected: batch.ref_rejected_logps,
      };
      const empty = new Int32Array();
      const packed = {
        lengths: [...batch.chosen_lengths, ...batch.rejected_lengths],
        targetIds: empty,
        sequences: empty,
        targetRows: empty,
      };
      const statistics = { entropy: empty, argmax: empty, meanLogit: empty };
      const found = pairMetrics(packed as never, statistics, values, implicitReward(options));
      // TRL logs metrics in float32.
      for (const [name, expected] of Object.entries(result.metrics!))
        expect(relative(found[name], expected), name).toBeLessThan(1e-6);
      const mean = (xs: number[]): number => xs.reduce((a, b) => a + b, 0) / xs.length;
      expect(relative(found['rewards/chosen'], mean(result.rewards_chosen!))).toBeLessThan(1e-13);
      expect(relative(found['rewards/rejected'], mean(result.rewards_rejected!))).toBeLessThan(1e-13);
    });
  });

  it.each(['trl-089', 'trl-090'])('the SFT loss of %s', (id) => {
    const { config, results } = golden.trl.find((entry: { id: string }) => entry.id === id);
    for (const result of results as Result[])
      scope(() => {
        const batch: Batch = golden.batches[result.batch];
        const tokens = batch.chosen_lengths.reduce((a, b) => a + b, 0);
        const flat = Tensor.from(Float64Array.from(batch.policy_chosen_token_logps.flat()));
        const sequences = Tensor.from(Int32Array.from(batch.chosen_lengths.flatMap((n, i) => Array(n).fill(i))));
        const loss = (logProbs: Tensor): Tensor =>
          sftLoss(sequenceLogProbs(logProbs, sequences, batch.chosen_lengths.length), {
            reduction: 'token-mean',
            tokens: config.num_items_in_batch ?? tokens,
          });
        const [value, [gradient]] = valueAndGrad(loss)(flat);
        expect(relative(value.item(), result.loss)).toBeLessThan(1e-13);
        const given = result.grad_policy_logps;
        const expected = given ? batch.chosen_lengths.flatMap((n, i) => Array(n).fill(given.chosen[i])) : undefined;
        if (expected) expect(maxDifference(gradient.dataSync(), expected)).toBeLessThan(1e-14);
        else expect(maxDifference(gradient.dataSync(), tokenGradients(result))).toBeLessThan(1e-14);
      });
  });
});

const tokenGradients = ({ grad_policy_token_logps: given }: Result): number[] =>
  (Array.isArray(given) ? given : given!.chosen).flat();

describe('preferenceLoss', () => {
  const list = (...values: number[]): Tensor => Tensor.from(Float64Array.from(values));
  const pairs = (): PairLogProbs => ({
    chosen: list(-3, -5),
    rejected: list(-4, -2),
    refChosen: list(-2, -6),
    refRejected: list(-5, -1),
    chosenLengths: list(2, 5),
    rejectedLengths: list(4, 1),
  });

  it('is ln 2 where policy and reference are equal, with opposite gradients', () => {
    scope(() => {
      const p = pairs();
      const found = evaluate({ ...p, refChosen: p.chosen, refRejected: p.rejected }, { beta: 0.1 });
      expect(found.loss).toBe(Math.LN2);
      expect(found.chosen).toEqual([-0.025, -0.025]);
      expect(found.rejected).toEqual([0.025, 0.025]);
    });
  });

  it('stays finite, with its gradient, however large the margin', () => {
    scope(() => {
      for (const chosen of [-1e5, -1e3, 0, 1e3, 1e5])
        for (const lossType of ['sigmoid', 'robust'] as const) {
          const options = { beta: 10, lossType, ...(lossType === 'robust' && { labelSmoothing: 0.2 }) };
          const found = evaluate({ ...pairs(), chosen: list(chosen, chosen) }, options);
          expect([found.loss, ...found.chosen, ...found.rejected].every(Number.isFinite)).toBe(true);
        }
    });
  });

  it('takes the policy alone without a reference, as if the reference were 0', () => {
    scope(() => {
      const zero = { ...pairs(), refChosen: list(0, 0), refRejected: list(0, 0) };
      const none = { ...pairs(), refChosen: null, refRejected: null };
      for (const lossType of ['sigmoid', 'ipo', 'ipo_sum', 'robust', 'sft'] as const)
        expect(evaluate(none, { beta: 0.3, lossType })).toEqual(evaluate(zero, { beta: 0.3, lossType }));
    });
  });

  it('robust without smoothing is sigmoid', () => {
    scope(() => {
      const robust = evaluate(pairs(), { beta: 0.3, lossType: 'robust' });
      const sigmoid = evaluate(pairs(), { beta: 0.3 });
      expect(robust.loss).toBeCloseTo(sigmoid.loss, 15);
      expect(maxDifference(robust.chosen, sigmoid.chosen)).toBeLessThan(1e-16);
    });
  });

  it('ipo divides by lengths, ipo_sum does not: by hand', () => {
    scope(() => {
      // h_w = -1, 1; h_l = 1, -1; 1/(2 beta) = 2.
      const ipo = evaluate(pairs(), { beta: 0.25, lossType: 'ipo' }).loss;
      expect(ipo).toBeCloseTo(((-1 / 2 - 1 / 4 - 2) ** 2 + (1 / 5 + 1 - 2) ** 2) / 2, 14);
      const sums = evaluate(pairs(), { beta: 0.25, lossType: 'ipo_sum' }).loss;
      expect(sums).toBeCloseTo(((-2 - 2) ** 2 + (2 - 2) ** 2) / 2, 14);
    });
  });

  it('adds several losses by weight; one loss may be named alone', () => {
    scope(() => {
      const of = (options: PreferenceLossOptions): number => evaluate(pairs(), options).loss;
      const sum = of({ beta: 0.2, lossType: ['sigmoid', 'sft', 'ipo'], lossWeights: [0.5, 2, 0] });
      expect(sum).toBeCloseTo(0.5 * of({ beta: 0.2 }) + 2 * of({ beta: 0.2, lossType: 'sft' }), 14);
      expect(of({ beta: 0.2, lossType: ['sigmoid', 'sft'] })).toBeCloseTo(
        of({ beta: 0.2 }) + of({ beta: 0.2, lossType: 'sft' }),
        14,
      );
      expect(of({ beta: 0.2, lossType: ['sft'] })).toBeCloseTo(8 / 7, 15);
    });
  });

  it('dpoLoss and margin are Eq. 1', () => {
    scope(() => {
      expect([...margin(pairs(), 0.5).dataSync()]).toEqual([-1, 1]);
      const expected = (Math.log1p(Math.exp(1)) + Math.log1p(Math.exp(-1))) / 2;
      expect(dpoLoss(pairs(), { beta: 0.5 }).item()).toBeCloseTo(expected, 15);
    });
  });

  it.each<[PreferenceLossOptions, RegExp]>([
    [{ beta: 0 }, /beta: expected a number above 0, found 0/],
    [{ beta: Number.NaN }, /beta: .* found NaN/],
    [{ beta: 1, lossType: 'robust', labelSmoothing: 0.5 }, /label smoothing: expected a number from 0 to below 0.5/],
    [{ beta: 1, labelSmoothing: 0.1 }, /has no meaning for sigmoid; robust defines it/],
    [{ beta: 1, lossType: ['sigmoid', 'sft'], lossWeights: [1] }, /loss weights: expected 2, .* found 1/],
  ])('refuses %j', (options, message) => {
    scope(() => {
      const refused = (): Tensor => preferenceLoss(pairs(), options);
      expect(refused).toThrow(KeelgradError);
      expect(refused).toThrow(message);
    });
  });

  it('refuses a loss that does not exist, and names those that do', () => {
    scope(() => {
      const refused = (): Tensor => preferenceLoss(pairs(), { beta: 1, lossType: 'sigmoidal' as never });
      expect(refused).toThrow(KeelgradError);
      expect(refused).toThrow(/sigmoidal.*sigmoid/);
    });
  });
});

describe('sftLoss', () => {
  const logProbs = (): Tensor => Tensor.from(Float64Array.of(-1, -2, -6));
  it('sum: the mean over sequences; token-mean: over tokens; divisors of a whole step on request', () => {
    scope(() => {
      expect(sftLoss(logProbs(), { reduction: 'sum', tokens: 5 }).item()).toBe(3);
      expect(sftLoss(logProbs(), { reduction: 'sum', tokens: 5, sequences: 9 }).item()).toBeCloseTo(1, 15);
      expect(sftLoss(logProbs(), { reduction: 'token-mean', tokens: 5 }).item()).toBeCloseTo(9 / 5, 15);
      expect(sftLoss(logProbs(), { reduction: 'token-mean', tokens: 45, sequences: 1 }).item()).toBeCloseTo(0.2, 15);
    });
  });
});

describe('sequenceLogProbs', () => {
  it('adds tokens by sequence, empty ones included, with a gradient of ones', () => {
    scope(() => {
      const tokens = Tensor.from(Float64Array.of(1, 2, 4, 8));
      const sequences = Tensor.from(Int32Array.of(0, 0, 2, 2));
      const [value, [g]] = valueAndGrad((t: Tensor) =>
        sequenceLogProbs(t, sequences, 4)
          .mul(Tensor.from(Float64Array.of(1, 1, 3, 1)))
          .sum(),
      )(tokens);
      expect([...sequenceLogProbs(tokens, sequences, 4).dataSync()]).toEqual([3, 0, 12, 0]);
      expect(value.item()).toBe(39);
      expect([...g.dataSync()]).toEqual([1, 1, 3, 3]);
    });
  });
});
