// SPO's parts one by one against the recorded values: losses, norms, ∇R over each set of variables, the lower level.
import { describe, expect, it } from 'vitest';
import { valueAndGrad } from '../../src/autograd/transforms.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import type { ModelParameters } from '../../src/models/parameters.js';
import {
  addRegularizer,
  completeParameters,
  dpoLoss,
  margin,
  preferenceLosses,
  regularizerValue,
  sftLoss,
  spoObjective,
  squaredGradientNorms,
} from '../../src/objectives/index.js';
import { zerosLike } from '../../src/ops/movement.js';
import { descend } from '../../src/optim/bilevel/lower-level.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import type { GroupName } from '../../src/train/task.js';
import { maxDifference } from '../models/support.js';
import { describeWithShared } from '../shared.js';
import { difference, norm, readTensors, relativeError, type Tensors } from '../train/support.js';
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
  regularizerProblem,
  spoFile,
} from './spo-support.js';

/** What the README asks of float32; float64 as far as another order of summation reaches. */
const tolerances: Readonly<Record<Precision, Readonly<Record<string, number>>>> = {
  float64: { logps: 1e-11, loss: 1e-11, norm: 1e-11, gradient: 1e-11, regularizer: 1e-10, theta: 1e-11, cosine: 1e-11 },
  float32: { logps: 1e-4, loss: 1e-4, norm: 1e-5, gradient: 1e-5, regularizer: 1e-4, theta: 1e-4, cosine: 1e-5 },
};

const cases = modelNames.flatMap((name) => (['float64', 'float32'] as const).map((dtype) => ({ name, dtype })));
const norms = ['all', 'adapters', 'backbone'] as const;

const scoredTokens = (name: ModelName): number => examplesOf(name).reduce((n, e) => n + e.chosenIds.length, 0);

/** L_SFT on the chosen responses of batch 0. */
const sft = (model: CausalLM, name: ModelName, reduction: 'sum' | 'token-mean') => (p: ModelParameters) =>
  sftLoss(pairLogProbsOf(model, p, examplesOf(name)).chosen, { reduction, tokens: scoredTokens(name) });

/** The recorded blocks of θ and φ, each by its own size. */
function expectGradient(found: Tensors, expected: Tensors, tolerance: number): void {
  for (const group of both) {
    expect(groupPart(expected, group).size).toBeGreaterThan(0);
    expect(relativeError(groupPart(found, group), groupPart(expected, group)), group).toBeLessThan(tolerance);
  }
}

/** R over a set of variables with ∇R, through the public functions. */
async function regularizer(model: CausalLM, name: ModelName, over: 'all' | GroupName) {
  const problem = regularizerProblem(model, examplesOf(name), over);
  const buffers = problem.variables.map((t) => zerosLike(t));
  const value = await addRegularizer(problem, examplesOf(name).length, 1, buffers);
  const gradient = onHost(namesOf(model), buffers);
  for (const t of buffers) t.dispose();
  return { value, gradient };
}

