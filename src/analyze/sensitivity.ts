// How the outcome of SPO depends on λ and γ (figure 5 of arXiv 2507.07723): a grid of short runs from one start, one table.
import type { PreferenceExample, PreparedData } from '../data/tokenize.js';
import type { CausalLM } from '../models/causal-lm.js';
import { scorePairs } from '../train/batch-source.js';
import type { GivenOptions } from '../train/options.js';
import { lineChart } from './charts.js';
import { formatNumber, type Report } from './report.js';
import { type ModelSource, watch } from './runs.js';

export interface SensitivityOptions {
  readonly lambdas: readonly number[];
  readonly gammas: readonly number[];
  /** Everything else, the same for all runs. */
  readonly spo: GivenOptions<'spo'>;
  readonly signal?: AbortSignal;
  readonly onProgress?: (done: number, total: number) => void;
}

/** One run of the grid, on the probe: changes from its start to its end, means over pairs. */
export interface GridRun {
  readonly lambda: number;
  readonly gamma: number;
  readonly chosenChange: number;
  /** Standard error of chosenChange over pairs. */
  readonly chosenError: number;
  readonly rejectedChange: number;
  readonly marginChange: number;
  readonly chosenLikelierBefore: number;
  readonly chosenLikelierAfter: number;
  /** Means over the run's steps, of the training metrics. */
  readonly regularizer: number;
  readonly activeFraction: number;
  readonly seconds: number;
}

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

function standardError(values: readonly number[]): number {
  const center = mean(values);
  const squares = values.reduce((total, v) => total + (v - center) ** 2, 0);
  return Math.sqrt(squares / Math.max(1, values.length - 1) / values.length);
}

async function runOne(
  source: ModelSource,
  data: PreparedData<PreferenceExample>,
  probe: readonly PreferenceExample[],
  options: SensitivityOptions,
  [lambda, gamma]: readonly [number, number],
): Promise<GridRun | undefined> {
  const startedAt = performance.now();
  const looks: { chosen: number[]; rejected: number[] }[] = [];
  const metrics: { regularizer: number; active: number }[] = [];
  const look = async (model: CausalLM): Promise<void> => {
    const scores = await scorePairs(model, model.parameters, probe, { batchSize: 32, signal: options.signal });
    looks.push({ chosen: Array.from(scores.chosen), rejected: Array.from(scores.rejected) });
  };
  const finished = await watch(source, data, {
    method: 'spo',
    // Without a regularizer its settings have no part.
    options: { ...options.spo, lambda, gamma, ...(gamma === 0 && { normPerToken: undefined }) },
    every: Number.MAX_SAFE_INTEGER,
    signal: options.signal,
    look,
    onStep: (_, m) =>
      metrics.push({ regularizer: m['spo/regularizer'] ?? 0, active: m['spo/active_fraction'] ?? Number.NaN }),
  });
  if (!finished) return undefined;
  const [first, last] = [looks[0], looks[looks.length - 1]];
  const chosen = last.chosen.map((value, i) => value - first.chosen[i]);
  const rejected = last.rejected.map((value, i) => value - first.rejected[i]);
  const likelier = (l: typeof first): number => mean(l.chosen.map((value, i) => Number(value > l.rejected[i])));
  return {
    lambda,
    gamma,
    chosenChange: mean(chosen),
    chosenError: standardError(chosen),
    rejectedChange: mean(rejected),
    marginChange: mean(chosen) - mean(rejected),
    chosenLikelierBefore: likelier(first),
    chosenLikelierAfter: likelier(last),
    regularizer: mean(metrics.map((m) => m.regularizer)),
    activeFraction: mean(metrics.map((m) => m.active)),
    seconds: (performance.now() - startedAt) / 1000,
  };
}

/** All runs of the grid; what is finished where the signal ended it early. */
export async function sweep(
  source: ModelSource,
  data: PreparedData<PreferenceExample>,
  probe: readonly PreferenceExample[],
  options: SensitivityOptions,
): Promise<GridRun[]> {
  const grid = options.lambdas.flatMap((lambda) => options.gammas.map((gamma) => [lambda, gamma] as const));
  const runs: GridRun[] = [];
  for (const point of grid) {
    const run = await runOne(source, data, probe, options, point);
    if (!run) break;
    runs.push(run);
    options.onProgress?.(runs.length, grid.length);
  }
  return runs;
}

function findings(runs: readonly GridRun[]): string[] {
  const best = runs.reduce((a, b) => (b.marginChange > a.marginChange ? b : a));
  const rising = runs.filter((r) => r.chosenChange > 2 * r.chosenError).length;
  const falling = runs.filter((r) => r.chosenChange < -2 * r.chosenError).length;
  return [
    `The margin came out best at λ = ${best.lambda}, γ = ${best.gamma}: it changed by ${formatNumber(best.marginChange)} nats.`,
    `Of ${runs.length} settings, chosen responses gained log-probability in ${rising} and lost it in ${falling}, at two standard errors.`,
  ];
}

/** The report of a finished grid. */
export function sensitivityReport(
  runs: readonly GridRun[],
  options: SensitivityOptions,
  facts: { model: string; pairs: number; steps: number },
): Report {
  const overLambda = options.lambdas.length > 1;
  const [x, series] = overLambda ? (['lambda', 'gamma'] as const) : (['gamma', 'lambda'] as const);
  const symbol = { lambda: 'λ', gamma: 'γ' };
  const points = (value: (r: GridRun) => number, name: string) =>
    runs.map((r) => ({ x: r[x], y: value(r), series: `${symbol[series]} = ${r[series]}`, panel: name }));
  return {
    id: 'sensitivity',
    title: 'Sensitivity of SPO to λ and γ',
    introduction: [
      `${facts.model} is trained by SPO for ${facts.steps} steps from the same weights on the same batches, once for every pair of λ and γ, and measured on ${facts.pairs} pairs.`,
    ],
    findings: findings(runs),
    charts: [
      lineChart(
        [
          ...points((r) => r.chosenChange, 'chosen'),
          ...points((r) => r.rejectedChange, 'rejected'),
          ...points((r) => r.marginChange, 'margin'),
        ],
        {
          id: 'sensitivity',
          title: `Change of log-probabilities over ${symbol[x]}`,
          caption: `From the start to step ${facts.steps}, means over ${facts.pairs} pairs, summed over a response's tokens.`,
          x: symbol[x],
          y: 'change of log π (nats)',
          zero: true,
          points: true,
        },
      ),
    ],
    tables: [
      {
        id: 'sensitivity',
        title: 'All runs',
        caption:
          'Changes in nats, means over pairs; ± one standard error for chosen. R and active: means over the steps.',
        columns: [
          'lambda',
          'gamma',
          'chosen',
          '± chosen',
          'rejected',
          'margin',
          'chosen likelier before',
          'after',
          'R',
          'active',
          'seconds',
        ],
        rows: runs.map((r) => [
          r.lambda,
          r.gamma,
          r.chosenChange,
          r.chosenError,
          r.rejectedChange,
          r.marginChange,
          r.chosenLikelierBefore,
          r.chosenLikelierAfter,
          r.regularizer,
          r.activeFraction,
          r.seconds,
        ]),
      },
    ],
    data: { ...facts, options: options.spo, lambdas: options.lambdas, gammas: options.gammas, runs },
  };
}
