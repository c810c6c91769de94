// What a step of SPO measures of the gradients of single sequences: where, in passes of how many pairs, without waiting; and
// models with an op that cannot keep them apart.
import { afterEach, describe, expect, it, vi } from 'vitest';
import type { PreferenceExample } from '../../src/data/tokenize.js';
import { CausalLM } from '../../src/models/causal-lm.js';
import { squaredGradientNorms } from '../../src/objectives/index.js';
import { RecordedGradients } from '../../src/objectives/sequence-gradients.js';
import { mul } from '../../src/ops/elementwise.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import type { Metrics } from '../../src/train/hooks.js';
import { partsWithin, recordedBudget, recordedBytes } from '../../src/train/spo-parts.js';
import { SpoTask, type SpoTaskOptions } from '../../src/train/spo-task.js';
import { type GroupName, Trainable } from '../../src/train/task.js';
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
  regularizerProblem,
} from '../objectives/spo-support.js';
import { describeWithShared } from '../shared.js';
import { difference, norm, relativeError, type Tensors } from './support.js';

const common: SpoTaskOptions = {
  beta: 0.5,
  lambda: 1,
  gamma: 0.5,
  lowerSteps: 1,
  lowerLearningRate: 0.02,
  normOver: 'all',
  sftReduction: 'sum',
};

interface Evaluation {
  readonly metrics: Metrics;
  readonly gradient: Tensors;
}

type Prepare = (task: SpoTask) => void;

function taskOf(
  model: CausalLM,
  given: Partial<SpoTaskOptions>,
  groups: readonly GroupName[] = both,
  examples: readonly PreferenceExample[] = examplesOf('qwen2'),
) {
  const reference = {
    chosen: Float64Array.from(examples, (e) => e.refChosenLogp!),
    rejected: Float64Array.from(examples, (e) => e.refRejectedLogp!),
  };
  const trainable = new Trainable(model, groups);
  try {
    return {
      trainable,
      task: new SpoTask(trainable, examples, reference, { ...common, ...given }, () => model.backbone),
    };
  } catch (error) {
    trainable.dispose();
    throw error;
  }
}

async function evaluate(
  given: Partial<SpoTaskOptions>,
  {
    dtype = 'float64',
    prepare,
    examples,
  }: { dtype?: Precision; prepare?: Prepare; examples?: readonly PreferenceExample[] } = {},
): Promise<Evaluation> {
  using model = await openSpoModel('qwen2', dtype);
  const { trainable, task } = taskOf(model, given, both, examples);
  prepare?.(task);
  try {
    const { losses, metrics } = await task.accumulate({ step: 0, microBatches: [[0, 1, 2, 3]] });
    const buffers = both.flatMap((g) => [...trainable.gradients.get(g)!.buffers.values()]);
    const gradient = onHost(namesOf(model), buffers);
    for (const t of losses) t.dispose();
    return { metrics: await metrics, gradient };
  } finally {
    task.dispose();
    trainable.dispose();
  }
}

const measured = ['grad_cosine', 'grad_norm/chosen', 'grad_norm/rejected', 'spo/active_fraction', 'spo/regularizer'];
const measuredIn = (metrics: Metrics): string[] => measured.filter((name) => name in metrics);

/** So many pairs a recorded pass. */
const pairsAtATime =
  (count: number): Prepare =>
  (task) => {
    const cut = (pairs: readonly number[]): number[][] => partsWithin(pairs, () => 1, count);
    Object.assign(task, { recordedParts: cut });
  };

afterEach(() => void vi.restoreAllMocks());

describeWithShared('pairs without a prompt', GOLDEN_SPO, () => {
  // Their responses share nothing, and their first token has nothing to be predicted from.
  const examples = examplesOf('qwen2').map((e, i) => (i % 2 === 1 ? { ...e, promptIds: new Int32Array() } : e));

  it.each([{}, { normPerToken: true }, { lowerSteps: 0 }])('%j: beside others as by themselves', async (given) => {
    const whole = await evaluate(given, { examples });
    const single = await evaluate(given, { examples, prepare: pairsAtATime(1) });
    const differences = await evaluate({ ...given, regularizerMethod: 'finite-differences' }, { examples });
    for (const group of both) {
      const of = ({ gradient }: Evaluation): Tensors => groupPart(gradient, group);
      expect(relativeError(of(whole), of(single)), group).toBeLessThan(1e-11);
      expect(relativeError(of(whole), of(differences)), group).toBeLessThan(1e-6);
    }
    expect(whole.metrics['spo/active_fraction']).toBeGreaterThan(0);
    using model = await openSpoModel('qwen2', 'float64');
    const norms = scope(() =>
      squaredGradientNorms(regularizerProblem(model, examples, 'all'), 2 * examples.length).map((t) =>
        Math.sqrt(t.item()),
      ),
    );
    const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;
    const count = examples.length;
    expect(Math.abs(whole.metrics['grad_norm/chosen'] / mean(norms.slice(0, count)) - 1)).toBeLessThan(1e-11);
    expect(Math.abs(whole.metrics['grad_norm/rejected'] / mean(norms.slice(count)) - 1)).toBeLessThan(1e-11);
    // By token: by those that are predicted.
    const tokens = (['chosenIds', 'rejectedIds'] as const).flatMap((half) =>
      examples.map((e) => e[half].length - Number(e.promptIds.length === 0)),
    );
    const scaled = norms.map((n, i) => n / ('normPerToken' in given ? tokens[i] : 1));
    const R = mean(examples.map((_, i) => Math.max(0, scaled[i] - scaled[i + count])));
    expect(R).toBeGreaterThan(0);
    expect(Math.abs(whole.metrics['spo/regularizer'] / R - 1)).toBeLessThan(1e-10);
  });
});