describeWithShared('one evaluation', GOLDEN_SPO, () => {
  describe.each(cases)('$name in $dtype', ({ name, dtype }) => {
    const tolerance = tolerances[dtype];
    const golden = () => readSpo(name, 'eval.json');
    const recorded = (piece: string): Promise<Tensors> => readTensors(spoFile(name, 'eval.safetensors'), `${piece}/`);

    it('log-probabilities, s and losses', async () => {
      using model = await openSpoModel(name, dtype);
      const { beta, chosen_logps, rejected_logps, s, one_minus_sigma_s, dpo_per_pair, L_DPO, L_SFT } = golden();
      scope(() => {
        const pairs = pairLogProbsOf(model, model.parameters, examplesOf(name));
        expect(maxDifference(pairs.chosen.dataSync(), chosen_logps)).toBeLessThan(tolerance.logps);
        expect(maxDifference(pairs.rejected.dataSync(), rejected_logps)).toBeLessThan(tolerance.logps);
        const found = [...margin(pairs, beta).dataSync()];
        expect(maxDifference(found, s)).toBeLessThan(tolerance.logps);
        const losses = preferenceLosses.sigmoid.value(pairs, completeParameters({ beta }));
        expect(maxDifference(losses.dataSync(), dpo_per_pair)).toBeLessThan(tolerance.logps);
        // dL/dlog π(y_w) of a pair is -β(1 - σ(s)) by the number of pairs.
        const dpo = (chosen: Tensor): Tensor => dpoLoss({ ...pairs, chosen }, { beta });
        const [, [slopes]] = valueAndGrad(dpo)(pairs.chosen);
        const weights = Array.from(slopes.dataSync(), (x) => (-x * s.length) / beta);
        expect(maxDifference(weights, one_minus_sigma_s)).toBeLessThan(tolerance.logps);
        expect(Math.abs(dpoLoss(pairs, { beta }).item() - L_DPO)).toBeLessThan(tolerance.loss);
        for (const reduction of ['sum', 'token-mean'] as const) {
          const loss = sftLoss(pairs.chosen, { reduction, tokens: scoredTokens(name) }).item();
          expect(Math.abs(loss - L_SFT[reduction])).toBeLessThan(tolerance.loss);
        }
      });
    });

    it('gradients of L_DPO and L_SFT', async () => {
      using model = await openSpoModel(name, dtype);
      const { beta, grad_norms } = golden();
      const dpo = gradientOf(model, (p) => dpoLoss(pairLogProbsOf(model, p, examplesOf(name)), { beta }));
      expectGradient(dpo.gradient, await recorded('L_DPO'), tolerance.gradient);
      const sum = gradientOf(model, sft(model, name, 'sum')).gradient;
      expectGradient(sum, await recorded('L_SFT_sum'), tolerance.gradient);
      const mean = gradientOf(model, sft(model, name, 'token-mean')).gradient;
      const whole = await recorded('L_SFT_token_mean');
      if (whole.size > 0) expectGradient(mean, whole, tolerance.gradient);
      for (const [piece, gradient] of Object.entries({
        L_DPO: dpo.gradient,
        L_SFT_sum: sum,
        L_SFT_token_mean: mean,
      })) {
        const { total, theta, phi } = grad_norms[piece];
        expect(Math.abs(norm(gradient) / total - 1), piece).toBeLessThan(tolerance.gradient);
        expect(Math.abs(norm(groupPart(gradient, 'backbone')) / theta - 1), piece).toBeLessThan(tolerance.gradient);
        expect(Math.abs(norm(groupPart(gradient, 'adapters')) / phi - 1), piece).toBeLessThan(tolerance.gradient);
      }
    });

    it.each(norms)('norms over %s, R and its gradient for all variables', async (over) => {
      using model = await openSpoModel(name, dtype);
      const { geometry, grad_norms } = golden();
      const { norm_g_w, norm_g_l, R, R_per_pair, active } = geometry[over];
      const { value, gradient } = await regularizer(model, name, over);
      value.chosenNorms.forEach((n, i) => {
        expect(Math.abs(n / norm_g_w[i] - 1)).toBeLessThan(tolerance.norm);
        expect(Math.abs(value.rejectedNorms[i] / norm_g_l[i] - 1)).toBeLessThan(tolerance.norm);
        const alone = regularizerValue([n], [value.rejectedNorms[i]]);
        expect(Math.abs(alone.value - R_per_pair[i])).toBeLessThan(2 * n * tolerance.norm);
        expect(alone.activeFraction).toBe(Number(active[i]));
      });
      expect(Math.abs(value.value / R - 1)).toBeLessThan(10 * tolerance.norm);
      expect(value.activeFraction).toBe(active.filter(Boolean).length / active.length);
      const expected = await recorded(`R_${over}`);
      if (expected.size > 0) expectGradient(gradient, expected, tolerance.regularizer);
      const recordedNorms = grad_norms[`R_${over}`];
      expect(Math.abs(norm(gradient) / recordedNorms.total - 1)).toBeLessThan(tolerance.regularizer);
      expect(Math.abs(norm(groupPart(gradient, 'backbone')) / recordedNorms.theta - 1)).toBeLessThan(
        tolerance.regularizer,
      );
      expect(Math.abs(norm(groupPart(gradient, 'adapters')) / recordedNorms.phi - 1)).toBeLessThan(
        tolerance.regularizer,
      );
    });

    it('inner products and cosines of the gradients of each pair', async () => {
      using model = await openSpoModel(name, dtype);
      const { geometry } = golden();
      examplesOf(name).forEach((example, i) => {
        const of = (half: 'chosen' | 'rejected'): Tensors =>
          gradientOf(model, (p) => pairLogProbsOf(model, p, [example])[half].reshape([])).gradient;
        const [w, l] = [of('chosen'), of('rejected')];
        for (const over of norms) {
          const part = (g: Tensors): Tensors => (over === 'all' ? g : groupPart(g, over));
          const inner = [...part(w)].reduce((n, [key, v]) => n + v.reduce((m, x, k) => m + x * l.get(key)![k], 0), 0);
          const sizes = norm(part(w)) * norm(part(l));
          expect(Math.abs(inner - geometry[over].inner[i]) / sizes).toBeLessThan(tolerance.cosine);
          const cosine = inner / sizes;
          expect(Math.abs(cosine - geometry[over].cosine[i])).toBeLessThan(tolerance.cosine);
          const apart = norm(difference(part(w), part(l))) ** 2;
          expect(Math.abs(apart / geometry[over].norm_diff_sq[i] - 1)).toBeLessThan(10 * tolerance.norm);
        }
      });
    });

    it.each([0, 1])('the lower level, run %i', async (index) => {
      using model = await openSpoModel(name, dtype);
      const { alpha, reduction, runs } = readSpo(name, 'lower.json');
      const { K, L_SFT_k, norm_theta_K_minus_theta, norm_theta_K_minus_theta_by_tensor, norm_grad_phi } = runs[index];
      const before = onHost(namesOf(model, ['backbone']), [...model.backbone.values()]);
      const losses: number[] = [];
      const loss = sft(model, name, reduction);
      const gradients: Tensor[] = [];
      const solution = descend(
        model.backbone,
        model.backbone,
        (theta) => {
          const at = { ...model.parameters, backbone: theta };
          const { value, gradient } = gradientOf(model, loss, ['backbone'], at);
          losses.push(value);
          const buffers = new Map(
            [...gradient].map(([key, values]) => [key, Tensor.from(values, { dtype, shape: theta.get(key)!.shape })]),
          );
          gradients.push(...buffers.values());
          return buffers;
        },
        { steps: K, learningRate: alpha },
      );
      const at = { ...model.parameters, backbone: solution.theta };
      const { value, gradient } = gradientOf(model, loss, ['adapters'], at);
      losses.push(value);
      expect(maxDifference(losses, L_SFT_k)).toBeLessThan(tolerance.loss);
      const path = spoFile(name, 'lower.safetensors');
      expect(relativeError(gradient, await readTensors(path, `K${K}/grad_phi/`))).toBeLessThan(tolerance.theta);
      expect(Math.abs(norm(gradient) / norm_grad_phi - 1)).toBeLessThan(tolerance.theta);
      const theta = onHost([...solution.theta.keys()], [...solution.theta.values()]);
      expect(relativeError(theta, await readTensors(path, `K${K}/theta/`))).toBeLessThan(tolerance.theta);
      const moved = difference(theta, before);
      expect(Math.abs(norm(moved) / norm_theta_K_minus_theta - 1)).toBeLessThan(tolerance.theta);
      for (const [key, expected] of Object.entries(norm_theta_K_minus_theta_by_tensor as Record<string, number>))
        expect(Math.abs(norm(new Map([[key, moved.get(key)!]])) - expected)).toBeLessThan(tolerance.theta);
      solution.release();
      for (const t of gradients) t.dispose();
      expect(onHost(namesOf(model, ['backbone']), [...model.backbone.values()])).toEqual(before);
    });
  });

  it('leaves nothing behind', async () => {
    const start = memory().storages;
    {
      using model = await openSpoModel('qwen2', 'float64');
      await regularizer(model, 'qwen2', 'all');
      await regularizer(model, 'qwen2', 'adapters');
    }
    expect(memory().storages).toBe(start);
  });
});

