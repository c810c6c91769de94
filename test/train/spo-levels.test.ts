// SPO's lower level and penalty by their options: other solvers, warm starts, lambda by schedule, the first-order form where
// tokens weigh differently; against values put together by hand.
import { expect, it } from 'vitest';
import { GradientBuffers } from '../../src/autograd/sinks.js';
import { loadModel } from '../../src/io/model-folder.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import type { ModelParameters } from '../../src/models/parameters.js';
import { mul } from '../../src/ops/elementwise.js';
import { cast } from '../../src/ops/movement.js';
import { mean } from '../../src/ops/reduce.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import type { Metrics } from '../../src/train/hooks.js';
import { PreferenceObjective } from '../../src/train/preference-objective.js';
import { SpoLowerLevel } from '../../src/train/spo-lower.js';
import { SpoPasses } from '../../src/train/spo-passes.js';
import { SpoTask, type SpoTaskOptions } from '../../src/train/spo-task.js';
import { Trainable } from '../../src/train/task.js';
import {
  both,
  examplesOf,
  GOLDEN_SPO,
  gradientOf,
  groupPart,
  modelNames,
  namesOf,
  onHost,
  openSpoModel,
  pairLogProbsOf,
  readSpo,
  spoFile,
  spoPath,
} from '../objectives/spo-support.js';
import { describeWithShared } from '../shared.js';
import { difference, norm, readTensors, relativeError, type Tensors } from './support.js';

const common: SpoTaskOptions = {
  beta: 0.5,
  lambda: 1,
  gamma: 0,
  lowerSteps: 1,
  lowerLearningRate: 0.02,
  normOver: 'all',
  sftReduction: 'sum',
};

type Dtype = 'float64' | 'float32' | 'bfloat16';
interface Evaluation {
  readonly metrics: Metrics;
  readonly gradient: Tensors;
}

const open = (dtype: Dtype): Promise<CausalLM> =>
  dtype === 'bfloat16'
    ? loadModel(spoPath('qwen2', 'model'), { dtype, adapter: spoPath('qwen2', 'adapter') })
    : openSpoModel('qwen2', dtype);

/** What steps with these numbers accumulate, one after the other, the weights as they are. */
async function evaluateAll(
  given: Partial<SpoTaskOptions>,
  steps: readonly number[],
  dtype: Dtype = 'float64',
  microBatches: number[][] = [[0, 1, 2, 3]],
): Promise<Evaluation[]> {
  using model = await open(dtype);
  const low = dtype === 'bfloat16';
  const masters = new Map([...model.backbone].map(([name, t]) => [name, low ? cast(t, 'float32') : t]));
  const trainable = new Trainable(model, both);
  const examples = examplesOf('qwen2');
  const reference = {
    chosen: Float64Array.from(examples, (e) => e.refChosenLogp!),
    rejected: Float64Array.from(examples, (e) => e.refRejectedLogp!),
  };
  const task = new SpoTask(trainable, examples, reference, { ...common, ...given }, () => masters);
  const found: Evaluation[] = [];
  for (const step of steps) {
    trainable.zeroGradients();
    const { losses, metrics } = await task.accumulate({ step, microBatches });
    const buffers = both.flatMap((g) => [...trainable.gradients.get(g)!.buffers.values()]);
    found.push({ metrics: await metrics, gradient: onHost(namesOf(model), buffers) });
    for (const t of losses) t.dispose();
  }
  task.dispose();
  trainable.dispose();
  if (low) for (const t of masters.values()) t.dispose();
  return found;
}

const evaluate = async (given: Partial<SpoTaskOptions>, dtype?: Dtype, parts?: number[][]): Promise<Evaluation> =>
  (await evaluateAll(given, [0], dtype, parts))[0];

const phi = (g: Tensors): Tensors => groupPart(g, 'adapters');
const halves = [
  [0, 1],
  [2, 3],
];

/** L_SFT as a sum over tokens, averaged over the pairs, with its gradients at some θ. */
function sftAt(model: CausalLM, theta: Tensors): { value: number; theta: Tensors; phi: Tensors } {
  const backbone = new Map(
    [...model.backbone].map(([name, t]) => [name, Tensor.from(theta.get(name)!, { shape: t.shape })]),
  );
  const at: ModelParameters = { ...model.parameters, backbone };
  const sft = (p: ModelParameters): Tensor => mul(mean(pairLogProbsOf(model, p, examplesOf('qwen2')).chosen), -1);
  const { value, gradient } = gradientOf(model, sft, both, at);
  for (const t of backbone.values()) t.dispose();
  return { value, theta: groupPart(gradient, 'backbone'), phi: phi(gradient) };
}

