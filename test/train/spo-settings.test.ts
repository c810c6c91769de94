// One outer iteration of SPO against the recorded settings: F, its parts, its gradient, its terms; and what it is not.
import { describe, expect, it } from 'vitest';
import { pairGradients } from '../../src/analyze/sequences.js';
import type { PreferenceExample } from '../../src/data/tokenize.js';
import type { PreferenceLossName } from '../../src/objectives/index.js';
import { completeParameters, preferenceLoss, preferenceLosses, sftLoss } from '../../src/objectives/index.js';
import { cast } from '../../src/ops/movement.js';
import { firstStep } from '../../src/optim/bilevel/first-step.js';
import { scope } from '../../src/tensor/scope.js';
import { Tensor } from '../../src/tensor/tensor.js';
import type { Metrics } from '../../src/train/hooks.js';
import { PreferenceObjective } from '../../src/train/preference-objective.js';
import { SpoTask, type SpoTaskOptions } from '../../src/train/spo-task.js';
import { Trainable } from '../../src/train/task.js';
import {
  both,
  examplesOf,
  GOLDEN_SPO,
  gradientOf,
  groupPart,
  type ModelName,
  modelNames,
  namesOf,
  onHost,
  openSpoModel,
  type Precision,
  pairLogProbsOf,
  readSpo,
  spoFile,
} from '../objectives/spo-support.js';
import { describeWithShared } from '../shared.js';
import { difference, norm, readTensors, relativeError, type Tensors } from './support.js';

interface Evaluation {
  readonly metrics: Metrics;
  readonly gradient: Tensors;
}

const referenceOf = (examples: readonly PreferenceExample[]) => ({
  chosen: Float64Array.from(examples, (e) => e.refChosenLogp!),
  rejected: Float64Array.from(examples, (e) => e.refRejectedLogp!),
});

/** What one step measures and accumulates, for the batch taken as these micro-batches. */
async function evaluate(
  name: ModelName,
  dtype: Precision,
  options: SpoTaskOptions,
  microBatches: number[][] = [[0, 1, 2, 3]],
): Promise<Evaluation> {
  using model = await openSpoModel(name, dtype);
  const examples = examplesOf(name);
  const trainable = new Trainable(model, both);
  const task = new SpoTask(trainable, examples, referenceOf(examples), options, () => model.backbone);
  const { losses, metrics } = await task.accumulate({ step: 0, microBatches });
  const buffers = both.flatMap((g) => [...trainable.gradients.get(g)!.buffers.values()]);
  const gradient = onHost(namesOf(model), buffers);
  for (const t of losses) t.dispose();
  trainable.dispose();
  return { metrics: await metrics, gradient };
}

interface Setting {
  readonly name: string;
  readonly lambda: number;
  readonly gamma: number;
  readonly K: number;
  readonly alpha: number;
  readonly over: SpoTaskOptions['normOver'];
  readonly sft: SpoTaskOptions['sftReduction'];
  readonly beta: number;
}

const optionsOf = ({ lambda, gamma, K, alpha, over, sft, beta }: Setting): SpoTaskOptions => ({
  beta,
  lambda,
  gamma,
  lowerSteps: K,
  lowerLearningRate: alpha,
  normOver: over,
  sftReduction: sft,
});

// biome-ignore lint/suspicious/noExplicitAny: a recorded setting
const settingOf = (name: ModelName, setting: string): any =>
  readSpo(name, 'spo.json').settings.find((s: Setting) => s.name === setting);

const settings: readonly (readonly [ModelName, string])[] = [
  ...['A', 'B', 'C', 'D', 'E_adapters', 'F_backbone', 'G_token_mean'].map((s) => ['qwen2', s] as const),
  ...['C', 'E_adapters'].map((s) => ['llama', s] as const),
];

/** The README's tolerances for float32; float64 as far as another order of summation reaches. */
const tolerances = {
  float64: { value: 1e-11, gradient: 1e-10, norm: 1e-10 },
  float32: { value: 1e-5, gradient: 1e-4, norm: 1e-4 },
};

const byMax1 = (found: number, expected: number): number =>
  Math.abs(found - expected) / Math.max(1, Math.abs(expected));
const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

/** What is recorded of the gradients of each pair. */
interface Geometry {
  readonly norm_g_w: number[];
  readonly norm_g_l: number[];
  readonly cosine: number[];
}

