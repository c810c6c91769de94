// How the outcome of SPO depends on λ and γ (figure 5 of arXiv 2507.07723): a grid of short runs from one start, one table.
import type { PreferenceExample, PreparedData } from '../data/tokenize.js';
import type { CausalLM } from '../models/causal-lm.js';
import { regularizerValue } from '../objectives/regularizer.js';
import { scorePairs } from '../train/batch-source.js';
import type { GivenOptions } from '../train/options.js';
import { lineChart, type Point } from './charts.js';
import { formatNumber, type Report } from './report.js';
import { lossNote, type ModelSource, watch } from './runs.js';
import { pairGradients, variableGroups } from './sequences.js';

export interface SensitivityOptions {
  readonly lambdas: readonly number[];
  readonly gammas: readonly number[];
  /** Everything else, the same for all runs. */
  readonly spo: GivenOptions<'spo'>;
  /** Pairs of the probe whose gradient norms are taken, for R: two backward passes each, at the start and after every run. */
  readonly gradientPairs: number;
  readonly signal?: AbortSignal;
  readonly onProgress?: (done: number, total: number) => void;
}

/** The probe at some weights. */
export interface GridLook {
  /** log π by pair, in nats. */
  readonly chosen: readonly number[];
  readonly rejected: readonly number[];
  /** R, and the share of pairs with ‖g_w‖ > ‖g_l‖, over the pairs whose gradients are taken: measured whether γ is 0 or not. */
  readonly regularizer: number;
  readonly activeFraction: number;
}

/** A mean over pairs, and its standard error. */
export interface Estimate {
  readonly mean: number;
  readonly error: number;
}

/** One run of the grid, on the probe: changes of log π from its start to its end, in nats. */
export interface GridRun {
  readonly lambda: number;
  readonly gamma: number;
  readonly chosen: Estimate;
  readonly rejected: Estimate;
  readonly margin: Estimate;
  /** Share of pairs whose chosen response is the likelier. */
  readonly chosenLikelier: number;
  readonly regularizer: number;
  readonly activeFraction: number;
  readonly seconds: number;
}

export interface Sweep {
  readonly start: GridLook;
  readonly runs: readonly GridRun[];
}

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

function estimate(values: readonly number[]): Estimate {
  const center = mean(values);
  const squares = values.reduce((total, v) => total + (v - center) ** 2, 0);
  return { mean: center, error: Math.sqrt(squares / Math.max(1, values.length - 1) / values.length) };
}

/** R of some pairs, over the variables and in the units that the trainer's options name. */
async function measureRegularizer(model: CausalLM, pairs: readonly PreferenceExample[], spo: GivenOptions<'spo'>) {
  const { normOver = 'all', normPerToken = false } = spo;
  const groups = variableGroups(model).filter((group) => normOver === 'all' || normOver === group);
  const norms: [number[], number[]] = [[], []];
  for (const pair of pairs) {
    const { normChosen, normRejected } = await pairGradients(model, pair, groups);
    // Without a prompt, the first token has no log-probability.
    const scored = (ids: Int32Array): number => (normPerToken ? ids.length - Number(pair.promptIds.length === 0) : 1);
    norms[0].push(normChosen / scored(pair.chosenIds));
    norms[1].push(normRejected / scored(pair.rejectedIds));
  }
  const { value, activeFraction } = regularizerValue(...norms);
  return { regularizer: value, activeFraction };
}

async function lookAt(
  model: CausalLM,
  probe: readonly PreferenceExample[],
  { signal, gradientPairs, spo }: SensitivityOptions,
): Promise<GridLook> {
  const { chosen, rejected } = await scorePairs(model, model.parameters, probe, { batchSize: 32, signal });
  const regularizer = await measureRegularizer(model, probe.slice(0, gradientPairs), spo);
  return { chosen: Array.from(chosen), rejected: Array.from(rejected), ...regularizer };
}

/** The trainer's options at one point of the grid, without settings of what has no part there. */
function optionsAt(spo: GivenOptions<'spo'>, lambda: number, gamma: number): GivenOptions<'spo'> {
  return {
    ...spo,
    lambda,
    gamma,
    ...(gamma === 0 && { normOver: undefined, normPerToken: undefined, regularizerMethod: undefined }),
    ...(lambda === 0 && { lambdaSchedule: undefined, lambdaRampSteps: undefined }),
  };
}

const likelier = ({ chosen, rejected }: GridLook): number =>
  mean(chosen.map((value, i) => Number(value > rejected[i])));

async function runOne(
  source: ModelSource,
  data: PreparedData<PreferenceExample>,
  probe: readonly PreferenceExample[],
  options: SensitivityOptions,
  { start, lambda, gamma }: { start: GridLook; lambda: number; gamma: number },
): Promise<GridRun | undefined> {
  const startedAt = performance.now();
  let end = start;
  const finished = await watch(source, data, {
    method: 'spo',
    options: optionsAt(options.spo, lambda, gamma),
    every: Number.MAX_SAFE_INTEGER,
    signal: options.signal,
    look: async (model, updates) => {
      if (updates > 0) end = await lookAt(model, probe, options);
    },
  });
  if (!finished) return undefined;
  const chosen = end.chosen.map((value, i) => value - start.chosen[i]);
  const rejected = end.rejected.map((value, i) => value - start.rejected[i]);
  return {
    lambda,
    gamma,
    chosen: estimate(chosen),
    rejected: estimate(rejected),
    margin: estimate(chosen.map((value, i) => value - rejected[i])),
    chosenLikelier: likelier(end),
    regularizer: end.regularizer,
    activeFraction: end.activeFraction,
    seconds: (performance.now() - startedAt) / 1000,
  };
}

