// Eight outer iterations of Algorithm 1 against every recorded run: every step, and where parameters end.
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { loadModel } from '../../src/io/model-folder.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import { completeParameters, preferenceLosses, squaredGradientNorms } from '../../src/objectives/index.js';
import { clipFactor } from '../../src/optim/clip.js';
import { scope } from '../../src/tensor/scope.js';
import { Tensor } from '../../src/tensor/tensor.js';
import type { Metrics } from '../../src/train/hooks.js';
import { maxDifference } from '../models/support.js';
import {
  examplesOf,
  GOLDEN_SPO,
  type ModelName,
  openSpoModel,
  pairLogProbsOf,
  readSpo,
  recordedBatches,
  recordsOf,
  regularizerProblem,
  spoFile,
  spoPath,
} from '../objectives/spo-support.js';
import { describeWithShared } from '../shared.js';
import {
  difference,
  errorOfMove,
  type Given,
  type Run,
  readTensors,
  savedAdapter,
  savedModel,
  type Tensors,
  temporaryFolder,
  train,
} from './support.js';

interface RecordedRun {
  readonly name: string;
  readonly steps: number;
  readonly steps_run: readonly RecordedIteration[];
  readonly [setting: string]: unknown;
}

interface RecordedIteration {
  readonly batch: number;
  readonly F: number;
  readonly L_DPO: number;
  readonly L_SFT: number;
  readonly L_SFT_K: number;
  readonly sft_gap: number;
  readonly R: number;
  readonly grad_norms: { readonly total: number; readonly theta: number; readonly phi: number };
  readonly clip_coef: number;
  readonly loss_per_pair: number[];
  readonly chosen_logps: number[];
  readonly rejected_logps: number[];
  readonly norm_g_w: number[];
  readonly norm_g_l: number[];
}

const runNames: readonly (readonly [ModelName, string])[] = [
  ...['sgd', 'adamw'].flatMap((optimizer) =>
    ['gamma0_k1_noclip', 'gamma0.2_k1_clip1', 'gamma0_k2_clip1', 'gamma0.2_k2_noclip', 'gamma0.2_k1_clip30'].map(
      (rest) => ['qwen2', `${optimizer}_${rest}`] as const,
    ),
  ),
  ['llama', 'sgd_gamma0.2_k2_noclip'],
  ['llama', 'adamw_gamma0.2_k1_clip1'],
];

const recordedRun = (name: ModelName, run: string): RecordedRun =>
  readSpo(name, 'trajectories.json').runs.find((r: RecordedRun) => r.name === run);

function optionsOf(name: ModelName, run: RecordedRun, data: string): Given {
  return {
    model: spoPath(name, 'model'),
    adapter: spoPath(name, 'adapter'),
    data,
    'batch-size': 4,
    'max-steps': run.steps,
    'no-shuffle': true,
    beta: run.beta,
    lambda: run.lambda,
    gamma: run.gamma,
    'lower-steps': run.K,
    'lower-learning-rate': run.alpha,
    'learning-rate-backbone': run.lr_backbone,
    'learning-rate-adapters': run.lr_adapters,
    'lr-schedule': 'constant',
    optimizer: run.optimizer,
    'weight-decay': run.weight_decay,
    ...((run.weight_decay as number) > 0 && { 'weight-decay-params': 'all' }),
    'max-grad-norm': run.max_grad_norm ?? 0,
    'norm-over': run.over,
    'sft-reduction': run.sft,
  };
}

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

/** What a recorded iteration says of our metrics. */
function expectedMetrics(step: RecordedIteration, gamma: number): Record<string, number> {
  return {
    loss: step.F,
    'spo/dpo': step.L_DPO,
    'spo/sft': step.L_SFT,
    'spo/sft_star': step.L_SFT_K,
    'spo/sft_gap': step.sft_gap,
    grad_norm: step.grad_norms.total,
    'grad_norm/backbone': step.grad_norms.theta,
    'grad_norm/adapters': step.grad_norms.phi,
    'logps/chosen': mean(step.chosen_logps),
    'logps/rejected': mean(step.rejected_logps),
    ...(gamma > 0 && {
      'spo/regularizer': step.R,
      'grad_norm/chosen': mean(step.norm_g_w),
      'grad_norm/rejected': mean(step.norm_g_l),
      'spo/active_fraction': mean(step.norm_g_w.map((n, i) => Number(n > step.norm_g_l[i]))),
    }),
  };
}

/** What clipping multiplies a gradient of this norm by. */
const clipped = (norm: number, maxNorm: number): number =>
  scope(() => clipFactor(Tensor.from(Float64Array.of(norm)), maxNorm).item());

/** The worst deviation of every metric: of log-probabilities absolute, else relative to max(1, ·). */
function worstErrors(found: readonly Metrics[], run: RecordedRun): Record<string, number> {
  const worst: Record<string, number> = {};
  for (const [i, step] of run.steps_run.entries())
    for (const [key, value] of Object.entries(expectedMetrics(step, run.gamma as number))) {
      const error = Math.abs(found[i][key] - value) / (key.startsWith('logps/') ? 1 : Math.max(1, Math.abs(value)));
      worst[key] = Math.max(worst[key] ?? 0, Number.isNaN(error) ? Number.POSITIVE_INFINITY : error);
    }
  return worst;
}

/** The README's tolerances for a run in float32; what it does not name is as loose as F. */
const float32Tolerance: Readonly<Record<string, number>> = { 'spo/dpo': 1e-5, grad_norm: 1e-5 };

