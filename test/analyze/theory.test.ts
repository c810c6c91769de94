// Theorem 1, its corollaries and Theorem 2 against the recorded values of an independent float64 implementation.
import { expect, it } from 'vitest';
import {
  dpoStepFlow,
  enumerateOutputs,
  firstOrderFlow,
  flowStatistics,
  gramOf,
  type MassFlow,
  massFlow,
  outputGradients,
  outputLogProbs,
} from '../../src/analyze/enumerable.js';
import { displaced, logProbsOf, SequenceGradient } from '../../src/analyze/sequences.js';
import { analyzeTheory, corollary1, corollary2 } from '../../src/analyze/theory.js';
import { loadModel } from '../../src/io/model-folder.js';
import { describeWithShared, readSharedJson, sharedPath } from '../shared.js';

const golden = (...parts: string[]): string => sharedPath('golden', 'spo', ...parts);
const read = (...parts: string[]) => readSharedJson('golden', 'spo', ...parts);
const ids = (list: readonly number[]): Int32Array => Int32Array.from(list);
const loadToy = (name: string) => loadModel(golden('enumerable', name, 'model'), { dtype: 'float64' });

function expectClose(actual: number, expected: number, relative: number, floor = 1e-12): void {
  expect(Math.abs(actual - expected)).toBeLessThanOrEqual(relative * Math.abs(expected) + floor);
}

// Floors of differences of rounded numbers. The error of the first order, down to 5e-9, is what is left of log π up to 50: one
// rounding there is 7e-15, which is 1e-6 of it. Δπ is left of numbers below 1.
const ofLogProb = 1e-13;
const ofProbability = 1e-15;

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
      expectClose(result.inner, triple.inner_g_w_g_l, 1e-9);
      expectClose(result.corollary2.logDifference, triple.norm_diff_sq, 1e-9);
      expectClose(result.corollary2.logDifference * result.weight, triple.corollary2_log_per_eta, 1e-9);
      expectClose(result.corollary1.lowerChosen, triple.corollary1_per_eta.lower_bound_dlogp_w, 1e-8);
      expectClose(result.corollary1.upperRejected, triple.corollary1_per_eta.upper_bound_dlogp_l, 1e-8);
      for (const [k, change] of result.sequences.entries()) {
        expectClose(change.logProb, triple.logps[k], 1e-10);
        expectClose(change.innerChosen, triple.inner_with_g_w[k], 1e-8);
        expectClose(change.innerRejected, triple.inner_with_g_l[k], 1e-8);
        expectClose(change.predictedPerStepSize, triple.predicted_dlogp_per_eta[k], 1e-8);
        change.measured.forEach((value, e) => {
          const { eta, dlogp, error, error_over_eta_squared } = triple.steps[e];
          expectClose(value, dlogp[k], 1e-8, ofLogProb);
          expectClose(change.error[e], error[k], 1e-8, ofLogProb);
          expectClose(change.error[e] / eta ** 2, error_over_eta_squared[k], 1e-8, ofLogProb / eta ** 2);
        });
        change.order.forEach((order, e) => {
          const ratio = (etas[e] / etas[e + 1]) ** order;
          const noise = (2 * ofLogProb) / Math.abs(triple.steps[e + 1].error[k]);
          expectClose(ratio, Math.abs(triple.error_ratios_between_steps[e][k]), 1e-8 + noise);
        });
      }
      const [w, l] = result.sequences;
      for (const [e, { eta, dlogp_w_minus_dlogp_l, corollary1_bounds_hold }] of triple.steps.entries()) {
        expectClose(w.measured[e] - l.measured[e], dlogp_w_minus_dlogp_l, 1e-9, 2 * ofLogProb);
        const { lowerChosen, upperRejected, heldChosen, heldRejected } = result.corollary1;
        expect([heldChosen[e], heldRejected[e]]).toEqual(corollary1_bounds_hold);
        expect([w.measured[e] / eta >= lowerChosen, l.measured[e] / eta <= upperRejected]).toEqual(
          corollary1_bounds_hold,
        );
      }
      const order = result.sequences.map((s) => s.order[1]).sort((a, b) => a - b);
      expect(order[Math.floor(order.length / 2)]).toBeCloseTo(2, 1);
    }
  });
});

interface MeasuredStep {
  readonly eta: number;
  readonly pi_after: readonly number[];
  readonly dpi_w_minus_dpi_l: number;
  readonly dlogpi_w_minus_dlogpi_l: number;
}

