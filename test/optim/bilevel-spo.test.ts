// SPO as an instance of the bilevel optimizer, put together from its functions alone (the regularizer by double backward),
// against the recorded settings: what the general machine does is the method.
import { expect, it } from 'vitest';
import { grad } from '../../src/autograd/transforms.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import type { ModelParameters } from '../../src/models/parameters.js';
import { preferenceLoss, sftLoss } from '../../src/objectives/index.js';
import { relu, sqrt, square, sub } from '../../src/ops/elementwise.js';
import { concat, reshape } from '../../src/ops/movement.js';
import { mean, sum } from '../../src/ops/reduce.js';
import { BilevelOptimizer, type BilevelProblem, type Variables } from '../../src/optim/bilevel/bilevel.js';
import { scope } from '../../src/tensor/scope.js';
import type { Tensor } from '../../src/tensor/tensor.js';
import {
  both,
  examplesOf,
  GOLDEN_SPO,
  groupPart,
  type ModelName,
  namesOf,
  onHost,
  openSpoModel,
  pairLogProbsOf,
  readSpo,
  regularizerProblem,
  spoFile,
} from '../objectives/spo-support.js';
import { describeWithShared } from '../shared.js';
import { readTensors, relativeError } from '../train/support.js';

/** Adapters keep their place in the model's parameters whatever stands for them. */
const parametersOf = (model: CausalLM, v: { lower: Variables; upper: Variables }): ModelParameters => ({
  ...model.parameters,
  backbone: new Map(v.lower),
  adapters: new Map(v.upper),
});

// biome-ignore lint/suspicious/noExplicitAny: a recorded setting
function problemOf(model: CausalLM, name: ModelName, setting: any): BilevelProblem {
  const examples = examplesOf(name);
  const tokens = examples.reduce((n, e) => n + e.chosenIds.length, 0);
  const { normOver, logProb } = regularizerProblem(model, examples, setting.over);
  /** ‖g‖ of one sequence, as a function of θ and φ. */
  const normOf = (values: readonly Tensor[], sequence: number): Tensor => {
    const g = grad((...at: Tensor[]) => logProb(at, sequence))(...values);
    const squares = g.filter((_, i) => normOver[i]).map((t) => reshape(sum(square(t)), [1]));
    return sqrt(sum(concat(squares)));
  };
  const regularizer = (values: readonly Tensor[]): Tensor =>
    mean(
      concat(examples.map((_, i) => reshape(relu(sub(normOf(values, i), normOf(values, i + examples.length))), [1]))),
    );
  return {
    lower: model.backbone,
    upper: model.adapters,
    upperObjective: (v) =>
      preferenceLoss(pairLogProbsOf(model, parametersOf(model, v), examples), { beta: setting.beta }),
    lowerObjective: (v) =>
      sftLoss(pairLogProbsOf(model, parametersOf(model, v), examples).chosen, {
        reduction: setting.sft,
        tokens,
      }),
    terms:
      setting.gamma > 0
        ? [
            {
              name: 'regularizer',
              weight: setting.gamma,
              value: ({ lower, upper }) => regularizer([...lower.values(), ...upper.values()]),
            },
          ]
        : [],
  };
}

describeWithShared('SPO by the general bilevel optimizer', GOLDEN_SPO, () => {
  it.each([
    ['qwen2', 'A'],
    ['qwen2', 'B'],
    ['qwen2', 'C'],
    ['qwen2', 'E_adapters'],
    ['qwen2', 'G_token_mean'],
    ['llama', 'C'],
  ] as const)('%s %s', async (name, settingName) => {
    // biome-ignore lint/suspicious/noExplicitAny: a recorded setting
    const golden = readSpo(name, 'spo.json').settings.find((s: any) => s.name === settingName);
    const expected = await readTensors(spoFile(name, 'spo.safetensors'), `${settingName}/grad/`);
    using model = await openSpoModel(name, 'float64');
    scope(() => {
      using optimizer = new BilevelOptimizer(problemOf(model, name, golden), {
        penalty: golden.lambda,
        lowerLevel: { steps: golden.K, learningRate: golden.alpha },
        learningRates: { lower: 0, upper: 0 },
      });
      const found = optimizer.evaluate();
      expect(found.objective.item()).toBeCloseTo(golden.F, 9);
      expect(found.upper.item()).toBeCloseTo(golden.L_DPO, 10);
      expect(found.lowerOptimum.item()).toBeCloseTo(golden.L_SFT_K, 9);
      if (golden.gamma > 0) expect(found.terms.get('regularizer')!.item()).toBeCloseTo(golden.R, 9);
      const { lower, upper } = optimizer.gradientBuffers;
      const gradient = onHost(namesOf(model), [...lower.values(), ...upper.values()]);
      for (const group of both)
        expect(relativeError(groupPart(gradient, group), groupPart(expected, group)), group).toBeLessThan(1e-9);
    });
  });
});