describeWithShared('gradients of single sequences', GOLDEN_SPO, () => {
  it.each([
    [{ gamma: 0 }, true],
    [{ gamma: 0, gradNorms: 'off' }, false],
    [{ gamma: 0, lowerSteps: 0 }, false],
    [{ gamma: 0, lowerSteps: 0, gradNorms: 'on' }, true],
    [{ gamma: 0, ldAlpha: 0.5 }, false],
    [{ gamma: 0, ldAlpha: 0.5, gradNorms: 'on' }, true],
    [{ gamma: 0, lambda: 0 }, false],
    [{ gamma: 0, lambda: 0, gradNorms: 'on' }, true],
    [{ lowerSteps: 0 }, true],
    [{ lambda: 0 }, true],
    [{ regularizerMethod: 'finite-differences' }, true],
    [{ regularizerMethod: 'finite-differences', lowerSteps: 0 }, true],
    [{ regularizerMethod: 'finite-differences', ldAlpha: 0.5 }, true],
    [{ penaltyForm: 'first-order', gamma: 0 }, true],
  ] as const)('%j: measured %s, as recorded, or absent', async (given, expected) => {
    const { metrics } = await evaluate(given);
    expect(measuredIn(metrics)).toEqual(expected ? measured : []);
    if (!expected) return;
    const { R, cosine, norm_g_w } = readSpo('qwen2', 'eval.json').geometry.all;
    const mean = (values: number[]): number => values.reduce((a, b) => a + b, 0) / values.length;
    expect(metrics['spo/regularizer']).toBeCloseTo(R, 9);
    expect(metrics.grad_cosine).toBeCloseTo(mean(cosine), 11);
    expect(metrics['grad_norm/chosen']).toBeCloseTo(mean(norm_g_w), 9);
  });

  it.each([{ lowerSteps: 0 }, { lowerSteps: 1 }, { ldAlpha: 0.5 }, { lambda: 0 }] as const)(
    'measuring them changes no gradient (%j)',
    async (given) => {
      const [on, off] = [
        await evaluate({ ...given, gamma: 0, gradNorms: 'on' }),
        await evaluate({ ...given, gamma: 0, gradNorms: 'off' }),
      ];
      expect(relativeError(on.gradient, off.gradient)).toBeLessThan(1e-13);
      for (const [name, value] of Object.entries(off.metrics)) expect(on.metrics[name]).toBeCloseTo(value, 10);
    },
  );

  it.each([
    ['float64', 1e-12],
    ['float32', 1e-5],
  ] as const)('in %s: one pair a pass, or several', async (dtype, tolerance) => {
    for (const normOver of ['all', 'adapters'] as const) {
      const one = await evaluate({ normOver }, { dtype, prepare: pairsAtATime(1) });
      for (const count of [2, 3, 4]) {
        const several = await evaluate({ normOver }, { dtype, prepare: pairsAtATime(count) });
        expect(relativeError(several.gradient, one.gradient)).toBeLessThan(tolerance);
        for (const [name, value] of Object.entries(one.metrics))
          expect(Math.abs(several.metrics[name] - value) / Math.max(1, Math.abs(value)), name).toBeLessThan(tolerance);
      }
    }
  });

  it('small models take all pairs in one pass, which runs on only for active ones', async () => {
    const spy = vi.spyOn(RecordedGradients.prototype, 'addSquareGradients');
    await evaluate({});
    expect(spy).toHaveBeenCalledTimes(1);
    expect([...(spy.mock.calls[0][0] as number[])].filter((c) => c !== 0)).toHaveLength(
      2 * readSpo('qwen2', 'eval.json').geometry.all.active.filter(Boolean).length,
    );
  });

  it('a step waits for squared norms alone', async () => {
    // Every other read stays open until accumulate has returned.
    let open = (): void => undefined;
    const returned = new Promise<void>((resolve) => {
      open = resolve;
    });
    const read = Tensor.prototype.data;
    let squares = 0;
    vi.spyOn(Tensor.prototype, 'data').mockImplementation(async function (this: Tensor) {
      const isSquares = this.dtype === 'float64' && this.size === 8;
      const values = read.call(this);
      if (isSquares) squares++;
      else await returned;
      return values;
    });
    using model = await openSpoModel('qwen2', 'float32');
    const { trainable, task } = taskOf(model, {});
    const { losses, metrics } = await task.accumulate({ step: 0, microBatches: [[0, 1, 2, 3]] });
    expect(squares).toBe(1);
    open();
    expect(measuredIn(await metrics)).toEqual(measured);
    for (const t of losses) t.dispose();
    trainable.dispose();
  });

  it('leave no tensors behind', async () => {
    const before = memory().storages;
    for (const given of [
      { gamma: 0 },
      { gamma: 0, ldAlpha: 0.5, gradNorms: 'on' },
      { regularizerMethod: 'finite-differences' },
      { lowerSteps: 0, termNorms: true },
      { gamma: 0, lambda: 0 },
    ] as const)
      await evaluate(given);
    expect(memory().storages).toBe(before);
  });
});