describeWithShared('corollary2.json', 'golden/spo/corollary2.json', () => {
  it('the flow to first order, and how measured steps near it', () => {
    for (const { pi, g_w, g_l, g_other, beta, s, per_eta, steps } of read('corollary2.json').rows) {
      const logProbs = pi.map(Math.log);
      const rows = [g_w, g_l, g_other].map((g: number[]) => Float64Array.from(g));
      // Eq. of the scores: Σ π g = 0.
      for (const i of [0, 1]) expect(Math.abs(rows.reduce((t, g, y) => t + pi[y] * g[i], 0))).toBeLessThan(1e-15);
      const weight = beta / (1 + Math.exp(s));
      const flow = firstOrderFlow(logProbs, gramOf(rows), 0, 1);
      flow.change.forEach((c, y) => {
        expectClose(weight * c, per_eta.dpi[y], 1e-12, 1e-15);
      });
      const square = (g: Float64Array): number => gramOf([g])[0][0];
      const { logDifference } = corollary2({
        squaredChosen: square(rows[0]),
        squaredRejected: square(rows[1]),
        inner: gramOf(rows)[0][1],
        logProbChosen: logProbs[0],
        logProbRejected: logProbs[1],
      });
      expectClose(weight * logDifference, per_eta.dlogpi_w_minus_dlogpi_l, 1e-12);
      const errors = steps.map((step: MeasuredStep) => {
        const { eta, pi_after, dpi_w_minus_dpi_l, dlogpi_w_minus_dlogpi_l } = step;
        // A step along the gradient of the pair, and the model at its end.
        const unnormalized = rows.map((g, y) =>
          Math.exp(logProbs[y] + eta * weight * g.reduce((t, x, i) => t + x * (rows[0][i] - rows[1][i]), 0)),
        );
        const sum = unnormalized.reduce((a, b) => a + b);
        pi_after.forEach((p, y) => {
          expectClose(unnormalized[y] / sum, p, 1e-14);
        });
        const measured = massFlow(
          logProbs,
          pi_after.map((p, y) => p - pi[y]),
          0,
          1,
        );
        expectClose(measured.change[0] - measured.change[1], dpi_w_minus_dpi_l, 1e-9, 1e-16);
        expectClose(dlogpi_w_minus_dlogpi_l / eta, weight * logDifference, 1e-2);
        return Math.abs(dpi_w_minus_dpi_l / eta - per_eta.dpi_w_minus_dpi_l);
      });
      // From η = 0.01 to 0.0001: of first order in η.
      expect(errors[1]).toBeLessThan(errors[0] / 50 + 1e-10);
    }
  });

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

// The recording's PyTorch gives the padding id, 0, no lookup gradient (nn.Embedding's padding_idx). Ours is the derivative:
// gradients are compared with that row of the embedding taken out.
const readsPadding = (output: Int32Array): boolean => output.subarray(0, -1).includes(0);

type Toy = Awaited<ReturnType<typeof loadToy>>;

/** ∇ log π without the row of the padding id. */
function withoutPadding(model: Toy, promptIds: Int32Array, responseIds: Int32Array): SequenceGradient {
  const g = SequenceGradient.of(model, { promptIds, responseIds }, ['backbone']);
  expect([...model.backbone.keys()][0]).toBe('model.embed_tokens.weight');
  const values = g.tensors[0].dataSync() as Float64Array;
  g.tensors[0].write(Float64Array.from(values).fill(0, 0, model.config.hiddenSize));
  return g;
}

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
        recorded.sum_of_probabilities,
        1e-12,
      );
      const falling = outputs.map((_, k) => k).sort((a, b) => logProbs[b] - logProbs[a]);
      for (const { index, rank_by_probability: ranks } of recorded.triples)
        for (const [name, k] of Object.entries<number>(index)) expect(falling.indexOf(k), name).toBe(ranks[name]);
    });

    it('one DPO step: the flow of probability to every output', async () => {
      using model = await loadToy(name);
      for (const triple of recorded.triples) {
        const { y_w: w, y_l: l, y_star: star } = triple.index;
        using chosen = withoutPadding(model, prompt, outputs[w]);
        using rejected = withoutPadding(model, prompt, outputs[l]);
        const [squaredChosen, squaredRejected, inner] = [
          await chosen.squaredNorm(),
          await rejected.squaredNorm(),
          await chosen.dot(rejected),
        ];
        expectClose(Math.sqrt(squaredChosen), triple.norm_g.y_w, 1e-10);
        expectClose(Math.sqrt(squaredRejected), triple.norm_g.y_l, 1e-10);
        expectClose(inner, triple.inner, 1e-10, 1e-10);
        const before: number[] = recorded.logp_before;
        const { ref_chosen_logps: refChosenLogp, ref_rejected_logps: refRejectedLogp } = triple;
        const s = recorded.beta * (before[w] - refChosenLogp - (before[l] - refRejectedLogp));
        expectClose(s, triple.s, 1e-10, 1e-12);
        expectClose(Math.log1p(Math.exp(-s)), triple.L_DPO, 1e-10);
        const step = (recorded.eta * recorded.beta) / (1 + Math.exp(s));
        const moves = [
          { step, along: chosen },
          { step: -step, along: rejected },
        ];
        const sequences = outputs.map((responseIds) => ({ promptIds: prompt, responseIds }));
        const after = await displaced(model, ['backbone'], moves, (moved) => logProbsOf(model, moved, sequences));
        const change = after.map((value, k) => Math.exp(value) - Math.exp(before[k]));
        expectFlow(massFlow(before, change, w, l), triple);
        const firstOrder = outputs.map((_, k) => k).filter((k) => [w, l, star].includes(k));
        const errors: number[] = [];
        for (const [k, output] of outputs.entries()) {
          using g = withoutPadding(model, prompt, output);
          const predicted = step * Math.exp(before[k]) * ((await g.dot(chosen)) - (await g.dot(rejected)));
          errors.push(Math.abs(predicted - change[k]));
          const which = k === w ? 'y_w' : k === l ? 'y_l' : 'y_star';
          if (firstOrder.includes(k)) expectClose(predicted, triple.dp_first_order[which], 1e-9, 1e-13);
        }
        expectClose(Math.max(...errors), triple.max_abs_error_of_first_order, 1e-8, ofProbability);
        const { dp_w_minus_dp_l, claimed_lower_bound, probability_form_holds, dlogp_w_minus_dlogp_l, log_form } =
          triple.corollary2;
        const found = corollary2({
          squaredChosen,
          squaredRejected,
          inner,
          logProbChosen: before[w],
          logProbRejected: before[l],
        });
        expectClose(change[w] - change[l], dp_w_minus_dp_l, 1e-8, ofProbability);
        expectClose(after[w] - before[w] - (after[l] - before[l]), dlogp_w_minus_dlogp_l, 1e-8, ofLogProb);
        expectClose(step * found.logDifference, log_form, 1e-9);
        const unit = step * Math.exp(Math.max(before[w], before[l]));
        expectClose(unit * found.claimedBound, claimed_lower_bound, 1e-9);
        expect(found.boundHolds).toBe(probability_form_holds);
        if (readsPadding(outputs[w]) || readsPadding(outputs[l])) continue;
        const pair = { chosen: w, rejected: l, refChosenLogp, refRejectedLogp };
        const options = { beta: recorded.beta, stepSize: recorded.eta };
        expectFlow(await dpoStepFlow(model, prompt, outputs, pair, options), triple);
      }
    });

    // biome-ignore lint/suspicious/noExplicitAny: a recorded triple
    function expectFlow(flow: MassFlow, triple: any): void {
      const { y_w: w, y_l: l, y_star: star } = triple.index;
      expect(flow.star).toBe(star);
      expect(flow.case).toBe(['case 1', 'case 2', 'both rise'][triple.case - 1]);
      flow.change.forEach((value, k) => {
        expectClose(value, Math.exp(triple.logp_after[k]) - Math.exp(recorded.logp_before[k]), 1e-8, ofProbability);
      });
      for (const [key, k] of [
        ['y_w', w],
        ['y_l', l],
        ['y_star', star],
      ] as const)
        expectClose(flow.change[k], triple.dp[key], 1e-8, ofProbability);
      expectClose(Math.max(...flow.change.map(Math.abs)), triple.max_abs_dp, 1e-8);
      expectClose(flow.moved, triple.gained_mass, 1e-8);
      expectClose(flow.shareToStar, triple.share_to_y_star, 1e-8);
      expectClose(flow.shareToChosen, triple.share_to_y_w, 1e-8);
      const toRejected = Math.max(0, flow.change[l]) / flow.moved;
      const toOthers = 1 - flow.shareToStar - flow.shareToChosen - toRejected;
      expectClose(toOthers, triple.share_to_all_others, 1e-8);
      expect([...outputs[flow.largestGainer]]).toEqual(triple.gains_most);
      expectClose(
        flow.change.reduce((a, b) => a + b, 0),
        0,
        0,
        1e-12,
      );
    }

    it('first-order flows of all pairs, by case', async () => {
      using model = await loadToy(name);
      const logProbs = await outputLogProbs(model, prompt, outputs);
      const rows = await outputGradients(model, prompt, outputs);
      // Probabilities add up to one at all weights: Σ π g = 0, up to rounding as it was recorded.
      const total = rows[0].map((_, i) => rows.reduce((sum, row, k) => sum + Math.exp(logProbs[k]) * row[i], 0));
      expect(recorded.max_abs_of_sum_pi_g).toBeLessThan(1e-14);
      expect(Math.max(...total.map(Math.abs))).toBeLessThan(1e-14);
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
      expectSigns(logProbs, gramOf(rows), theirs);
    });

    /** Of all ordered pairs: what Corollaries 1 and 2 promise of them, counted. */
    function expectSigns(logProbs: number[], gram: Float64Array[], theirs: Record<string, number>): void {
      const counts = { pairs: 0, rising: 0, longer: 0, positive: 0, negative: 0, violated: 0, without: 0 };
      for (let w = 0; w < logProbs.length; w++)
        for (let l = 0; l < logProbs.length; l++) {
          if (w === l) continue;
          const [squaredChosen, squaredRejected, inner] = [gram[w][w], gram[l][l], gram[w][l]];
          const parts = { squaredChosen, squaredRejected, inner };
          const result = corollary2({ ...parts, logProbChosen: logProbs[w], logProbRejected: logProbs[l] });
          const { promises } = corollary1(1, Math.sqrt(squaredChosen), Math.sqrt(squaredRejected));
          const falls = squaredChosen < inner;
          counts.pairs++;
          counts.rising += Number(falls && inner > squaredRejected);
          counts.longer += Number(falls && promises !== 'rejected falls');
          counts.positive += Number(inner > 0);
          counts.negative += Number(result.differenceNegative);
          counts.violated += Number(!result.boundHolds);
          counts.without += Number(!result.boundHolds && inner <= 0);
        }
      expect(counts).toEqual({
        pairs: theirs.ordered_pairs,
        rising: theirs.case1_with_y_l_rising,
        longer: theirs.case1_with_norm_g_w_at_least_norm_g_l,
        positive: theirs.inner_product_positive,
        negative: theirs.corollary2_probability_form_difference_negative,
        violated: theirs.corollary2_probability_form_bound_violated,
        without: theirs.corollary2_bound_violated_with_nonpositive_inner_product,
      });
      expectClose(Math.exp(Math.max(...logProbs)), theirs.top_probability, 1e-12);
    }
  });

