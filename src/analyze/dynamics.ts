// What becomes of the log-probabilities of chosen and rejected responses while training, DPO and SPO from one start
// (figures 1 and 4 of arXiv 2507.07723): on a fixed probe, and batch by batch as the trainer sees them.
import type { PreferenceExample, PreparedData } from '../data/tokenize.js';
import type { CausalLM } from '../models/causal-lm.js';
import { scorePairs } from '../train/batch-source.js';
import type { GivenOptions } from '../train/options.js';
import { type Chart, lineChart, movingAverage, type Point, rawAndSmooth } from './charts.js';
import { formatNumber, type Report, type Table } from './report.js';
import { lossNote, type ModelSource, type PreferenceMethod, watch } from './runs.js';
import { type PairGradients, pairGradients, variableGroups } from './sequences.js';

export interface DynamicsOptions {
  readonly dpo: GivenOptions<'dpo'>;
  readonly spo: GivenOptions<'spo'>;
  /** Updates between two looks at the probe. */
  readonly every: number;
  /** Pairs of the probe whose gradients are taken too: two backward passes each, at every look. */
  readonly gradientPairs: number;
  /** Weight of the past in the smoothed curves, 0 to below 1. */
  readonly emaDecay: number;
  readonly signal?: AbortSignal;
  readonly onProgress?: (method: PreferenceMethod, updates: number) => void;
}

/** The probe after some updates: means over its pairs. */
export interface ProbeLook {
  readonly updates: number;
  readonly chosen: number;
  readonly rejected: number;
  /** Share of pairs whose chosen response is the likelier. */
  readonly chosenLikelier: number;
  /** ‖g_w‖² - ⟨g_w, g_l⟩ and ⟨g_w, g_l⟩ - ‖g_l‖² (figure 1b), over the pairs whose gradients are taken. */
  readonly termChosen: number;
  readonly termRejected: number;
  readonly normChosen: number;
  readonly normRejected: number;
  readonly cosine: number;
}

/** A training batch as the trainer saw it: means over the batch, before the update. */
export interface BatchLook {
  readonly step: number;
  readonly chosen: number;
  readonly rejected: number;
  readonly margin: number;
}

export interface MethodDynamics {
  readonly method: PreferenceMethod;
  readonly probe: readonly ProbeLook[];
  readonly batches: readonly BatchLook[];
}

const mean = (values: ArrayLike<number>): number => {
  let total = 0;
  for (let i = 0; i < values.length; i++) total += values[i];
  return values.length > 0 ? total / values.length : Number.NaN;
};

async function gradientTerms(model: CausalLM, pairs: readonly PreferenceExample[]) {
  const rows: PairGradients[] = [];
  for (const pair of pairs) rows.push(await pairGradients(model, pair, variableGroups(model)));
  const average = (of: (row: PairGradients) => number): number => mean(rows.map(of));
  return {
    termChosen: average((r) => r.normChosen ** 2 - r.inner),
    termRejected: average((r) => r.inner - r.normRejected ** 2),
    normChosen: average((r) => r.normChosen),
    normRejected: average((r) => r.normRejected),
    cosine: average((r) => r.inner / (r.normChosen * r.normRejected)),
  };
}

async function lookAt(
  model: CausalLM,
  updates: number,
  probe: readonly PreferenceExample[],
  options: DynamicsOptions,
): Promise<ProbeLook> {
  const scores = await scorePairs(model, model.parameters, probe, { batchSize: 32, signal: options.signal });
  const likelier = Array.from(scores.chosen, (value, i) => Number(value > scores.rejected[i]));
  return {
    updates,
    chosen: mean(scores.chosen),
    rejected: mean(scores.rejected),
    chosenLikelier: mean(likelier),
    ...(await gradientTerms(model, probe.slice(0, options.gradientPairs))),
  };
}