/**
 * All runs of the grid, every one from a fresh copy of the model; undefined where the signal ended it early.
 * @throws KeelgradError for options of the trainer that it refuses, as `spo()` does
 */
export async function sweep(
  source: ModelSource,
  data: PreparedData<PreferenceExample>,
  probe: readonly PreferenceExample[],
  options: SensitivityOptions,
): Promise<Sweep | undefined> {
  const start = await (async () => {
    using model = await source();
    return await lookAt(model, probe, options);
  })();
  const grid = options.lambdas.flatMap((lambda) => options.gammas.map((gamma) => ({ start, lambda, gamma })));
  const runs: GridRun[] = [];
  for (const point of grid) {
    const run = await runOne(source, data, probe, options, point);
    if (!run) return undefined;
    runs.push(run);
    options.onProgress?.(runs.length, grid.length);
  }
  return { start, runs };
}

function findings({ start, runs }: Sweep): string[] {
  const best = runs.reduce((a, b) => (b.margin.mean > a.margin.mean ? b : a));
  const rising = runs.filter((r) => r.chosen.mean > 2 * r.chosen.error).length;
  const falling = runs.filter((r) => r.chosen.mean < -2 * r.chosen.error).length;
  const [least, most] = [Math.min, Math.max].map((end) => end(...runs.map((r) => r.regularizer)));
  return [
    `The margin came out largest at λ = ${best.lambda}, γ = ${best.gamma}: it changed by ${formatNumber(best.margin.mean)} ± ${formatNumber(best.margin.error)} nats.`,
    `Of ${runs.length} settings, chosen responses gained log-probability in ${rising} and lost it in ${falling}, at two standard errors.`,
    `R was ${formatNumber(start.regularizer)} at the start and ended between ${formatNumber(least)} and ${formatNumber(most)}.`,
  ];
}

const quantities = ['chosen', 'rejected', 'margin'] as const;

/** The report of a finished grid. */
export function sensitivityReport(
  found: Sweep,
  options: SensitivityOptions,
  facts: { model: string; pairs: number; steps: number },
): Report {
  const { runs } = found;
  const overLambda = options.lambdas.length > 1;
  const [x, series] = overLambda ? (['lambda', 'gamma'] as const) : (['gamma', 'lambda'] as const);
  const symbol = { lambda: 'λ', gamma: 'γ' };
  const weight = { lambda: 'λ (weight of the penalty)', gamma: 'γ (weight of the regularizer)' };
  const points = (y: (run: GridRun) => Pick<Point, 'y' | 'error' | 'panel'>): Point[] =>
    runs.map((run) => ({ x: run[x], series: `${symbol[series]} = ${run[series]}`, ...y(run) }));
  return {
    id: 'sensitivity',
    title: 'Sensitivity of SPO to λ and γ',
    introduction: [
      `${facts.model} is trained by SPO${lossNote(options.spo)} for ${facts.steps} steps from the same weights on the same batches, once for every pair of λ and γ, and measured on ${facts.pairs} pairs.`,
    ],
    findings: findings(found),
    charts: [
      lineChart(
        quantities.flatMap((name) => points((r) => ({ y: r[name].mean, error: r[name].error, panel: name }))),
        {
          id: 'sensitivity',
          title: `Change of log-probabilities over ${symbol[x]}`,
          caption: `From the start to step ${facts.steps}, means over ${facts.pairs} pairs, summed over a response's tokens; bars: one standard error.`,
          x: weight[x],
          y: 'change of log π (nats)',
          zero: true,
          points: true,
        },
      ),
      lineChart(
        points((r) => ({ y: r.regularizer })),
        {
          id: 'sensitivity-regularizer',
          title: `The regularizer R after training, over ${symbol[x]}`,
          caption: `R = mean of max(0, ‖g_w‖ − ‖g_l‖), measured on the same ${options.gradientPairs} pairs after every run, whether γ is 0 or not; at the start it was ${formatNumber(found.start.regularizer)}.`,
          x: weight[x],
          y: options.spo.normPerToken ? 'R (nats a token)' : 'R (nats)',
          points: true,
        },
      ),
    ],
    tables: [
      {
        id: 'sensitivity',
        title: 'All runs',
        caption: `Changes of log π in nats, means over ${facts.pairs} pairs, ± one standard error. Chosen was the likelier in ${formatNumber(likelier(found.start))} of the pairs at the start. R and the active share of pairs: after the run, over ${options.gradientPairs} pairs; at the start ${formatNumber(found.start.regularizer)} and ${formatNumber(found.start.activeFraction)}.`,
        columns: [
          'lambda',
          'gamma',
          ...quantities.flatMap((name) => [name, `± ${name}`]),
          'chosen likelier',
          'R',
          'active',
          'seconds',
        ],
        rows: runs.map((r) => [
          r.lambda,
          r.gamma,
          ...quantities.flatMap((name) => [r[name].mean, r[name].error]),
          r.chosenLikelier,
          r.regularizer,
          r.activeFraction,
          r.seconds,
        ]),
      },
    ],
    data: { ...facts, options: options.spo, lambdas: options.lambdas, gammas: options.gammas, ...found },
  };
}
