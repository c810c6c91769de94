// What becomes of the log-probabilities of chosen and rejected responses while training, DPO and SPO from one start
// (figures 1 and 4 of arXiv 2507.07723): on a fixed probe, and batch by batch as the trainer sees them.
import type { PreferenceExample, PreparedData } from '../data/tokenize.js';
import type { CausalLM } from '../models/causal-lm.js';
import { scorePairs } from '../train/batch-source.js';
import type { GivenOptions } from '../train/options.js';
import { type Chart, lineChart, movingAverage, type Point } from './charts.js';
import { formatNumber, type Report, type Table } from './report.js';
import { type ModelSource, type PreferenceMethod, watch } from './runs.js';
import { SequenceGradient, variableGroups } from './sequences.js';

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
  const groups = variableGroups(model);
  const rows: number[][] = [];
  for (const { promptIds, chosenIds, rejectedIds } of pairs) {
    using chosen = SequenceGradient.of(model, { promptIds, responseIds: chosenIds }, groups);
    using rejected = SequenceGradient.of(model, { promptIds, responseIds: rejectedIds }, groups);
    const [w, l] = [await chosen.squaredNorm(), await rejected.squaredNorm()];
    const inner = await chosen.dot(rejected);
    rows.push([w - inner, inner - l, Math.sqrt(w), Math.sqrt(l), inner / Math.sqrt(w * l)]);
  }
  const [termChosen, termRejected, normChosen, normRejected, cosine] = [0, 1, 2, 3, 4].map((k) =>
    mean(rows.map((row) => row[k])),
  );
  return { termChosen, termRejected, normChosen, normRejected, cosine };
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

/** Curves of a probe quantity, one panel a method. */
const probePoints = (
  results: readonly MethodDynamics[],
  series: Readonly<Record<string, (look: ProbeLook, start: ProbeLook) => number>>,
): Point[] =>
  results.flatMap(({ method, probe }) =>
    probe.flatMap((look) =>
      Object.entries(series).map(([name, value]) => ({
        x: look.updates,
        y: value(look, probe[0]),
        series: name,
        panel: nameOf(method),
      })),
    ),
  );

/** Raw values pale, their moving average in front. */
function batchPoints(results: readonly MethodDynamics[], decay: number): Point[] {
  return results.flatMap(({ method, batches }) =>
    (['chosen', 'rejected'] as const).flatMap((series) => {
      const values = batches.map((b) => b[series]);
      const smooth = movingAverage(values, decay);
      const point = (y: number, i: number): Point => ({ x: batches[i].step, y, series, panel: nameOf(method) });
      return [...values.map((y, i) => ({ ...point(y, i), raw: true })), ...smooth.map(point)];
    }),
  );
}

const steps = 'optimizer steps';

function charts(results: readonly MethodDynamics[], options: DynamicsOptions, pairs: number): Chart[] {
  const band = `Means over the ${pairs} pairs of the probe, which no step trains on where the data allow it.`;
  return [
    lineChart(
      probePoints(results, {
        chosen: (look, start) => look.chosen - start.chosen,
        rejected: (look, start) => look.rejected - start.rejected,
      }),
      {
        id: 'dynamics-logps',
        title: 'Log-probability of chosen and rejected responses while training',
        caption: `Change against the start, summed over a response's tokens (figure 1a). ${band}`,
        x: steps,
        y: 'change of log π (nats)',
        zero: true,
      },
    ),
    lineChart(
      probePoints(results, {
        'chosen: ‖g_w‖² − ⟨g_w, g_l⟩': (look) => look.termChosen,
        'rejected: ⟨g_w, g_l⟩ − ‖g_l‖²': (look) => look.termRejected,
      }),
      {
        id: 'dynamics-gradient-terms',
        title: 'Gradient terms of Theorem 1',
        caption: `What a step of DPO does to the two log-probabilities, per η β (1 − σ(s)) (figure 1b). Means over ${options.gradientPairs} pairs.`,
        x: steps,
        y: 'gradient term (nats²)',
        zero: true,
      },
    ),
    lineChart(
      results.flatMap(({ method, probe }) =>
        probe.map((look) => ({
          x: look.updates,
          y: look.chosen - probe[0].chosen - (look.rejected - probe[0].rejected),
          series: nameOf(method),
        })),
      ),
      {
        id: 'dynamics-log-ratio',
        title: 'Log ratio: how much more the chosen response gained than the rejected one',
        caption: `Δ log π(chosen) − Δ log π(rejected) (figure 1c). ${band}`,
        x: steps,
        y: 'log ratio (nats)',
        zero: true,
      },
    ),
    lineChart(batchPoints(results, options.emaDecay), {
      id: 'dynamics-batches',
      title: 'Log-probabilities of the training batches',
      caption: `As the trainer saw them, before each update (figure 4). Pale: each batch; strong: exponential moving average, decay ${options.emaDecay}.`,
      x: steps,
      y: 'log π, mean over the batch (nats)',
    }),
  ];
}

function table(results: readonly MethodDynamics[]): Table {
  const columns = [
    'method',
    'updates',
    'logps chosen',
    'logps rejected',
    'log ratio',
    'chosen likelier',
    'term chosen',
    'term rejected',
    'norm g_w',
    'norm g_l',
    'cosine',
  ];
  const rows = results.flatMap(({ method, probe }) =>
    probe.map((look) => [
      nameOf(method),
      look.updates,
      look.chosen,
      look.rejected,
      look.chosen - probe[0].chosen - (look.rejected - probe[0].rejected),
      look.chosenLikelier,
      look.termChosen,
      look.termRejected,
      look.normChosen,
      look.normRejected,
      look.cosine,
    ]),
  );
  return { id: 'dynamics', title: 'The probe', caption: 'Means over the pairs of the probe.', columns, rows };
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
      `${facts.model} is trained twice from the same weights, on the same batches: once by DPO, once by SPO, both moving the backbone and the adapters. A probe of ${facts.pairs} pairs is looked at every ${options.every} steps.`,
    ],
    findings: findings(results),
    charts: charts(results, options, facts.pairs),
    tables: [table(results)],
    data: { ...facts, options: { dpo: options.dpo, spo: options.spo, emaDecay: options.emaDecay }, results },
  };
}