/** Trains by both methods from the same start on the same batches; undefined where the signal ended it early. */
export async function followDynamics(
  source: ModelSource,
  data: PreparedData<PreferenceExample>,
  probe: readonly PreferenceExample[],
  options: DynamicsOptions,
): Promise<MethodDynamics[] | undefined> {
  const results: MethodDynamics[] = [];
  for (const method of ['dpo', 'spo'] as const) {
    const looks: ProbeLook[] = [];
    const batches: BatchLook[] = [];
    const finished = await watch(source, data, {
      method,
      options: options[method],
      every: options.every,
      signal: options.signal,
      look: async (model, updates) => {
        looks.push(await lookAt(model, updates, probe, options));
        options.onProgress?.(method, updates);
      },
      onStep: (step, metrics) =>
        batches.push({
          step,
          chosen: metrics['logps/chosen'],
          rejected: metrics['logps/rejected'],
          margin: metrics['logps/chosen'] - metrics['logps/rejected'],
        }),
    });
    if (!finished) return undefined;
    results.push({ method, probe: looks, batches });
  }
  return results;
}

const nameOf = (method: PreferenceMethod): string => method.toUpperCase();

/** log π(chosen) - log π(rejected), against the start. */
const logRatio = (look: ProbeLook, start: ProbeLook): number =>
  look.chosen - start.chosen - (look.rejected - start.rejected);

type OfLook = (look: ProbeLook, start: ProbeLook) => number;

/** Curves of probe quantities, raw and smoothed, one panel a method. */
const probePoints = (
  results: readonly MethodDynamics[],
  series: Readonly<Record<string, OfLook>>,
  decay: number,
): Point[] =>
  results.flatMap(({ method, probe }) =>
    Object.entries(series).flatMap(([name, value]) =>
      rawAndSmooth(
        probe.map((look) => ({ x: look.updates, y: value(look, probe[0]) })),
        decay,
        { series: name, panel: nameOf(method) },
      ),
    ),
  );

/** Curves of the training batches, one panel a method. */
const batchPoints = (
  results: readonly MethodDynamics[],
  series: readonly ('chosen' | 'rejected' | 'margin')[],
  decay: number,
): Point[] =>
  results.flatMap(({ method, batches }) =>
    series.flatMap((name) =>
      rawAndSmooth(
        batches.map((b) => ({ x: b.step, y: b[name] })),
        decay,
        { series: name, panel: nameOf(method) },
      ),
    ),
  );

const steps = 'optimizer steps';

const smoothing = (decay: number): string =>
  `Pale: as measured; strong: exponential moving average, decay ${decay} a step.`;

function probeCharts(results: readonly MethodDynamics[], options: DynamicsOptions, pairs: number): Chart[] {
  const { emaDecay: decay, gradientPairs } = options;
  const probe = `Means over the ${pairs} pairs of the probe, which no step trains on where the data allow it.`;
  const both = smoothing(decay);
  return [
    lineChart(
      probePoints(
        results,
        {
          chosen: (look, start) => look.chosen - start.chosen,
          rejected: (look, start) => look.rejected - start.rejected,
        },
        decay,
      ),
      {
        id: 'dynamics-logps',
        title: 'Log-probability of chosen and rejected responses while training',
        caption: `Change against the start, summed over a response's tokens (figure 1a). ${probe} ${both}`,
        x: steps,
        y: 'change of log π (nats)',
        zero: true,
      },
    ),
    lineChart(
      probePoints(
        results,
        {
          'chosen: ‖g_w‖² − ⟨g_w, g_l⟩': (look) => look.termChosen,
          'rejected: ⟨g_w, g_l⟩ − ‖g_l‖²': (look) => look.termRejected,
        },
        decay,
      ),
      {
        id: 'dynamics-gradient-terms',
        title: 'Gradient terms of Theorem 1',
        caption: `What a step of DPO does to the two log-probabilities, per η β (1 − σ(s)) (figure 1b). Means over ${gradientPairs} pairs. ${both}`,
        x: steps,
        y: 'gradient term (nats²)',
        zero: true,
      },
    ),
    lineChart(
      results.flatMap(({ method, probe: looks }) =>
        rawAndSmooth(
          looks.map((look) => ({ x: look.updates, y: logRatio(look, looks[0]) })),
          decay,
          { series: nameOf(method) },
        ),
      ),
      {
        id: 'dynamics-log-ratio',
        title: 'Log ratio: how much more the chosen response gained than the rejected one',
        caption: `Δ log π(chosen) − Δ log π(rejected) (figure 1c). ${probe} ${both}`,
        x: steps,
        y: 'log ratio (nats)',
        zero: true,
      },
    ),
  ];
}