function expectGradientMetrics(metrics: Metrics, golden: Geometry, tolerance: number): void {
  const { norm_g_w: w, norm_g_l: l } = golden;
  const expected = {
    'grad_norm/chosen': mean(w),
    'grad_norm/rejected': mean(l),
    'spo/active_fraction': mean(w.map((n, i) => Number(n > l[i]))),
    grad_cosine: mean(golden.cosine),
  };
  for (const [name, value] of Object.entries(expected))
    expect(byMax1(metrics[name], value), name).toBeLessThan(tolerance);
}

function expectMetrics(metrics: Metrics, golden: Readonly<Record<string, never>>, tolerance: number): void {
  const { F, L_DPO, L_pref, L_SFT, L_SFT_K, sft_gap, R } = golden;
  const expected: Record<string, number> = {
    loss: F,
    'spo/dpo': L_DPO ?? L_pref,
    'spo/sft': L_SFT,
    'spo/sft_star': L_SFT_K,
    'spo/sft_gap': sft_gap,
    'spo/regularizer': R,
  };
  for (const [name, value] of Object.entries(expected))
    expect(byMax1(metrics[name], value), name).toBeLessThan(tolerance);
}

const normOf = (gradient: Tensors) => ({
  total: norm(gradient),
  theta: norm(groupPart(gradient, 'backbone')),
  phi: norm(groupPart(gradient, 'adapters')),
});

/** How many weights, rounded to bfloat16, become others by the first step of the lower level. */
function changedByStep(backbone: ReadonlyMap<string, Tensor>, gradient: Tensors, alpha: number) {
  let [changed, count] = [0, 0];
  scope(() => {
    const entries = [...backbone].map(([name, t]) => [name, t, cast(t, 'bfloat16')] as const);
    const gradients = entries.map(([name, t]): [string, Tensor] => {
      return [name, Tensor.from(gradient.get(name)!, { shape: t.shape, dtype: 'float32' })];
    });
    const start = new Map(entries.map(([name, , low]) => [name, low]));
    const masters = new Map(entries.map(([name, t]) => [name, cast(t, 'float32')]));
    const step = firstStep(new Map(gradients), masters, start, alpha);
    for (const [name, low] of start) {
      const before = low.cast('float32').dataSync();
      const after = step.theta.get(name)!.cast('float32').dataSync();
      changed += Array.from(before).filter((x, i) => x !== after[i]).length;
      count += before.length;
    }
    step.release();
  });
  return { changed, count };
}