const combine = (a: Tensors, b: Tensors, f: (x: number, y: number) => number): Tensors =>
  new Map([...a].map(([name, values]) => [name, values.map((x, i) => f(x, b.get(name)![i]))]));

/** θ_K by a solver, on the host. */
function solved(model: CausalLM, solver: 'momentum' | 'adam', steps: number, rate: number): Tensors {
  let theta = onHost(namesOf(model, ['backbone']), [...model.backbone.values()]);
  const zeros: Tensors = combine(theta, theta, () => 0);
  let [first, second] = [zeros, zeros];
  for (let k = 1; k <= steps; k++) {
    const g = sftAt(model, theta).theta;
    if (solver === 'momentum') {
      first = combine(first, g, (m, x) => 0.9 * m + x);
      theta = combine(theta, first, (x, m) => x - rate * m);
      continue;
    }
    first = combine(first, g, (m, x) => 0.9 * m + 0.1 * x);
    second = combine(second, g, (v, x) => 0.999 * v + 0.001 * x * x);
    const step = combine(first, second, (m, v) => m / (1 - 0.9 ** k) / (Math.sqrt(v / (1 - 0.999 ** k)) + 1e-8));
    theta = combine(theta, step, (x, s) => x - rate * s);
  }
  return theta;
}

describeWithShared('the lower level of a step', GOLDEN_SPO, () => {
  it.each([
    ['adam', 1, 1e-3],
    ['adam', 3, 1e-3],
    ['momentum', 3, 5e-3],
  ] as const)('by %s in %d steps is what that solver finds', async (lowerSolver, lowerSteps, lowerLearningRate) => {
    using model = await openSpoModel('qwen2', 'float64');
    const theta = onHost(namesOf(model, ['backbone']), [...model.backbone.values()]);
    const [here, there] = [
      sftAt(model, theta),
      sftAt(model, solved(model, lowerSolver, lowerSteps, lowerLearningRate)),
    ];
    const options = { lowerSolver, lowerSteps, lowerLearningRate };
    const plain = (await evaluate({ ...options, lambda: 0 })).gradient;
    for (const ldAlpha of [1, 0.5]) {
      const start = ldAlpha === 1 ? plain : (await evaluate({ ...options, ldAlpha, lambda: 0 })).gradient;
      const { metrics, gradient } = await evaluate({ ...options, ldAlpha }, 'float64', halves);
      expect(Math.abs(metrics['spo/sft_star'] - there.value)).toBeLessThan(1e-10);
      expect(Math.abs(metrics['spo/sft_gap'] - (here.value - there.value))).toBeLessThan(1e-10);
      const b = phi(difference(gradient, start));
      expect(
        relativeError(
          b,
          combine(here.phi, there.phi, (x, y) => x - y),
        ),
      ).toBeLessThan(1e-9);
    }
  });

  it.each([1, 0.5])('started warm goes on where it ended (ld alpha %f)', async (ldAlpha) => {
    for (const lowerSteps of [1, 2]) {
      const options = { lowerSteps, ldAlpha };
      const [first, second] = await evaluateAll({ ...options, lowerWarmStart: true }, [0, 1], 'float64', halves);
      const cold = await evaluate(options, 'float64', halves);
      expect(first.metrics['spo/sft_star']).toBe(cold.metrics['spo/sft_star']);
      expect(relativeError(first.gradient, cold.gradient)).toBe(0);
      // θ has not moved: the second solution is that of twice the steps.
      const longer = await evaluate({ ...options, lowerSteps: 2 * lowerSteps }, 'float64', halves);
      expect(Math.abs(second.metrics['spo/sft_star'] - longer.metrics['spo/sft_star'])).toBeLessThan(1e-11);
      expect(relativeError(second.gradient, longer.gradient)).toBeLessThan(1e-11);
      expect(relativeError(second.gradient, cold.gradient)).toBeGreaterThan(1e-3);
    }
  });

  it('leaves no tensors behind', async () => {
    const before = memory().storages;
    for (const given of [
      { lowerSolver: 'adam', lowerSteps: 2, lowerWarmStart: true },
      { ldAlpha: 0.5, penaltyForm: 'first-order' },
      { gamma: 0.1, regularizerMethod: 'finite-differences', termNorms: true },
    ] as const)
      await evaluateAll(given, [0, 1]);
    expect(memory().storages).toBe(before);
  });
});

