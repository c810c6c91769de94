// What the recordings of preference losses say besides values and gradients: scores, metrics, parts of losses, refusals.
import { existsSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { valueAndGrad } from '../../src/autograd/transforms.js';
import { KeelgradError } from '../../src/errors.js';
import {
  completeParameters,
  implicitReward,
  ktoKl,
  lengthDesensitizedWeights,
  preferenceLoss,
  preferenceLosses,
  sequenceLogProbs,
  sftLoss,
} from '../../src/objectives/index.js';
import { chosenNll } from '../../src/objectives/preference.js';
import { add, mul } from '../../src/ops/elementwise.js';
import { scope } from '../../src/tensor/scope.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { labelledMetrics, pairMetrics } from '../../src/train/batch-metrics.js';
import { describeWithShared, readSharedJson, sharedPath } from '../shared.js';
import {
  type Batch,
  type Case,
  casesOf,
  type Entry,
  evaluate,
  FILE,
  type Labelled,
  pairsOf,
  places,
  type Ragged,
  relative,
  sums,
  total,
  upload,
  worst,
} from './recorded-losses.js';

const statistics = { entropy: [], argmax: [], meanLogit: [] } as never;
/** A packed batch as metrics of whole responses look at it: its lengths. */
const ofLengths = (lengths: readonly number[]): never =>
  ({ lengths, targetIds: [], sequences: [], targetRows: [] }) as never;

const list = (t: Tensor): number[] => [...t.dataSync()] as number[];
const mean = (values: readonly number[]): number => total(values) / values.length;

/** TRL logs metrics as float32. */
const logged = 1e-6;

describeWithShared('the recordings of losses', FILE, () => {
  const golden = existsSync(sharedPath(FILE))
    ? readSharedJson(FILE)
    : { trl: [], reference: [], batches: {}, trl_refusals: [] };
  const cases = casesOf(golden);
  const trl = golden.trl as Entry[];
  const batchOf = (name: string): Batch => golden.batches[name];
  const entryOf = ({ id }: Case): Entry => [...trl, ...(golden.reference as Entry[])].find((e) => e.id === id)!;

  it('LD-DPO: the scores of policy and reference, from weighted tokens', () => {
    const weighted = cases.filter(({ results }) => results.some((r) => r.logps_used));
    expect(weighted.map(({ ldAlpha }) => ldAlpha)).toEqual([0, 0.5, 1, 0.5, 0.5]);
    for (const { ldAlpha, results } of weighted)
      for (const { batch: name, logps_used } of results)
        scope(() => {
          const batch = batchOf(name);
          const pairs = batch.chosen_lengths.length;
          const weights = upload([
            ...lengthDesensitizedWeights(batch.chosen_lengths, batch.rejected_lengths, ldAlpha!),
          ]);
          const score = (chosen: Ragged, rejected: Ragged): number[] => {
            const sequences = Tensor.from(Int32Array.from([...places(chosen), ...places(rejected, pairs)]));
            return list(sequenceLogProbs(mul(upload([...chosen, ...rejected].flat()), weights), sequences, 2 * pairs));
          };
          const policy = score(batch.policy_chosen_token_logps, batch.policy_rejected_token_logps);
          const reference = score(batch.ref_chosen_token_logps, batch.ref_rejected_token_logps);
          const { chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps } = logps_used!;
          expect(worst(policy, [...chosen_logps, ...rejected_logps])).toBeLessThan(1e-12);
          expect(worst(reference, [...ref_chosen_logps, ...ref_rejected_logps])).toBeLessThan(1e-12);
        });
  });

  it("beta-DPO: the beta of a batch, read off the loss and its slope: β' = -dL/dh / σ(-β'h)", () => {
    const found = cases.filter(({ results }) => results.some((r) => r.beta_used !== undefined));
    expect(found).toHaveLength(4);
    for (const { options, results, ...rest } of found)
      for (const result of results)
        scope(() => {
          const c: Case = { ...rest, results, options };
          const pairs = pairsOf(batchOf(result.batch), c);
          const each = (chosen: Tensor): Tensor =>
            preferenceLosses.beta_dpo.value({ ...pairs, chosen }, completeParameters(options));
          const [, [slope]] = valueAndGrad((chosen: Tensor) => each(chosen).sum())(pairs.chosen);
          const [losses, slopes] = [list(each(pairs.chosen)), list(slope)];
          const betas = losses.flatMap((loss, i) => (loss > 1e-100 ? [slopes[i] / Math.expm1(-loss)] : []));
          expect(betas.length).toBeGreaterThan(3);
          for (const beta of betas) expect(Math.abs(beta / result.beta_used! - 1)).toBeLessThan(1e-12);
        });
  });

  it('the NLL of a batch beside the losses of its pairs', () => {
    const found = cases.filter(({ results }) => results.some((r) => r.batch_term !== undefined));
    expect(new Set(found.map((c) => entryOf(c).loss))).toEqual(new Set(['dpo_nll', 'cpo', 'orpo']));
    for (const { options, promptNll, results } of found)
      for (const { batch: name, batch_term, per_example_loss, loss } of results)
        scope(() => {
          const batch = batchOf(name);
          const pairs = pairsOf(batch, { id: '', options, results, reference: true });
          const prompts = batch.policy_prompt_token_logps;
          const tokens = total(batch.chosen_lengths) + prompts.flat().length;
          const term = promptNll
            ? sftLoss(add(pairs.chosen, upload(sums(prompts))), { reduction: 'token-mean', tokens }).item()
            : (options.nllWeight ?? 1) * chosenNll(pairs, options.nllReduction).item();
          expect(relative(term, batch_term!)).toBeLessThan(1e-12);
          expect(relative(mean(per_example_loss!) + term, loss)).toBeLessThan(1e-12);
        });
  });

  describe("TRL's metrics", () => {
    /** Its trainers without a reference log, as `logps`, means over tokens with these losses. Ours are sums. */
    const perToken = ['ipo', 'simpo', 'alphapo', 'orpo'];
    const meanScores = (batch: Batch): Record<string, number> => {
      const of = (values: readonly number[], lengths: readonly number[]): number =>
        mean(values.map((x, i) => x / lengths[i]));
      return {
        'logps/chosen': of(batch.policy_chosen_logps, batch.chosen_lengths),
        'logps/rejected': of(batch.policy_rejected_logps, batch.rejected_lengths),
      };
    };

    it.each(cases.filter(({ results }) => results.some((r) => r.metrics)))('$id $options', (c) => {
      for (const result of c.results)
        scope(() => {
          const batch = batchOf(result.batch);
          const pairs = pairsOf(batch, c);
          const { chosen, rejected, refChosen, refRejected } = pairs;
          const values = {
            chosen: list(chosen),
            rejected: list(rejected),
            refChosen: refChosen && list(refChosen),
            refRejected: refRejected && list(refRejected),
          };
          const packed = ofLengths([...batch.chosen_lengths, ...batch.rejected_lengths]);
          const { log_odds_ratio, log_odds_chosen, nll_loss, ...expected } = result.metrics!;
          const found: Record<string, number> = pairMetrics(packed, statistics, values, implicitReward(c.options));
          const means = !c.reference && perToken.includes([c.options.lossType].flat()[0]!);
          if (means) Object.assign(found, meanScores(batch));
          for (const [name, value] of Object.entries(expected))
            expect(relative(found[name], value), name).toBeLessThan(logged);
          // TRL logs a 0 without the term, and ORPO's over prompts as well.
          const nll = c.options.nllWeight === 0 || c.options.lossType === 'alphapo' ? 0 : chosenNll(pairs).item();
          if (nll_loss !== undefined && !c.promptNll) expect(relative(nll, nll_loss)).toBeLessThan(logged);
          if (log_odds_ratio === undefined) return;
          const q = completeParameters(c.options);
          const losses = list(preferenceLosses.orpo.value(pairs, q)).map((loss) => loss / q.orpoLambda);
          expect(relative(-mean(losses), log_odds_ratio)).toBeLessThan(logged);
          expect(relative(mean(losses.map((loss) => -Math.log(Math.expm1(loss)))), log_odds_chosen)).toBeLessThan(
            logged,
          );
        });
    });

    it.each(trl.filter(({ trainer }) => trainer === 'KTOTrainer'))('KTO: $id $config', ({ config, results }) => {
      for (const result of results)
        scope(() => {
          const examples: readonly Labelled[] = golden.kto_batches[result.batch];
          const scores = (key: Exclude<keyof Labelled, 'label'>): number[] => sums(examples.map((e) => e[key]));
          const [policy, reference] = [scores('policy_token_logps'), scores('ref_token_logps')];
          const desirable = examples.map(({ label }) => label);
          const packed = ofLengths(examples.map((e) => e.policy_token_logps.length));
          const found: Record<string, number> = labelledMetrics(
            [{ packed, statistics, policy, reference, desirable }],
            implicitReward({ beta: config.beta, lossType: config.loss_type }),
          );
          const { kl, ...expected } = result.metrics!;
          for (const [name, value] of Object.entries(expected))
            expect(relative(found[name], value), name).toBeLessThan(logged);
          expect(
            Object.keys(found)
              .filter((name) => /^(rewards|logps).*(chosen|rejected)$/.test(name))
              .sort(),
          ).toEqual(
            Object.keys(expected)
              .filter((name) => name !== 'rewards/margins')
              .sort(),
          );
          // apo_zero_unpaired has no KL estimate; TRL logs a 0.
          const estimate = ktoKl(upload(scores('kl_policy_token_logps')), upload(scores('kl_ref_token_logps'))).item();
          expect(relative(config.loss_type === 'kto' ? estimate : 0, kl)).toBeLessThan(logged);
        });
    });
  });

  describe('what TRL refuses or fails on', () => {
    /** Ours to each: a refusal, or none where TRL stumbles over its own tensors. */
    const answers: readonly (RegExp | null)[] = [
      /exo_pair needs a label smoothing above 0/,
      /weights of pairs have no meaning for aot: it sorts the batch/,
      /weights of pairs have no meaning for sft: it is one mean over the tokens/,
      null,
      /nca_pair has no f-divergence/,
      /loss weights: expected 2, one per loss type, found 1/,
    ];

    it('is all answered', () => {
      expect(golden.trl_refusals).toHaveLength(answers.length);
    });

    it.each((golden.trl_refusals as Entry[]).map((e, i) => [e.config, i] as const))('%j', (config, i) => {
      const [c] = casesOf({ trl: [{ id: '', trainer: 'DPOTrainer', config, results: [] }], reference: [] });
      const run = () => evaluate(batchOf('mixed'), c);
      const answer = answers[i];
      if (answer) {
        expect(run).toThrow(KeelgradError);
        expect(run).toThrow(answer);
        return;
      }
      expect(c.options.lossType).toEqual(['hinge']);
      scope(() => {
        const pairs = pairsOf(batchOf('mixed'), c);
        const each = list(preferenceLosses.hinge.value(pairs, completeParameters(c.options)));
        const weights = list(pairs.weights!);
        expect(
          relative(preferenceLoss(pairs, c.options).item(), mean(each.map((x, k) => x * weights[k]))),
        ).toBeLessThan(1e-14);
        expect(Math.abs(weights[0] - 1)).toBeGreaterThan(0.1);
      });
    });
  });
});
