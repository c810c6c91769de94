// What a step of SPO does not do: passes over the model that nothing asks for, derivatives of norms that are not active.
// The numbers of a step are the same with them: only counting shows.
import { afterEach, expect, it, vi } from 'vitest';
import { RecordedGradients } from '../../src/objectives/sequence-gradients.js';
import { SpoTask, type SpoTaskOptions } from '../../src/train/spo-task.js';
import { Trainable } from '../../src/train/task.js';
import { both, examplesOf, GOLDEN_SPO, type ModelName, openSpoModel, readSpo } from '../objectives/spo-support.js';
import { describeWithShared } from '../shared.js';

afterEach(() => vi.restoreAllMocks());

/** How often a step on some pairs of batch 0 evaluates the model, and asks for derivatives of norms. */
async function count(name: ModelName, given: Partial<SpoTaskOptions>, pairs: number[]) {
  using model = await openSpoModel(name, 'float64');
  const examples = examplesOf(name);
  const reference = {
    chosen: Float64Array.from(examples, (e) => e.refChosenLogp!),
    rejected: Float64Array.from(examples, (e) => e.refRejectedLogp!),
  };
  const options: SpoTaskOptions = {
    beta: 0.5,
    lambda: 1,
    gamma: 0,
    lowerSteps: 1,
    lowerLearningRate: 0.02,
    normOver: 'all',
    sftReduction: 'sum',
    ...given,
  };
  const trainable = new Trainable(model, both);
  const task = new SpoTask(trainable, examples, reference, options, () => model.backbone);
  const passes = vi.spyOn(model, 'logProbs');
  const derivatives = vi.spyOn(RecordedGradients.prototype, 'addSquareGradients');
  const { losses, metrics } = await task.accumulate({ step: 0, microBatches: [pairs] });
  const active = (await metrics)['spo/active_fraction'];
  for (const t of losses) t.dispose();
  task.dispose();
  trainable.dispose();
  const found = { passes: passes.mock.calls.length, derivatives: derivatives.mock.calls.length, active };
  vi.restoreAllMocks();
  return found;
}

describeWithShared('the cost of a step', GOLDEN_SPO, () => {
  it.each([0, 1, 2, 3])(
    'without a regularizer: one pass, and one for each step of the lower level (K = %d)',
    async (K) => {
      const found = await count('qwen2', { lowerSteps: K }, [0, 1, 2, 3]);
      expect(found).toMatchObject({ passes: K + 1, derivatives: 0 });
    },
  );

  it('plain DPO is one pass', async () => {
    const found = await count('qwen2', { lambda: 0, lowerSteps: 0 }, [0, 1, 2, 3]);
    expect(found).toMatchObject({ passes: 1, derivatives: 0 });
  });

  it.each(['qwen2', 'llama'] as const)(
    '%s: derivatives of norms where a pair is active, and nowhere else',
    async (name) => {
      const { active } = readSpo(name, 'eval.json').geometry.all as { active: boolean[] };
      expect(new Set(active).size).toBe(2);
      for (const [pair, isActive] of active.entries()) {
        const found = await count(name, { gamma: 0.5 }, [pair]);
        expect(found, `pair ${pair}`).toEqual({ passes: 2, derivatives: Number(isActive), active: Number(isActive) });
      }
      const asleep = active.flatMap((a, pair) => (a ? [] : [pair]));
      expect((await count(name, { gamma: 0.5 }, asleep)).derivatives).toBe(0);
      expect((await count(name, { gamma: 0.5 }, [...asleep, active.indexOf(true)])).derivatives).toBe(1);
    },
  );
});