it.each([
  [{ beta: 0 }, /beta: expected a finite number above 0, found 0/],
  [{ beta: -1 }, /beta: .* found -1/],
  [{ beta: Number.NaN }, /beta: .* found NaN/],
  [{ beta: Number.POSITIVE_INFINITY }, /beta: .* found Infinity/],
  [{ stepSizes: [] }, /step sizes: expected finite numbers above 0, found none/],
  [{ stepSizes: [1e-3, 0] }, /step sizes: .* found 0/],
  [{ stepSizes: [1e-3, -1e-4] }, /step sizes: .* found -0.0001/],
  [{ stepSizes: [Number.NaN] }, /step sizes: .* found NaN/],
  [{ stepSizes: [Number.POSITIVE_INFINITY, 1] }, /step sizes: .* found Infinity/],
  [{ stepSizes: [1, 3, 2] }, /step sizes: expected different ones in falling order, found 1, 3, 2; try 3, 2, 1/],
  [{ stepSizes: [2, 2, 1] }, /falling order, found 2, 2, 1; try 2, 1$/],
])('refuses %j, before it looks at the model', async (wrong, message) => {
  const options = { beta: 0.5, stepSizes: [1e-3, 1e-4], ...wrong };
  await expect(analyzeTheory(undefined as never, [], options)).rejects.toThrow(message);
});

it('a flow without movement has no shares', () => {
  const flow = massFlow([-1, -2, -3], [0, 0, 0], 0, 1);
  expect(flow).toMatchObject({ moved: 0, shareToStar: 0, shareToChosen: 0, star: 2 });
});

it('refuses spaces that cannot be enumerated', () => {
  expect(() => enumerateOutputs(50_000, 2)).toThrow(/expected at most 20000 outputs, found 50000\^2/);
});