describe('parts of a recorded pass', () => {
  it('take neighbours within a budget, one at least', () => {
    expect(partsWithin([3, 1, 2, 9, 1], (n) => n, 4)).toEqual([[3, 1], [2], [9], [1]]);
    expect(partsWithin([], () => 1, 4)).toEqual([]);
  });

  it('of SmolLM2-135M take two pairs of 128 + 128 tokens', () => {
    const config = { layers: 30, hiddenSize: 576, intermediateSize: 1536 };
    const model = { config, dtype: 'float32', backbone: new Map([['all', { size: 134_515_008 }]]) } as never;
    const pair = recordedBytes(model, 4 * 128);
    expect(pair / 2 ** 30).toBeCloseTo(0.76, 1);
    expect(partsWithin([1, 2, 3, 4], () => pair, recordedBudget(model))).toEqual([
      [1, 2],
      [3, 4],
    ]);
  });
});

describeWithShared('an op that cannot keep the gradients of sequences apart', GOLDEN_SPO, () => {
  /** The model with such an op, which changes nothing, at the end of each block. */
  const withUnstreamedOp = (): void => {
    type Stream = { x: Tensor; normed: Tensor };
    const blocks = CausalLM.prototype as unknown as { block: (...args: unknown[]) => Stream };
    const { block } = blocks;
    vi.spyOn(blocks, 'block').mockImplementation(function (this: CausalLM, ...args) {
      const { x, normed } = block.apply(this, args);
      return { x, normed: mul(normed, 1) };
    });
  };

  it.each([
    { gamma: 0 },
    { gamma: 0, lowerSteps: 0 },
    { gamma: 0, lowerSteps: 2, sftReduction: 'token-mean' },
    { gamma: 0, gradientCheckpointing: true },
    { gamma: 0.5, regularizerMethod: 'finite-differences' },
  ] as const)('takes passes of their own: the same step (%j)', async (given) => {
    const expected = await evaluate(given);
    withUnstreamedOp();
    const found = await evaluate(given);
    expect(relativeError(found.gradient, expected.gradient)).toBeLessThan(1e-11);
    for (const name of ['loss', 'spo/dpo', 'spo/sft', 'spo/sft_gap', 'logps/chosen'])
      expect(found.metrics[name]).toBeCloseTo(expected.metrics[name], 10);
    if (given.gamma === 0) expect(measuredIn(found.metrics)).toEqual([]);
    else expect(measuredIn(found.metrics)).toEqual(measured.filter((name) => name !== 'grad_cosine'));
  });

  it.each([
    [
      { gamma: 0.5 },
      /^\[mul\] has no rule that keeps .*; gamma 0.5 takes second derivatives of each sequence's log-probability through it: use gamma 0, or the regularizer method finite-differences$/,
    ],
    [{ gamma: 0, gradNorms: 'on' }, /^\[mul\] .*; grad norms on needs one: use grad norms off$/],
    [
      { gamma: 0, penaltyForm: 'first-order' },
      /^\[mul\] .*; the first-order form of the penalty's gradient .*: use penalty form difference, or lambda 0$/,
    ],
  ] as const)('is named with what to do about it (%j)', async (given, message) => {
    const before = memory().storages;
    withUnstreamedOp();
    await expect(evaluate(given)).rejects.toThrow(message);
    expect(memory().storages).toBe(before);
  });
});

