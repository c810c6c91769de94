// Theorem 1, its corollaries and Theorem 2 against the recorded values of an independent float64 implementation.
import { expect, it } from 'vitest';
import {
  dpoStepFlow,
  enumerateOutputs,
  flowStatistics,
  gramOf,
  massFlow,
  outputGradients,
  outputLogProbs,
} from '../../src/analyze/enumerable.js';
import { analyzeTheory, corollary2 } from '../../src/analyze/theory.js';
import { loadModel } from '../../src/io/model-folder.js';
import { describeWithShared, readSharedJson, sharedPath } from '../shared.js';

const golden = (...parts: string[]): string => sharedPath('golden', 'spo', ...parts);
const read = (...parts: string[]) => readSharedJson('golden', 'spo', ...parts);
const ids = (list: readonly number[]): Int32Array => Int32Array.from(list);
const loadToy = (name: string) => loadModel(golden('enumerable', name, 'model'), { dtype: 'float64' });

function expectClose(actual: number, expected: number, relative: number, floor = 1e-12): void {
  expect(Math.abs(actual - expected)).toBeLessThanOrEqual(relative * Math.abs(expected) + floor);
}

describeWithShared('theory.json', 'golden/spo/qwen2/theory.json', () => {
  const theory = read('qwen2', 'theory.json');
  it('predictions, bounds, measured changes and their order', async () => {
    using model = await loadModel(golden('qwen2', 'model'), { dtype: 'float64', adapter: golden('qwen2', 'adapter') });
    const batch = read('qwen2', 'batch.json');
    const [pairs] = batch.batches;
    const etas: number[] = theory.triples[0].steps.map((step: { eta: number }) => step.eta);
    const given = theory.triples.map((triple: { pair: number; sequences: number[][] }) => {
      const pair = pairs[triple.pair];
      const [w, l, ...others] = triple.sequences.map(ids);
      return {
        promptIds: ids(pair.prompt),
        chosenIds: w,
        rejectedIds: l,
        others,
        refChosenLogp: pair.ref_chosen_logps,
        refRejectedLogp: pair.ref_rejected_logps,
      };
    });
    const results = await analyzeTheory(model, given, { beta: theory.beta, stepSizes: etas });
    expect(results).toHaveLength(theory.triples.length);
    for (const [t, result] of results.entries()) {
      const triple = theory.triples[t];
      expectClose(result.s, triple.s, 1e-9, 1e-10);
      expectClose(result.weight, triple.beta_one_minus_sigma, 1e-9);
      expectClose(result.normChosen, triple.norm_g_w, 1e-9);
      expectClose(result.normRejected, triple.norm_g_l, 1e-9);
      expectClose(result.inner, triple.inner_g_w_g_l, 1e-9, 1e-8);
      expectClose(result.corollary2.logDifference * result.weight, triple.corollary2_log_per_eta, 1e-9);
      expectClose(result.corollary1.lowerChosen, triple.corollary1_per_eta.lower_bound_dlogp_w, 1e-8);
      expectClose(result.corollary1.upperRejected, triple.corollary1_per_eta.upper_bound_dlogp_l, 1e-8);
      for (const [k, change] of result.sequences.entries()) {
        expectClose(change.logProb, triple.logps[k], 1e-10);
        expectClose(change.innerChosen, triple.inner_with_g_w[k], 1e-8, 1e-8);
        expectClose(change.innerRejected, triple.inner_with_g_l[k], 1e-8, 1e-8);
        expectClose(change.predictedPerStepSize, triple.predicted_dlogp_per_eta[k], 1e-8, 1e-8);
        change.measured.forEach((value, e) => {
          expectClose(value, triple.steps[e].dlogp[k], 1e-7, 1e-11);
        });
      }
      const order = result.sequences.map((s) => s.order[1]).sort((a, b) => a - b);
      expect(order[Math.floor(order.length / 2)]).toBeCloseTo(2, 1);
    }
  });
});

describeWithShared('corollary2.json', 'golden/spo/corollary2.json', () => {
  it('finds where the probability form fails', () => {
    for (const row of read('corollary2.json').rows) {
      const [w, l] = row.pi;
      const square = (g: number[]): number => g.reduce((total, x) => total + x * x, 0);
      const result = corollary2({
        squaredChosen: square(row.g_w),
        squaredRejected: square(row.g_l),
        inner: row.inner,
        logProbChosen: Math.log(w),
        logProbRejected: Math.log(l),
      });
      const unit = row.beta * (1 - 1 / (1 + Math.exp(-row.s))) * Math.max(w, l);
      expect(result.differenceNegative).toBe(row.difference_negative);
      expect(result.boundHolds).toBe(row.claimed_bound_holds);
      expectClose(result.probabilityDifference * unit, row.per_eta.dpi_w_minus_dpi_l, 1e-12);
      expectClose(result.claimedBound * unit, row.per_eta.claimed_lower_bound, 1e-12);
    }
  });
});