describeWithShared('the settings of golden/spo', GOLDEN_SPO, () => {
  const cases = settings.flatMap(([name, setting]) =>
    (['float64', 'float32'] as const).map((dtype) => [name, setting, dtype] as const),
  );

  it.each(cases)('%s %s in %s', async (name, setting, dtype) => {
    const golden = settingOf(name, setting);
    const tolerance = tolerances[dtype];
    const { metrics, gradient } = await evaluate(name, dtype, { ...optionsOf(golden), gradNorms: 'on' });
    expectGradientMetrics(metrics, readSpo(name, 'eval.json').geometry[golden.over], tolerance.value);
    expectMetrics(metrics, golden, tolerance.value);
    expect(byMax1(metrics['logps/chosen'], mean(golden.chosen_logps))).toBeLessThan(tolerance.value);
    expect(byMax1(metrics['logps/rejected'], mean(golden.rejected_logps))).toBeLessThan(tolerance.value);
    const expected = await readTensors(spoFile(name, 'spo.safetensors'), `${setting}/grad/`);
    for (const group of both)
      expect(relativeError(groupPart(gradient, group), groupPart(expected, group)), group).toBeLessThan(
        tolerance.gradient,
      );
    const found = normOf(gradient);
    for (const block of ['total', 'theta', 'phi'] as const)
      expect(Math.abs(found[block] / golden.grad_norms[block] - 1)).toBeLessThan(tolerance.norm);
    for (const [key, value] of Object.entries(golden.grad_norm_by_tensor as Record<string, number>)) {
      const error = Math.abs(norm(new Map([[key, gradient.get(key)!]])) - value);
      expect(error / golden.grad_norms.total, key).toBeLessThan(tolerance.norm);
    }
  });

  it.each(cases)('%s %s in %s: gradient norms of the pairs', async (name, setting, dtype) => {
    const { over, norm_g_w, norm_g_l } = settingOf(name, setting);
    using model = await openSpoModel(name, dtype);
    for (const [i, example] of examplesOf(name).entries()) {
      const found = await pairGradients(model, example, over === 'all' ? both : [over]);
      expect(Math.abs(found.normChosen / norm_g_w[i] - 1), `pair ${i}`).toBeLessThan(tolerances[dtype].norm);
      expect(Math.abs(found.normRejected / norm_g_l[i] - 1), `pair ${i}`).toBeLessThan(tolerances[dtype].norm);
    }
  });

  it.each(cases)('%s %s in %s: losses of the pairs', async (name, setting, dtype) => {
    const { beta, loss_per_pair } = settingOf(name, setting);
    using model = await openSpoModel(name, dtype);
    scope(() => {
      const pairs = pairLogProbsOf(model, model.parameters, examplesOf(name));
      const found = preferenceLosses.sigmoid.value(pairs, completeParameters({ beta })).dataSync();
      expect(found).toHaveLength(loss_per_pair.length);
      for (const [i, value] of loss_per_pair.entries())
        expect(byMax1(found[i], value)).toBeLessThan(tolerances[dtype].value);
    });
  });

  it.each(cases)('%s %s in %s: L_SFT after every step of the lower level', async (name, setting, dtype) => {
    const golden = settingOf(name, setting);
    expect(golden.L_SFT_k).toHaveLength(golden.K + 1);
    for (const [lowerSteps, value] of golden.L_SFT_k.entries()) {
      const { metrics } = await evaluate(name, dtype, { ...optionsOf(golden), gamma: 0, lowerSteps });
      expect(byMax1(metrics['spo/sft_star'], value), `${lowerSteps} steps`).toBeLessThan(tolerances[dtype].value);
    }
  });

  it.each(settings)('%s %s is none of the usual mistakes', async (name, setting) => {
    const golden = settingOf(name, setting);
    const found = normOf((await evaluate(name, 'float64', optionsOf(golden))).gradient);
    for (const [mistake, wrong] of Object.entries(golden.wrong_on_purpose as Record<string, never>)) {
      const { total, theta, phi } = (wrong as { grad_norms?: typeof found }).grad_norms ?? (wrong as typeof found);
      const apart = Math.max(
        Math.abs(found.total / total - 1),
        Math.abs(found.theta / theta - 1),
        Math.abs(found.phi / phi - 1),
      );
      // Without penalty and regularizer there is nothing to get wrong.
      if (setting === 'D') expect(apart, mistake).toBeLessThan(1e-10);
      else expect(apart, mistake).toBeGreaterThan(1e-3);
    }
  });

  it.each(settings)('%s %s: the norms of the terms (a) to (e)', async (name, setting) => {
    const golden = settingOf(name, setting);
    const options = optionsOf(golden);
    const measured = (await evaluate(name, 'float64', { ...options, termNorms: true })).metrics;
    if (options.lambda > 0 || options.gamma > 0)
      for (const [term, value] of Object.entries(golden.term_norms as Record<string, number>)) {
        if (options.gamma === 0 && term.startsWith('e')) continue;
        expect(byMax1(measured[`spo/term_${term}`], value), `measured ${term}`).toBeLessThan(1e-10);
        const whole = golden.grad_norms[['a', 'b', 'e_phi'].includes(term) ? 'phi' : 'theta'];
        expect(byMax1(measured[`spo/share_${term}`], value / whole), `share of ${term}`).toBeLessThan(1e-10);
      }
    const plain = (await evaluate(name, 'float64', { ...options, lambda: 0, gamma: 0 })).gradient;
    const penalized = (await evaluate(name, 'float64', { ...options, gamma: 0 })).gradient;
    const whole = (await evaluate(name, 'float64', options)).gradient;
    const penalty = difference(penalized, plain);
    const regularizer = difference(whole, penalized);
    const terms: Readonly<Record<string, Tensors>> = {
      a: groupPart(plain, 'adapters'),
      b: groupPart(penalty, 'adapters'),
      c: groupPart(plain, 'backbone'),
      d: groupPart(penalty, 'backbone'),
      e: groupPart(regularizer, 'backbone'),
      e_phi: groupPart(regularizer, 'adapters'),
    };
    for (const [term, value] of Object.entries(golden.term_norms as Record<string, number>))
      expect(byMax1(norm(terms[term]), value), term).toBeLessThan(1e-10);
    const file = await readTensors(spoFile(name, 'spo.safetensors'), `${setting}/term_`);
    if (file.size === 0) return;
    for (const [term, found] of Object.entries(terms)) {
      const expected = new Map(
        [...file].filter(([key]) => key.startsWith(`${term}/`)).map(([k, v]) => [k.slice(term.length + 1), v]),
      );
      expect(expected.size).toBe(found.size);
      expect(relativeError(found, expected), term).toBeLessThan(1e-10);
    }
  });

  it('the terms shrink with the step size of the lower level as recorded, in float32 as well', async () => {
    for (const row of readSpo('qwen2', 'spo.json').alpha_sweep)
      for (const dtype of ['float64', 'float32'] as const) {
        const { alpha, sft_gap, norm_term_a, norm_term_b } = row;
        const options = { ...optionsOf(settingOf('qwen2', 'A')), lowerLearningRate: alpha };
        const { metrics, gradient } = await evaluate('qwen2', dtype, options);
        const plain = (await evaluate('qwen2', dtype, { ...options, lambda: 0 })).gradient;
        const b = norm(groupPart(difference(gradient, plain), 'adapters'));
        // Differences of nearly equal numbers: ten times the recorded errors in float32, which grow as the step shrinks.
        const [ofGap, ofB] =
          dtype === 'float64'
            ? [1e-10, 1e-9]
            : [10 * row.float32_error_of_sft_gap_rel + 1e-5, 10 * row.float32_error_of_term_b_rel];
        expect(Math.abs(metrics['spo/sft_gap'] / sft_gap - 1)).toBeLessThan(ofGap);
        expect(Math.abs(b / norm_term_b - 1)).toBeLessThan(ofB);
        expect(Math.abs(metrics['spo/term_b'] / norm_term_b - 1)).toBeLessThan(ofB);
        const ofA = tolerances[dtype].norm;
        expect(Math.abs(metrics['spo/term_a'] / norm_term_a - 1)).toBeLessThan(ofA);
        expect(Math.abs(norm(groupPart(plain, 'adapters')) / norm_term_a - 1)).toBeLessThan(ofA);
      }
  });

  it('the sweep: λ ∇_φ L_SFT, and how many bfloat16 weights the step of the lower level changes', async () => {
    using model = await openSpoModel('qwen2', 'float64');
    const { lambda } = settingOf('qwen2', 'A');
    const { gradient } = gradientOf(model, (p) =>
      sftLoss(pairLogProbsOf(model, p, examplesOf('qwen2')).chosen, { reduction: 'sum', tokens: 1 }),
    );
    for (const row of readSpo('qwen2', 'spo.json').alpha_sweep) {
      const size = lambda * norm(groupPart(gradient, 'adapters'));
      expect(Math.abs(size / row.norm_lambda_grad_phi_L_SFT - 1)).toBeLessThan(1e-11);
      const { changed, count } = changedByStep(model.backbone, gradient, row.alpha);
      const share = row.fraction_of_bfloat16_weights_changed_by_the_step;
      // Up to two weights of 21824 on the edge of a rounding.
      expect(Math.abs(changed - share * count)).toBeLessThan(2.5);
    }
  });

  it.each(modelNames.flatMap((name) => (['sum', 'token-mean'] as const).map((sft) => [name, sft] as const)))(
    '%s: term (b) to first order nears the difference as the step shrinks (%s)',
    async (name, sft) => {
      const errors: number[] = [];
      const K = 2;
      for (const alpha of [2e-4, 2e-5, 2e-6]) {
        const setting = { ...optionsOf(settingOf(name, 'E_adapters')), gamma: 0, sftReduction: sft, lowerSteps: K };
        const options = { ...setting, lowerLearningRate: alpha };
        const parts = [
          [0, 1],
          [2, 3],
        ];
        const exact = await evaluate(name, 'float64', options, parts);
        const first = await evaluate(name, 'float64', { ...options, penaltyForm: 'first-order' }, parts);
        expect([exact, first].map((e) => e.metrics['spo/first_order'])).toEqual([0, 1]);
        const plain = (await evaluate(name, 'float64', { ...options, lambda: 0 }, parts)).gradient;
        const b = (e: Evaluation): Tensors => groupPart(difference(e.gradient, plain), 'adapters');
        errors.push(relativeError(b(first), b(exact)));
        expect(
          relativeError(groupPart(first.gradient, 'backbone'), groupPart(exact.gradient, 'backbone')),
        ).toBeLessThan(1e-12);
        expect(Math.abs(first.metrics['spo/sft_gap'] / exact.metrics['spo/sft_gap'] - 1)).toBeLessThan(3e3 * alpha);
      }
      expect(errors[0]).toBeLessThan(0.5);
      expect(errors[1] / errors[0]).toBeLessThan(0.12);
      expect(errors[2] / errors[1]).toBeLessThan(0.12);
    },
  );

  it('accumulation changes nothing: lower level and regularizer see the whole batch', async () => {
    for (const sft of ['sum', 'token-mean'] as const) {
      const options = { ...optionsOf(settingOf('qwen2', 'C')), sftReduction: sft };
      const whole = await evaluate('qwen2', 'float64', options);
      for (const parts of [
        [
          [0, 1],
          [2, 3],
        ],
        [[0], [1], [2], [3]],
        [[0, 1, 2], [3]],
      ]) {
        const { metrics, gradient } = await evaluate('qwen2', 'float64', options, parts);
        for (const key of [
          'loss',
          'spo/dpo',
          'spo/sft',
          'spo/sft_star',
          'spo/regularizer',
          'grad_norm/chosen',
          'num_tokens',
        ])
          expect(byMax1(metrics[key], whole.metrics[key]), key).toBeLessThan(1e-13);
        expect(relativeError(gradient, whole.gradient)).toBeLessThan(1e-13);
      }
    }
  });

  it('without lower-level steps the penalty vanishes in φ and stays in θ', async () => {
    const options = { ...optionsOf(settingOf('qwen2', 'A')), lowerSteps: 0 };
    const { metrics, gradient } = await evaluate('qwen2', 'float64', options);
    expect(Math.abs(metrics['spo/sft_gap'])).toBeLessThan(1e-12);
    expect(byMax1(metrics.loss, metrics['spo/dpo'])).toBeLessThan(1e-12);
    const plain = (await evaluate('qwen2', 'float64', { ...options, lambda: 0 })).gradient;
    const adapters = (g: Tensors): Tensors => groupPart(g, 'adapters');
    expect(relativeError(adapters(gradient), adapters(plain))).toBeLessThan(1e-12);
    const penalty = groupPart(difference(gradient, plain), 'backbone');
    const { term_norms } = settingOf('qwen2', 'A');
    expect(Math.abs(norm(penalty) / term_norms.d - 1)).toBeLessThan(1e-10);
  });

  const losses: readonly (readonly [string, PreferenceLossName])[] = [
    ['dpo', 'sigmoid'],
    ['ipo', 'ipo_sum'],
    ['ipo_mean', 'ipo'],
    ['hinge', 'hinge'],
    ['robust', 'robust'],
    ['cdpo', 'cdpo'],
    ['simpo', 'simpo'],
  ];
  it('covers every recorded loss', () => {
    const recorded = readSpo('qwen2', 'losses.json').losses.map(({ loss }: { loss: string }) => loss);
    expect(losses.map(([name]) => name)).toEqual(recorded);
  });

  describe.each(losses)('with the loss %s', (recorded, lossType) => {
    const goldenLoss = () => {
      const { setting, losses: all } = readSpo('qwen2', 'losses.json');
      const golden = all.find((entry: { loss: string }) => entry.loss === recorded);
      const loss = {
        beta: golden.beta,
        lossType,
        ...(golden.label_smoothing !== undefined && { labelSmoothing: golden.label_smoothing }),
        ...(golden.simpo_gamma !== undefined && { simpoGamma: golden.simpo_gamma }),
      };
      return { setting, golden, loss };
    };

    it('value, derivatives and gradient norms of the loss alone', async () => {
      const { golden, loss } = goldenLoss();
      using model = await openSpoModel('qwen2', 'float64');
      const { value, gradient } = gradientOf(model, (p) =>
        preferenceLoss(pairLogProbsOf(model, p, examplesOf('qwen2')), loss),
      );
      expect(byMax1(value, golden.L_pref)).toBeLessThan(1e-12);
      scope(() => {
        const pairs = pairLogProbsOf(model, model.parameters, examplesOf('qwen2'));
        const each = preferenceLosses[lossType].value(pairs, completeParameters(loss)).dataSync();
        expect(each).toHaveLength(golden.loss_per_pair.length);
        for (const [i, x] of golden.loss_per_pair.entries()) expect(byMax1(each[i], x)).toBeLessThan(1e-12);
      });
      const found = normOf(gradient);
      for (const block of ['total', 'theta', 'phi'] as const)
        expect(Math.abs(found[block] / golden.grad_norms_L_pref[block] - 1)).toBeLessThan(1e-11);
    });

    it.each(['float64', 'float32'] as const)(
      'dL/dlog π of every sequence in %s: what training seeds',
      async (dtype) => {
        const { golden, loss } = goldenLoss();
        using model = await openSpoModel('qwen2', dtype);
        const examples = examplesOf('qwen2');
        const objective = new PreferenceObjective(model, examples, referenceOf(examples), loss);
        const bySequence = scope(() => {
          const step = objective.begin([[0, 1, 2, 3]], [1]);
          const batch = objective.batch([0, 1, 2, 3]);
          using layout = batch.packed.layout;
          const { ids, targets } = batch.tensors;
          const out = model.logProbs(model.parameters, ids, layout, targets, { statistics: true });
          const found = objective.coefficients(step, 0, batch, out.logProbs, out.statistics!);
          expect(byMax1(found.loss.item(), golden.L_pref)).toBeLessThan(tolerances[dtype].value);
          const perToken = found.tokens.dataSync();
          return Array.from(batch.packed.lengths, (_, s) => [
            ...new Set(Array.from(perToken).filter((_, n) => batch.packed.sequences[n] === s)),
          ]);
        });
        expect(bySequence.every((values) => values.length === 1)).toBe(true);
        const expected: number[] = [...golden.dL_dlogp_w, ...golden.dL_dlogp_l];
        expected.forEach((value, s) => {
          expect(Math.abs(bySequence[s][0] - value)).toBeLessThan(tolerances[dtype].value);
        });
      },
    );

    it.each([
      ['float64', 'exact'],
      ['float64', 'finite-differences'],
      ['float32', 'exact'],
    ] as const)('R by token in %s, %s', async (dtype, regularizerMethod) => {
      const { setting, golden, loss } = goldenLoss();
      const options = { ...optionsOf({ ...setting, name: recorded, beta: loss.beta }), ...loss };
      const { metrics } = await evaluate('qwen2', dtype, { ...options, normPerToken: true, regularizerMethod });
      const R = golden.R_length_normalized;
      expect(byMax1(metrics['spo/regularizer'], R)).toBeLessThan(tolerances[dtype].value);
      expect(byMax1(metrics.loss, golden.F + setting.gamma * (R - golden.R))).toBeLessThan(tolerances[dtype].value);
    });

    it.each(['float64', 'float32'] as const)('F and its gradient in %s', async (dtype) => {
      const { setting, golden, loss } = goldenLoss();
      const tolerance = tolerances[dtype];
      const options = { ...optionsOf({ ...setting, name: recorded, beta: loss.beta }), ...loss };
      const { metrics, gradient } = await evaluate('qwen2', dtype, options);
      expectMetrics(metrics, golden, tolerance.value);
      const expected = await readTensors(spoFile('qwen2', 'losses.safetensors'), `${recorded}/grad/`);
      for (const group of both)
        expect(relativeError(groupPart(gradient, group), groupPart(expected, group)), group).toBeLessThan(
          tolerance.gradient,
        );
      const found = normOf(gradient);
      for (const block of ['total', 'theta', 'phi'] as const)
        expect(Math.abs(found[block] / golden.grad_norms_F[block] - 1)).toBeLessThan(tolerance.norm);
      for (const [key, value] of Object.entries(golden.grad_norm_by_tensor_F as Record<string, number>))
        expect(byMax1(norm(new Map([[key, gradient.get(key)!]])), value), key).toBeLessThan(tolerance.norm);
    });
  });
});
