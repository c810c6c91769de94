// What SPO's own options do: norms by token, finite differences, refusals; and what a step reports.
import { describe, expect, it } from 'vitest';
import type { CausalLM } from '../../src/models/causal-lm.js';
import type { Metrics } from '../../src/train/hooks.js';
import { SpoTask, type SpoTaskOptions } from '../../src/train/spo-task.js';
import { Trainable } from '../../src/train/task.js';
import {
  both,
  examplesOf,
  GOLDEN_SPO,
  groupPart,
  namesOf,
  onHost,
  openSpoModel,
  type Precision,
  readSpo,
} from '../objectives/spo-support.js';
import { describeWithShared } from '../shared.js';
import { difference, relativeError, type Tensors } from './support.js';

const common: SpoTaskOptions = {
  beta: 0.5,
  lambda: 1,
  gamma: 0.5,
  lowerSteps: 1,
  lowerLearningRate: 0.02,
  normOver: 'all',
  sftReduction: 'sum',
};

const taskFor = (model: CausalLM, trainable: Trainable, options: SpoTaskOptions): SpoTask => {
  const examples = examplesOf('qwen2');
  const reference = {
    chosen: Float64Array.from(examples, (e) => e.refChosenLogp!),
    rejected: Float64Array.from(examples, (e) => e.refRejectedLogp!),
  };
  return new SpoTask(trainable, examples, reference, options, () => model.backbone);
};

async function evaluate(
  given: Partial<SpoTaskOptions>,
  dtype: Precision = 'float64',
): Promise<{ metrics: Metrics; gradient: Tensors }> {
  using model = await openSpoModel('qwen2', dtype);
  const trainable = new Trainable(model, both);
  const task = taskFor(model, trainable, { ...common, ...given });
  const { losses, metrics } = await task.accumulate({ step: 0, microBatches: [[0, 1, 2, 3]] });
  const buffers = both.flatMap((g) => [...trainable.gradients.get(g)!.buffers.values()]);
  const gradient = onHost(namesOf(model), buffers);
  for (const t of losses) t.dispose();
  trainable.dispose();
  return { metrics: await metrics, gradient };
}

describeWithShared('the regularizer of a step', GOLDEN_SPO, () => {
  it.each(['all', 'adapters', 'backbone'] as const)('by finite differences over %s, in float64', async (normOver) => {
    const without = (await evaluate({ gamma: 0 })).gradient;
    const exact = await evaluate({ normOver });
    const near = await evaluate({ normOver, regularizerMethod: 'finite-differences' });
    for (const name of ['spo/regularizer', 'spo/active_fraction', 'grad_norm/chosen', 'grad_norm/rejected', 'loss'])
      expect(Math.abs(near.metrics[name] - exact.metrics[name]), name).toBeLessThan(1e-9);
    for (const group of both) {
      const term = (g: Tensors): Tensors => groupPart(difference(g, without), group);
      expect(relativeError(term(near.gradient), term(exact.gradient))).toBeLessThan(1e-6);
    }
  });

  it('by finite differences in float32, as far as these go', async () => {
    const without = (await evaluate({ gamma: 0 }, 'float32')).gradient;
    const exact = difference((await evaluate({}, 'float32')).gradient, without);
    const near = await evaluate({ regularizerMethod: 'finite-differences' }, 'float32');
    expect(relativeError(difference(near.gradient, without), exact)).toBeLessThan(1e-2);
  });

  it.each(['exact', 'finite-differences'] as const)('with norms by token, %s', async (regularizerMethod) => {
    const { metrics, gradient } = await evaluate({ normPerToken: true, regularizerMethod });
    const plain = await evaluate({});
    expect(metrics['grad_norm/chosen']).toBeCloseTo(plain.metrics['grad_norm/chosen'], 9);
    // R by hand, from norms of single pairs.
    const examples = examplesOf('qwen2');
    let expected = 0;
    for (let i = 0; i < 4; i++) {
      using model = await openSpoModel('qwen2', 'float64');
      const trainable = new Trainable(model, both);
      const { losses, metrics: one } = await taskFor(model, trainable, common).accumulate({
        step: 0,
        microBatches: [[i]],
      });
      const m = await one;
      const of = (side: 'chosen' | 'rejected'): number => m[`grad_norm/${side}`] / examples[i][`${side}Ids`].length;
      expected += Math.max(0, of('chosen') - of('rejected')) / 4;
      for (const t of losses) t.dispose();
      trainable.dispose();
    }
    expect(metrics['spo/regularizer']).toBeCloseTo(expected, 9);
    expect(relativeError(gradient, plain.gradient)).toBeGreaterThan(1e-3);
    const exact = await evaluate({ normPerToken: true });
    expect(relativeError(gradient, exact.gradient)).toBeLessThan(1e-6);
  });

  it.each(['all', 'adapters', 'backbone'] as const)('reports the cosine of the gradients over %s', async (normOver) => {
    const { cosine } = readSpo('qwen2', 'eval.json').geometry[normOver];
    const expected = cosine.reduce((a: number, b: number) => a + b, 0) / cosine.length;
    for (const [dtype, tolerance] of [
      ['float64', 1e-11],
      ['float32', 1e-5],
    ] as const)
      expect(Math.abs((await evaluate({ normOver }, dtype)).metrics.grad_cosine - expected)).toBeLessThan(tolerance);
  });

  it('refuses norms over no parameters', async () => {
    using model = await openSpoModel('qwen2', 'float64');
    const trainable = new Trainable(model, ['backbone']);
    expect(() => taskFor(model, trainable, { ...common, normOver: 'adapters' })).toThrow(
      /norm over adapters: expected parameters .* found none; use all, or gamma 0/,
    );
    trainable.dispose();
  });
});

describe('finite differences', () => {
  it('are refused with bfloat16, with the reason', async () => {
    const { requireDifferences } = await import('../../src/objectives/regularizer.js');
    expect(() => requireDifferences('bfloat16')).toThrow(
      /expected float32 or float64 weights, found bfloat16: .* round away/,
    );
    expect(() => requireDifferences('float32')).not.toThrow();
  });
});