const largestElement = (tensors: Tensors): number =>
  Math.max(...[...tensors.values()].map((values) => values.reduce((a, x) => Math.max(a, Math.abs(x)), 0)));

const startOf = async (name: ModelName): Promise<{ theta: Tensors; phi: Tensors }> => ({
  theta: await readTensors(spoPath(name, 'model', 'model.safetensors')),
  phi: await readTensors(spoPath(name, 'adapter', 'adapter_model.safetensors')),
});

describeWithShared('the trajectories of golden/spo', GOLDEN_SPO, () => {
  const folder = temporaryFolder();

  async function follow(name: ModelName, runName: string, dtype: string) {
    const run = recordedRun(name, runName);
    const cycling = run.batches === 'cycle';
    expect(run.steps_run.map((step) => step.batch)).toEqual(run.steps_run.map((_, i) => (cycling ? i % 2 : 0)));
    const rows = recordsOf(
      recordedBatches(name)
        .slice(0, cycling ? 2 : 1)
        .flat(),
    );
    const done = await train('spo', { ...optionsOf(name, run, folder.write('pairs.json', rows)), dtype });
    expect(done.metrics).toHaveLength(run.steps);
    const file = await readTensors(spoFile(name, `trajectories/${runName}.safetensors`), 'final/');
    const part = (adapters: boolean): Tensors =>
      new Map([...file].filter(([key]) => key.includes('.lora_') === adapters));
    const start = await startOf(name);
    const [theta, phi] = [await savedModel(done.result.output), await savedAdapter(done.result.output)];
    return {
      errors: worstErrors(done.metrics, run),
      theta: errorOfMove(theta, part(false), start.theta),
      phi: errorOfMove(phi, part(true), start.phi),
      element: Math.max(largestElement(difference(theta, part(false))), largestElement(difference(phi, part(true)))),
      done,
      run,
    };
  }

  it.each(runNames)('%s %s in float64', async (name, runName) => {
    const { errors, theta, phi, done, run } = await follow(name, runName, 'float64');
    for (const [key, error] of Object.entries(errors)) expect(error, key).toBeLessThan(1e-9);
    expect(theta).toBeLessThan(1e-8);
    expect(phi).toBeLessThan(1e-8);
    for (const [i, step] of done.metrics.entries()) {
      expect(step['learning_rate/backbone']).toBe(run.lr_backbone);
      expect(step['learning_rate/adapters']).toBe(run.lr_adapters);
      const factor = clipped(step.grad_norm, (run.max_grad_norm as number | null) ?? 0);
      expect(Math.abs(factor / run.steps_run[i].clip_coef - 1)).toBeLessThan(1e-9);
    }
  });

  // The metrics of a step are means: its pairs are looked at where a run of fewer steps ends.
  it.each([
    ['qwen2', 'sgd_gamma0.2_k1_clip30', 'float64'],
    ['qwen2', 'adamw_gamma0.2_k2_noclip', 'float64'],
    ['llama', 'sgd_gamma0.2_k2_noclip', 'float64'],
    ['llama', 'adamw_gamma0.2_k1_clip1', 'float32'],
  ] as const)('%s %s in %s: every pair of every step', async (name, runName, dtype) => {
    const run = recordedRun(name, runName);
    const batches = recordedBatches(name);
    const rows = recordsOf((run.batches === 'cycle' ? batches : batches.slice(0, 1)).flat());
    const [ofLogps, ofNorms] = dtype === 'float64' ? [1e-8, 1e-9] : [1e-4, 1e-5];
    for (const [k, step] of run.steps_run.entries()) {
      const options = { ...optionsOf(name, run, folder.write('pairs.json', rows)), 'max-steps': k, dtype };
      using model = k === 0 ? await openSpoModel(name, dtype) : await ended(await train('spo', options), dtype);
      const examples = examplesOf(name, step.batch);
      scope(() => {
        const pairs = pairLogProbsOf(model, model.parameters, examples);
        const losses = preferenceLosses.sigmoid.value(pairs, completeParameters({ beta: run.beta as number }));
        expect(maxDifference(pairs.chosen.dataSync(), step.chosen_logps)).toBeLessThan(ofLogps);
        expect(maxDifference(pairs.rejected.dataSync(), step.rejected_logps)).toBeLessThan(ofLogps);
        expect(maxDifference(losses.dataSync(), step.loss_per_pair)).toBeLessThan(ofLogps);
        const squares = squaredGradientNorms(regularizerProblem(model, examples, 'all'), 2 * examples.length);
        for (const [i, expected] of [...step.norm_g_w, ...step.norm_g_l].entries())
          expect(Math.abs(Math.sqrt(squares[i].item()) / expected - 1)).toBeLessThan(ofNorms);
      });
    }
  });

  const ended = ({ result: { output } }: Run, dtype: string): Promise<CausalLM> =>
    loadModel(join(output, 'model'), { dtype: dtype as 'float64', adapter: join(output, 'adapter') });

  it.each(runNames)('%s %s in float32', async (name, runName) => {
    const { errors, theta, phi, element } = await follow(name, runName, 'float32');
    for (const [key, error] of Object.entries(errors)) expect(error, key).toBeLessThan(float32Tolerance[key] ?? 1e-4);
    expect(theta).toBeLessThan(1e-3);
    expect(phi).toBeLessThan(1e-3);
    expect(element).toBeLessThan(1e-3);
  });
});