describeWithShared('lower.json by the lower level of a step', GOLDEN_SPO, () => {
  const cases = modelNames.flatMap((name) =>
    [0, 1].flatMap((run) => [true, false].map((known) => [name, run, known] as const)),
  );
  it.each(cases)('%s, run %d, the first gradient known: %s', async (name, run, known) => {
    for (const [dtype, tolerance] of [
      ['float64', 1e-11],
      ['float32', 1e-4],
    ] as const) {
      const { alpha, reduction, runs } = readSpo(name, 'lower.json');
      const { K, L_SFT_k, norm_grad_phi } = runs[run];
      using model = await openSpoModel(name, dtype);
      const examples = examplesOf(name);
      const trainable = new Trainable(model, both);
      const objective = new PreferenceObjective(model, examples, null, { beta: 0.5 });
      const passes = new SpoPasses(trainable, examples, objective, {
        sftReduction: reduction,
        penalizeAdapters: true,
        checkpointing: false,
      });
      const options = { lowerSteps: K, lowerLearningRate: alpha };
      const level = new SpoLowerLevel(trainable, passes, options, () => model.backbone);
      const tokens = examples.reduce((n, e) => n + e.chosenIds.length, 0);
      const step = { microBatches: halves, totals: { tokens, sequences: examples.length }, lambda: 2 };
      const before = onHost(namesOf(model, ['backbone']), [...model.backbone.values()]);
      const buffers = new GradientBuffers(model.backbone);
      trainable.zeroGradients();
      if (known) level.gradient(new Map(model.backbone), buffers, step);
      const optimum = scope(() => level.optimum(buffers, known, step).reduce((total, t) => total + t.item(), 0));
      expect(Math.abs(optimum - L_SFT_k[K])).toBeLessThan(tolerance);
      const added = onHost(namesOf(model, ['adapters']), [...trainable.gradients.get('adapters')!.buffers.values()]);
      const gradient = new Map([...added].map(([key, values]) => [key, values.map((x) => x / -step.lambda)]));
      const expected = await readTensors(spoFile(name, 'lower.safetensors'), `K${K}/grad_phi/`);
      expect(expected.size).toBe(gradient.size);
      expect(relativeError(gradient, expected)).toBeLessThan(tolerance);
      expect(Math.abs(norm(gradient) / norm_grad_phi - 1)).toBeLessThan(tolerance);
      expect(onHost(namesOf(model, ['backbone']), [...model.backbone.values()])).toEqual(before);
      for (const owner of [buffers, level, objective, trainable]) owner.dispose();
    }
  });
});

describeWithShared('lambda by schedule', GOLDEN_SPO, () => {
  it.each([
    ['linear', [0, 0.25, 0.5, 1, 1]],
    ['cosine', [0, 0.5 * (1 - Math.SQRT1_2), 0.5, 1, 1]],
    ['constant', [1, 1, 1, 1, 1]],
  ] as const)('%s: F, its gradient and what is reported use the step’s lambda', async (lambdaSchedule, shares) => {
    const steps = [0, 1, 2, 4, 9];
    for (const rest of [{}, { gamma: 0.2 }, { ldAlpha: 0.5 }]) {
      const options = { ...rest, lambda: 2, lambdaSchedule, lambdaRampSteps: 4 };
      const found = await evaluateAll(options, steps);
      for (const [i, { metrics, gradient }] of found.entries()) {
        const fixed = await evaluate({ ...rest, lambda: 2 * shares[i] });
        expect(metrics['spo/lambda']).toBeCloseTo(2 * shares[i], 14);
        expect(Math.abs(metrics.loss - fixed.metrics.loss)).toBeLessThan(1e-10);
        expect(relativeError(gradient, fixed.gradient)).toBeLessThan(1e-11);
        if (i > 0 && lambdaSchedule !== 'constant') expect(metrics.loss).not.toBe(found[0].metrics.loss);
      }
    }
  });
});

describeWithShared('term (b) to first order', GOLDEN_SPO, () => {
  it('is the same where tokens of the preference loss weigh differently', async () => {
    const form = { penaltyForm: 'first-order', lowerLearningRate: 1e-3 } as const;
    const part = async (ldAlpha: number): Promise<{ added: Tensors; metrics: Metrics }> => {
      const [whole, plain] = [await evaluate({ ...form, ldAlpha }), await evaluate({ ...form, ldAlpha, lambda: 0 })];
      return { added: difference(whole.gradient, plain.gradient), metrics: whole.metrics };
    };
    const [even, uneven] = [await part(1), await part(0.5)];
    for (const group of both)
      expect(relativeError(groupPart(uneven.added, group), groupPart(even.added, group))).toBeLessThan(1e-10);
    expect(uneven.metrics['spo/sft_gap']).toBeCloseTo(even.metrics['spo/sft_gap'], 10);
    expect([even, uneven].map(({ metrics }) => metrics['spo/first_order'])).toEqual([1, 1]);
    expect(norm(phi(even.added))).toBeGreaterThan(0);
  });
});