// The recording's PyTorch gives the padding id, 0, no lookup gradient (nn.Embedding's padding_idx). Ours is the derivative,
// so pairs that read a 0 are compared with that row taken out, or left out.
const readsPadding = (output: Int32Array): boolean => output.subarray(0, -1).includes(0);

for (const name of ['flat', 'peaked'])
  describeWithShared(`enumerable/${name}`, `golden/spo/enumerable/${name}/theorem2.json`, () => {
    const recorded = read('enumerable', name, 'theorem2.json');
    const prompt = ids(recorded.prompt);
    const outputs = enumerateOutputs(recorded.vocab, 3);

    it('probabilities of all outputs', async () => {
      using model = await loadToy(name);
      const logProbs = await outputLogProbs(model, prompt, outputs);
      logProbs.forEach((value, k) => {
        expectClose(value, recorded.logp_before[k], 1e-12);
      });
      expectClose(
        logProbs.reduce((total, value) => total + Math.exp(value), 0),
        1,
        1e-12,
      );
    });

    it('one DPO step: the flow of probability to every output', async () => {
      using model = await loadToy(name);
      for (const triple of recorded.triples) {
        const { y_w: chosen, y_l: rejected, y_star: star } = triple.index;
        if (readsPadding(outputs[chosen]) || readsPadding(outputs[rejected])) continue;
        const flow = await dpoStepFlow(
          model,
          prompt,
          outputs,
          { chosen, rejected, refChosenLogp: triple.ref_chosen_logps, refRejectedLogp: triple.ref_rejected_logps },
          { beta: recorded.beta, stepSize: recorded.eta },
        );
        expect(flow.star).toBe(star);
        flow.change.forEach((value, k) => {
          expectClose(value, Math.exp(triple.logp_after[k]) - Math.exp(recorded.logp_before[k]), 1e-7, 1e-12);
        });
        expectClose(flow.moved, triple.gained_mass, 1e-8);
        expectClose(flow.shareToStar, triple.share_to_y_star, 1e-7);
        expectClose(flow.shareToChosen, triple.share_to_y_w, 1e-7);
        expect([...outputs[flow.largestGainer]]).toEqual(triple.gains_most);
        expectClose(
          flow.change.reduce((a, b) => a + b, 0),
          0,
          0,
          1e-12,
        );
      }
    });

    it('first-order flows of all pairs, by case', async () => {
      using model = await loadToy(name);
      const logProbs = await outputLogProbs(model, prompt, outputs);
      const rows = await outputGradients(model, prompt, outputs);
      expect([...model.backbone.keys()][0]).toBe('model.embed_tokens.weight');
      for (const row of rows) row.fill(0, 0, model.config.hiddenSize);
      const statistics = flowStatistics(logProbs, gramOf(rows));
      const theirs = recorded.statistics_of_all_ordered_pairs;
      for (const [ours, key] of [
        ['case 1', 'case1_y_w_falls'],
        ['case 2', 'case2_y_w_rises_y_l_falls'],
        ['both rise', 'case3_both_rise'],
      ] as const) {
        const found = statistics[ours];
        expect(found.pairs).toBe(theirs[key].pairs);
        expect(found.starGains).toBe(theirs[key].y_star_gains);
        expect(found.starGainsMost).toBe(theirs[key].y_star_gains_most);
        expect(found.chosenGainsMost).toBe(theirs[key].y_w_gains_most);
        expectClose(found.meanShareToStar, theirs[key].mean_share_of_gained_mass_to_y_star, 1e-8);
        expectClose(found.meanShareToChosen, theirs[key].mean_share_of_gained_mass_to_y_w, 1e-8);
      }
    });
  });

it('a flow without movement has no shares', () => {
  const flow = massFlow([-1, -2, -3], [0, 0, 0], 0, 1);
  expect(flow).toMatchObject({ moved: 0, shareToStar: 0, shareToChosen: 0, star: 2 });
});

it('refuses spaces that cannot be enumerated', () => {
  expect(() => enumerateOutputs(50_000, 2)).toThrow(/expected at most 20000 outputs, found 50000\^2/);
});
