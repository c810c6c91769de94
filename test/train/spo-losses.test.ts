// SPO over every preference loss: F's gradient is that of the loss, as the DPO task forms it by another pass, plus what the
// penalty and the regularizer add, which no loss changes.
import { beforeAll, expect, it } from 'vitest';
import type { PreferenceExample } from '../../src/data/tokenize.js';
import { type PreferenceLossName, type PreferenceLossOptions, sftLoss } from '../../src/objectives/index.js';
import { preferenceLossNames } from '../../src/objectives/preference/facts.js';
import { DpoTask } from '../../src/train/dpo-task.js';
import { mismatchedPartners } from '../../src/train/mismatch.js';
import type { Weighting } from '../../src/train/preference-batch.js';
import type { PreferenceReference } from '../../src/train/reference.js';
import { SpoTask, type SpoTaskOptions } from '../../src/train/spo-task.js';
import { Trainable } from '../../src/train/task.js';
import {
  both,
  examplesOf,
  GOLDEN_SPO,
  gradientOf,
  groupPart,
  namesOf,
  onHost,
  openSpoModel,
  pairLogProbsOf,
} from '../objectives/spo-support.js';
import { describeWithShared } from '../shared.js';
import { difference, norm, relativeError, type Tensors } from './support.js';

type Objective = Partial<PreferenceLossOptions> & Weighting;

const lambda = 0.7;
const spo: Omit<SpoTaskOptions, 'lossType'> = {
  beta: 0.3,
  lambda,
  gamma: 0,
  lowerSteps: 0,
  lowerLearningRate: 0.02,
  normOver: 'all',
  sftReduction: 'sum',
};
const halves = [
  [0, 1],
  [2, 3],
];

/** With what some losses read beside log-probabilities: offsets for odpo, other prompts' responses for kto. */
const examples = (): PreferenceExample[] => examplesOf('qwen2').map((e, i) => ({ ...e, offset: 0.3 * i }));
function referenceOf(given: readonly PreferenceExample[]): PreferenceReference {
  const chosen = Float64Array.from(given, (e) => e.refChosenLogp!);
  const rejected = Float64Array.from(given, (e) => e.refRejectedLogp!);
  const partners = mismatchedPartners(given.map((e) => e.promptIds));
  const pairs = given.map(({ promptIds }, i) => ({ ...given[partners[i]], promptIds }));
  // Any reference will do: it enters the KL estimate alone, which no gradient goes through.
  return { chosen, rejected, mismatched: { pairs, chosen: chosen.map((x) => x - 1), rejected } };
}

/** The gradient of one step of a task. */
async function gradient(task: 'dpo' | 'spo', options: Objective & Partial<SpoTaskOptions>, microBatches: number[][]) {
  using model = await openSpoModel('qwen2', 'float64');
  const [trainable, pairs] = [new Trainable(model, both), examples()];
  const settings = { ...spo, ...options };
  const made =
    task === 'dpo'
      ? new DpoTask(trainable, pairs, referenceOf(pairs), settings)
      : new SpoTask(trainable, pairs, referenceOf(pairs), settings, () => model.backbone);
  const { losses, metrics } = await made.accumulate({ step: 0, microBatches });
  await metrics;
  const found = onHost(
    namesOf(model),
    both.flatMap((g) => [...trainable.gradients.get(g)!.buffers.values()]),
  );
  for (const t of losses) t.dispose();
  made.dispose();
  trainable.dispose();
  return found;
}

/** Options that a loss needs, or without which it would be another. */
const needed: { readonly [N in PreferenceLossName]?: Objective } = {
  robust: { labelSmoothing: 0.1 },
  cdpo: { labelSmoothing: 0.1 },
  exo_pair: { labelSmoothing: 0.1 },
  aot: { labelSmoothing: 0.1 },
};

describeWithShared('SPO over any loss', GOLDEN_SPO, () => {
  let sft: Tensors;
  /** What λ with one inner step, and γ, add to the gradient where the loss is sigmoid. */
  let added: { readonly penalty: Tensors; readonly regularizer: Tensors };

  beforeAll(async () => {
    using model = await openSpoModel('qwen2', 'float64');
    const f = (p: typeof model.parameters) =>
      sftLoss(pairLogProbsOf(model, p, examples()).chosen, { reduction: 'sum', tokens: 1 });
    sft = gradientOf(model, f).gradient;
    added = await additions({});
  });

  async function additions(loss: Objective): Promise<typeof added> {
    const [plain, penalized, whole] = [
      await gradient('dpo', loss, halves),
      await gradient('spo', { ...loss, lowerSteps: 1 }, halves),
      await gradient('spo', { ...loss, lowerSteps: 1, gamma: 0.2 }, halves),
    ];
    return { penalty: difference(penalized, plain), regularizer: difference(whole, penalized) };
  }

  const cases: readonly (readonly [string, Objective])[] = [
    ...preferenceLossNames.map((lossType) => [lossType, { lossType, ...needed[lossType] }] as const),
    ['wpo', { wpo: true }],
    ['wpo and LD-DPO', { wpo: true, ldAlpha: 0.5 }],
    ['NLL by token', { nllWeight: 0.5, nllReduction: 'token-mean' }],
    ['NLL by sequence', { lossType: 'ipo', nllWeight: 0.5, nllReduction: 'sequence-mean' }],
    ['a sum', { lossType: ['sigmoid', 'bco_pair', 'simpo'], lossWeights: [1, 0.5, 0.25] }],
    ['a divergence', { fDivergenceType: 'js_divergence' }],
  ];

  it.each(cases)('%s', async (_, loss) => {
    for (const parts of [[[0, 1, 2, 3]], halves]) {
      const preference = await gradient('dpo', loss, parts);
      expect(norm(preference)).toBeGreaterThan(0);
      const found = await gradient('spo', loss, parts);
      expect(relativeError(groupPart(found, 'adapters'), groupPart(preference, 'adapters'))).toBeLessThan(1e-10);
      const expected = new Map(
        [...preference].map(([name, values]) => [name, values.map((x, i) => x + lambda * sft.get(name)![i])]),
      );
      expect(relativeError(groupPart(found, 'backbone'), groupPart(expected, 'backbone'))).toBeLessThan(1e-10);
    }
    const { penalty, regularizer } = await additions(loss);
    for (const group of both) {
      expect(relativeError(groupPart(penalty, group), groupPart(added.penalty, group))).toBeLessThan(1e-9);
      expect(relativeError(groupPart(regularizer, group), groupPart(added.regularizer, group))).toBeLessThan(1e-9);
    }
  });
});