describeWithShared('the terms of a step', GOLDEN_SPO, () => {
  /** Norms put together from whole gradients: what a change of λ, γ and K makes of them. */
  async function expected(given: Partial<SpoTaskOptions>): Promise<Record<string, number>> {
    const at = async (more: Partial<SpoTaskOptions>): Promise<Tensors> =>
      (await evaluate({ ...given, termNorms: false, ...more })).gradient;
    const [plain, penalized, whole] = [await at({ lambda: 0, gamma: 0 }), await at({ gamma: 0 }), await at({})];
    const part = (g: Tensors, group: GroupName): number => norm(groupPart(g, group));
    const [penalty, regularizer] = [difference(penalized, plain), difference(whole, penalized)];
    return {
      a: part(plain, 'adapters'),
      b: part(penalty, 'adapters'),
      c: part(plain, 'backbone'),
      d: part(penalty, 'backbone'),
      e: part(regularizer, 'backbone'),
      e_phi: part(regularizer, 'adapters'),
      phi: part(whole, 'adapters'),
      theta: part(whole, 'backbone'),
    };
  }

  it.each([
    [{ gamma: 0 }, ['a', 'b', 'c', 'd']],
    [{ gamma: 0, lambda: 0.3, penaltyForm: 'first-order', lowerLearningRate: 1e-9 }, ['a', 'b', 'c', 'd']],
    [{}, ['a', 'b', 'd', 'e_phi']],
    [{ gamma: 0, lowerSteps: 0 }, ['a', 'b']],
    [{ lowerSteps: 0 }, ['a', 'b', 'e_phi']],
    [{ lowerSteps: 0, termNorms: true }, ['a', 'b', 'c', 'd', 'e', 'e_phi']],
    [{ gamma: 0, lambda: 0 }, ['a', 'b', 'c', 'd']],
    [{ gamma: 0, ldAlpha: 0.5 }, ['a', 'b', 'd']],
    [{ ldAlpha: 0.5 }, ['a', 'b', 'd', 'e_phi']],
    [{ ldAlpha: 0.5, regularizerMethod: 'finite-differences' }, ['a', 'b', 'd', 'e_phi']],
    [{ ldAlpha: 0.5, lowerSteps: 0, gamma: 0 }, ['a', 'b']],
    [{ ldAlpha: 0.5, penaltyForm: 'first-order' }, ['a', 'b', 'd', 'e_phi']],
    [{ ldAlpha: 0.5, gamma: 0, lowerSolver: 'adam', lowerLearningRate: 1e-3 }, ['a', 'b', 'd']],
  ] as const)('%j: %j, and their shares', async (given, terms) => {
    const { metrics } = await evaluate(given);
    const found = Object.keys(metrics).flatMap((name) => /^spo\/term_(?!.*rounding)(.*)/.exec(name)?.[1] ?? []);
    expect(found.sort()).toEqual([...terms]);
    const norms = await expected(given);
    for (const term of terms) {
      expect(metrics[`spo/term_${term}`], term).toBeCloseTo(norms[term], 8);
      const whole = norms[['a', 'b', 'e_phi'].includes(term) ? 'phi' : 'theta'];
      expect(metrics[`spo/share_${term}`], `share of ${term}`).toBeCloseTo(norms[term] / whole, 8);
    }
    const isDifference =
      !('lowerSteps' in given) && !('penaltyForm' in given) && !('lambda' in given) && !('regularizerMethod' in given);
    if (isDifference) expect(metrics['spo/term_b_rounding']).toBeGreaterThan(0);
  });
});

describeWithShared('a lower level', GOLDEN_SPO, () => {
  it('needs a backbone that is trained', async () => {
    using model = await openSpoModel('qwen2', 'float64');
    expect(() => taskOf(model, { gamma: 0 }, ['adapters'])).toThrow(
      /lower steps 1: expected a trained backbone, .* found it frozen; use lower steps 0/,
    );
    expect(() => taskOf(model, {}, both).trainable.dispose()).not.toThrow();
  });
});

describeWithShared('checkpointing', GOLDEN_SPO, () => {
  it.each([
    { gamma: 0 },
    { gamma: 0, lowerSteps: 0, gradNorms: 'on' },
    { gamma: 0, ldAlpha: 0.5, gradNorms: 'on' },
    { gamma: 0, penaltyForm: 'first-order' },
    { regularizerMethod: 'finite-differences' },
  ] as const)('gives the same bits (%j)', async (given) => {
    const plain = await evaluate(given);
    const saving = await evaluate({ ...given, gradientCheckpointing: true });
    expect(relativeError(saving.gradient, plain.gradient)).toBe(0);
    expect(saving.metrics).toEqual(plain.metrics);
  });

  it('is refused where second derivatives need what it drops', async () => {
    await expect(evaluate({ gradientCheckpointing: true })).rejects.toThrow(
      /gradient checkpointing cannot be had with gamma 0.5: the regularizer's second derivatives need/,
    );
  });
});