describe('regularizerValue', () => {
  it('is the mean excess of the chosen norms, 0 where the rejected one is as large', () => {
    const value = regularizerValue([3, 1, 2], [1, 5, 2]);
    expect(value).toEqual({
      value: 2 / 3,
      activeFraction: 1 / 3,
      chosenNorms: [3, 1, 2],
      rejectedNorms: [1, 5, 2],
    });
  });
});

describe('squared gradient norms', () => {
  const problem = (normOver: boolean[]) => ({
    variables: [Tensor.from(Float64Array.of(1, 2)), Tensor.from(Float64Array.of(3))],
    normOver,
    // y = x_0^2 + 5 x_1 z for sequence 0; z alone for sequence 1
    logProb: ([x, z]: readonly Tensor[], sequence: number): Tensor =>
      sequence === 0
        ? x
            .mul(x)
            .mul(Tensor.from(Float64Array.of(1, 0)))
            .sum()
            .add(
              x
                .mul(Tensor.from(Float64Array.of(0, 5)))
                .mul(z)
                .sum(),
            )
        : z.sum(),
  });

  it('run over the chosen variables; a variable that plays no part counts 0', () => {
    scope(() => {
      const of = (over: boolean[]): number[] => squaredGradientNorms(problem(over), 2).map((t) => t.item());
      expect(of([true, true])).toEqual([2 ** 2 + 15 ** 2 + 10 ** 2, 1]);
      expect(of([true, false])).toEqual([2 ** 2 + 15 ** 2, 0]);
      expect(of([false, true])).toEqual([100, 1]);
      expect(() => of([false, false])).toThrow(/normOver: expected at least one variable/);
    });
  });

  it('a gradient of norm 0 has no direction: only the other half of the pair counts', async () => {
    const p = problem([true, false]);
    const buffers = p.variables.map((t) => zerosLike(t));
    const value = await addRegularizer(p, 1, 1, buffers);
    expect(value).toMatchObject({ activeFraction: 1, rejectedNorms: [0] });
    // ∇ sqrt(4 x_0² + 25 z²) at x_0 = 1, z = 3.
    const n = Math.sqrt(4 + 225);
    expect(maxDifference(buffers[0].dataSync(), [4 / n, 0])).toBeLessThan(1e-15);
    expect(maxDifference(buffers[1].dataSync(), [75 / n])).toBeLessThan(1e-15);
    for (const t of [...p.variables, ...buffers]) t.dispose();
  });
});

describe('spoObjective', () => {
  it('is L_DPO + λ gap + γ R, and refuses negative weights', () => {
    const parts = { dpo: 1, sft: 5, sftStar: 3, regularizer: 4 };
    expect(spoObjective(parts, { lambda: 2, gamma: 0.5 })).toBe(7);
    expect(spoObjective(parts, { lambda: 0, gamma: 0 })).toBe(1);
    expect(() => spoObjective(parts, { lambda: -1, gamma: 0 })).toThrow(/lambda: expected a number of at least 0/);
    expect(() => spoObjective(parts, { lambda: 0, gamma: Number.NaN })).toThrow(/gamma/);
    expect(() => spoObjective(parts, { lambda: Number.POSITIVE_INFINITY, gamma: 0 })).toThrow(/lambda/);
  });
});