describeWithShared('term (b) in bfloat16', GOLDEN_SPO, () => {
  // The paper's α, where the difference of two bfloat16 gradients is rounding and nothing else.
  it.each([1, 2].flatMap((K) => (['sum', 'token-mean'] as const).map((sft) => [K, sft] as const)))(
    'to first order is the difference in float64 (K %d, %s)',
    async (lowerSteps, sftReduction) => {
      const options = { lowerSteps, sftReduction, lowerLearningRate: 2e-5 };
      // λ near 0 keeps the pass that λ = 1 has, so that all but the penalty cancels.
      const part = async (form: Partial<SpoTaskOptions>, dtype: Dtype) => {
        const [whole, without] = [
          await evaluate({ ...options, ...form }, dtype, halves),
          await evaluate({ ...options, ...form, lambda: 1e-12 }, dtype, halves),
        ];
        return { b: phi(difference(whole.gradient, without.gradient)), metrics: whole.metrics };
      };
      const [low, exact] = [await part({}, 'bfloat16'), await part({ penaltyForm: 'difference' }, 'float64')];
      expect([low, exact].map(({ metrics }) => metrics['spo/first_order'])).toEqual([1, 0]);
      expect(relativeError(low.b, exact.b)).toBeLessThan(0.1);
      expect(Math.abs(low.metrics['spo/sft_gap'] / exact.metrics['spo/sft_gap'] - 1)).toBeLessThan(0.05);
      expect(Math.abs(low.metrics['spo/term_b'] / norm(exact.b) - 1)).toBeLessThan(0.1);
    },
  );
});

describeWithShared('a step in bfloat16 with gamma above 0', GOLDEN_SPO, () => {
  // Weights round to 8 bits: log-probabilities by up to 1 %, gradients by a few percent of their norm.
  it.each([{}, { normPerToken: true }, { normOver: 'adapters' }, { termNorms: true }] as const)(
    'is that in float32 as far as rounding lets it (%j)',
    async (given) => {
      const options = { ...given, gamma: 0.5, penaltyForm: 'first-order', lowerLearningRate: 2e-5 } as const;
      const [low, high] = [await evaluate(options, 'bfloat16'), await evaluate(options, 'float32')];
      for (const name of [
        'loss',
        'spo/regularizer',
        'spo/sft',
        'grad_norm/chosen',
        'grad_norm/rejected',
        'grad_cosine',
      ])
        expect(Math.abs(low.metrics[name] / high.metrics[name] - 1), name).toBeLessThan(0.03);
      expect(low.metrics['spo/active_fraction']).toBe(high.metrics['spo/active_fraction']);
      for (const group of both)
        expect(relativeError(groupPart(low.gradient, group), groupPart(high.gradient, group)), group).toBeLessThan(0.1);
      // The regularizer's own part, which the rest must not hide.
      const part = async ({ gradient }: Evaluation, dtype: Dtype): Promise<Tensors> =>
        difference(gradient, (await evaluate({ ...options, gamma: 0, normPerToken: false }, dtype)).gradient);
      const [e, expected] = [await part(low, 'bfloat16'), await part(high, 'float32')];
      for (const group of both)
        expect(relativeError(groupPart(e, group), groupPart(expected, group)), `∇R, ${group}`).toBeLessThan(0.15);
    },
  );
});

describeWithShared('metrics of a step', GOLDEN_SPO, () => {
  const ofNorms = ['spo/regularizer', 'spo/active_fraction', 'grad_norm/chosen', 'grad_norm/rejected', 'grad_cosine'];
  const near = (found: Metrics, expected: Metrics): void => {
    for (const [name, value] of Object.entries(expected)) {
      if (ofNorms.includes(name)) continue;
      expect(Math.abs(found[name] - value) / Math.max(1, Math.abs(value)), name).toBeLessThan(1e-9);
    }
  };

  it.each([
    {},
    { nllWeight: 0.5, nllReduction: 'token-mean' },
    { nllWeight: 0.5, nllReduction: 'sequence-mean' },
    { nllWeight: 0.5, nllReduction: 'sequence-sum' },
    { ldAlpha: 0.5 },
    { sftReduction: 'token-mean' },
  ] as const)('do not depend on whether pairs are taken one by one for their norms (%j)', async (given) => {
    for (const parts of [[[0, 1, 2, 3]], [[0, 1, 2], [3]]]) {
      const without = (await evaluate(given, 'float64', parts)).metrics;
      for (const regularizerMethod of ['exact', 'finite-differences'] as const) {
        const withNorms = { ...given, gamma: 1e-12, regularizerMethod, termNorms: true };
        const tiny = (await evaluate(withNorms, 'float64', parts)).metrics;
        expect(Object.keys(tiny).filter((name) => !ofNorms.includes(name) && !name.includes('_e'))).toEqual(
          Object.keys(without).filter((name) => !ofNorms.includes(name)),
        );
        near(tiny, without);
      }
    }
  });
});