function batchCharts(results: readonly MethodDynamics[], { emaDecay: decay }: DynamicsOptions): Chart[] {
  const caption = `As the trainer saw them, before each update (figure 4). ${smoothing(decay)}`;
  return [
    lineChart(batchPoints(results, ['chosen', 'rejected'], decay), {
      id: 'dynamics-batches',
      title: 'Log-probabilities of the training batches',
      caption,
      x: steps,
      y: 'log π, mean over the batch (nats)',
    }),
    lineChart(batchPoints(results, ['margin'], decay), {
      id: 'dynamics-batch-margins',
      title: 'Log ratio of chosen to rejected responses in the training batches',
      caption: `log π(chosen) − log π(rejected). ${caption}`,
      x: steps,
      y: 'log ratio, mean over the batch (nats)',
      zero: true,
    }),
  ];
}

/** Columns of the table: those of the curves stand there once more, smoothed. */
const columns: readonly { readonly name: string; readonly of: OfLook; readonly smooth?: true }[] = [
  { name: 'logps chosen', of: (look) => look.chosen, smooth: true },
  { name: 'logps rejected', of: (look) => look.rejected, smooth: true },
  { name: 'log ratio', of: logRatio, smooth: true },
  { name: 'chosen likelier', of: (look) => look.chosenLikelier },
  { name: 'term chosen', of: (look) => look.termChosen, smooth: true },
  { name: 'term rejected', of: (look) => look.termRejected, smooth: true },
  { name: 'norm g_w', of: (look) => look.normChosen },
  { name: 'norm g_l', of: (look) => look.normRejected },
  { name: 'cosine', of: (look) => look.cosine },
];

function table(results: readonly MethodDynamics[], decay: number): Table {
  const rows = results.flatMap(({ method, probe }) => {
    const at = probe.map((look) => look.updates);
    const values = columns.flatMap(({ of, smooth }) => {
      const raw = probe.map((look) => of(look, probe[0]));
      return smooth ? [raw, movingAverage(raw, decay, at)] : [raw];
    });
    return probe.map((look, i) => [nameOf(method), look.updates, ...values.map((column) => column[i])]);
  });
  return {
    id: 'dynamics',
    title: 'The probe',
    caption: `Means over the pairs of the probe; log-probabilities and their ratio in nats, gradient terms in nats². EMA: exponential moving average, decay ${decay} a step.`,
    columns: ['method', 'updates', ...columns.flatMap(({ name, smooth }) => (smooth ? [name, `${name} EMA`] : [name]))],
    rows,
  };
}

const direction = (change: number): string => (change < 0 ? 'fell' : 'rose');

function findings(results: readonly MethodDynamics[]): string[] {
  return results.map(({ method, probe }) => {
    const [first, last] = [probe[0], probe[probe.length - 1]];
    const [chosen, rejected] = [last.chosen - first.chosen, last.rejected - first.rejected];
    const agrees = probe
      .slice(1)
      .filter((look, i) => Math.sign(look.chosen - probe[i].chosen) === Math.sign(probe[i].termChosen)).length;
    const sign =
      method === 'dpo' && probe.length > 1
        ? ` The sign of the chosen gradient term foretold the direction of chosen between ${agrees} of ${probe.length - 1} looks.`
        : '';
    return (
      `${nameOf(method)}: in ${last.updates} steps, log π of chosen ${direction(chosen)} by ${formatNumber(Math.abs(chosen))}, of rejected ` +
      `${direction(rejected)} by ${formatNumber(Math.abs(rejected))} nats; the log ratio reached ${formatNumber(chosen - rejected)}.${sign}`
    );
  });
}

/** The report of a finished comparison. */
export function dynamicsReport(
  results: readonly MethodDynamics[],
  options: DynamicsOptions,
  facts: { model: string; pairs: number },
): Report {
  return {
    id: 'dynamics',
    title: 'Probability dynamics: DPO and SPO from one start',
    introduction: [
      `${facts.model} is trained twice from the same weights, on the same batches: once by DPO, once by SPO${lossNote(options.spo)}, both moving the backbone and the adapters. A probe of ${facts.pairs} pairs is looked at every ${options.every} steps.`,
    ],
    findings: findings(results),
    charts: [...probeCharts(results, options, facts.pairs), ...batchCharts(results, options)],
    tables: [table(results, options.emaDecay)],
    data: { ...facts, options: { dpo: options.dpo, spo: options.spo, emaDecay: options.emaDecay }, results },
  };
}
