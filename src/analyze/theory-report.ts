// The report of Theorem 1 and its corollaries on pairs: predictions beside measurements, bounds, and where they fail.
import { agreementChart, lineChart } from './charts.js';
import { formatNumber, type Report, type Table } from './report.js';
import type { SequenceChange, TheoryOptions, TheoryResult } from './theory.js';

const median = (values: readonly number[]): number => {
  const sorted = values.filter((v) => !Number.isNaN(v)).sort((a, b) => a - b);
  return sorted.length > 0 ? sorted[Math.floor(sorted.length / 2)] : Number.NaN;
};

const count = (results: readonly TheoryResult[], is: (r: TheoryResult) => boolean): string =>
  `${results.filter(is).length} of ${results.length}`;

/** Median relative error of the prediction at step size k, over all sequences. */
const relativeError = (results: readonly TheoryResult[], k: number): number =>
  median(results.flatMap((r) => r.sequences.map((s) => Math.abs(s.error[k] / s.measured[k]))));

/** Whether both bounds of Corollary 1 held at step size k. */
const heldAt = ({ corollary1 }: TheoryResult, k: number): boolean =>
  corollary1.heldChosen[k] && corollary1.heldRejected[k];

function findings(results: readonly TheoryResult[], { stepSizes }: TheoryOptions): string[] {
  const last = stepSizes.length - 1;
  const orders = results.flatMap((r) => r.sequences.flatMap((s) => s.order));
  return [
    `Theorem 1: at η = ${stepSizes[last]} the median error of the predicted Δ log π is ${formatNumber(100 * relativeError(results, last))} % of the change; the error falls with the power ${formatNumber(median(orders))} of η (2 is what a first-order theory leaves).`,
    `One step lowers log π of the chosen response in ${count(results, (r) => r.sequences[0].measured[last] < 0)} pairs, and raises that of the rejected one in ${count(results, (r) => r.sequences[1].measured[last] > 0)}.`,
    `Corollary 1 promises that the chosen response rises in ${count(results, (r) => r.corollary1.promises === 'chosen rises')} pairs (‖g_w‖ > ‖g_l‖), that the rejected one falls in the others; both bounds held at the smallest step in ${count(results, (r) => heldAt(r, last))}.`,
    `Corollary 2, log form: Δ log π(chosen) − Δ log π(rejected) was positive in ${count(results, (r) => r.sequences[0].measured[last] > r.sequences[1].measured[last])} pairs.`,
    `Corollary 2, probability form: its bound fails in ${count(results, (r) => !r.corollary2.boundHolds)} pairs, and the difference itself is negative in ${count(results, (r) => r.corollary2.differenceNegative)}.`,
  ];
}

const magnitudes = (results: readonly TheoryResult[], stepSizes: readonly number[]) =>
  stepSizes.map((eta, k) => ({
    x: eta,
    y: median(results.flatMap((r) => r.sequences.map((s) => Math.abs(s.error[k])))),
    series: 'median |error|',
  }));

function pairsTable(results: readonly TheoryResult[], { stepSizes }: TheoryOptions): Table {
  const last = stepSizes.length - 1;
  const eta = stepSizes[last];
  return {
    id: 'theory-pairs',
    title: 'Pairs',
    caption: `Changes at η = ${eta}, in nats. Corollary 1: what ‖g_w‖ and ‖g_l‖ promise, and whether both bounds held. Corollary 2: whether its probability form holds.`,
    columns: [
      'pair',
      's',
      '|g_w|',
      '|g_l|',
      'inner',
      'cosine',
      'term chosen',
      'term rejected',
      'Δ chosen',
      'predicted Δ chosen',
      'Δ rejected',
      'predicted Δ rejected',
      'corollary 1',
      'corollary 1 held',
      'corollary 2 holds',
      'difference negative',
    ],
    rows: results.map((r, i) => [
      i,
      r.s,
      r.normChosen,
      r.normRejected,
      r.inner,
      r.cosine,
      r.termChosen,
      r.termRejected,
      r.sequences[0].measured[last],
      eta * r.sequences[0].predictedPerStepSize,
      r.sequences[1].measured[last],
      eta * r.sequences[1].predictedPerStepSize,
      r.corollary1.promises,
      heldAt(r, last),
      r.corollary2.boundHolds,
      r.corollary2.differenceNegative,
    ]),
  };
}

/** Corollary 1 of one sequence of a pair: its bound on Δ log π / η, and whether that held. None for other responses. */
function boundOf({ corollary1: bounds }: TheoryResult, { kind }: SequenceChange) {
  if (kind === 'chosen') return { bound: bounds.lowerChosen, held: bounds.heldChosen };
  if (kind === 'rejected') return { bound: bounds.upperRejected, held: bounds.heldRejected };
  return undefined;
}

/** A row for every sequence and step size. */
function sequencesTable(results: readonly TheoryResult[], { stepSizes }: TheoryOptions): Table {
  const rows = results.flatMap((result, pair) =>
    result.sequences.flatMap((sequence, index) => {
      const { kind, logProb, predictedPerStepSize, measured, error, order } = sequence;
      const limit = boundOf(result, sequence);
      return stepSizes.map((eta, k) => [
        pair,
        kind === 'other' ? `other ${index - 1}` : kind,
        logProb,
        eta,
        eta * predictedPerStepSize,
        measured[k],
        error[k],
        k > 0 ? order[k - 1] : Number.NaN,
        limit ? eta * limit.bound : Number.NaN,
        limit ? limit.held[k] : '',
      ]);
    }),
  );
  return {
    id: 'theory-sequences',
    title: 'Sequences',
    caption:
      'Every response of every pair at every η, in nats. Order: the power of η by which the error fell from the step size before (2 is what a first-order theory leaves). Bound: what Corollary 1 has Δ be at least (chosen) or at most (rejected), and whether the measured one kept to it.',
    columns: [
      'pair',
      'sequence',
      'log π',
      'η',
      'predicted Δ',
      'measured Δ',
      'error',
      'order',
      'corollary 1 bound',
      'bound held',
    ],
    rows,
    shown: 30,
  };
}

/** The report of analyzed pairs; `facts.others` says where the other responses come from. */
export function theoryReport(
  results: readonly TheoryResult[],
  options: TheoryOptions,
  facts: { model: string; dtype: string; others?: string },
): Report {
  const last = options.stepSizes.length - 1;
  const eta = options.stepSizes[last];
  const points = results.flatMap((r) =>
    r.sequences.map((s) => ({ x: eta * s.predictedPerStepSize, y: s.measured[last], series: s.kind })),
  );
  return {
    id: 'theory',
    title: 'One step of DPO: Theorem 1 and its corollaries, predicted and measured',
    introduction: [
      `${facts.model} in ${facts.dtype}, ${results.length} pairs, β = ${options.beta}. For each pair alone, one plain gradient step of size η on L_DPO; the model is put back by never having been changed.${facts.others ? ` Other responses: ${facts.others}.` : ''}`,
    ],
    findings: findings(results, options),
    charts: [
      agreementChart(points, {
        id: 'theory-agreement',
        title: `Predicted and measured change of log-probability, η = ${eta}`,
        caption: 'On the dashed line they agree. Other: a response beside the pair’s two, under its prompt.',
        x: 'predicted Δ log π (nats)',
        y: 'measured Δ log π (nats)',
      }),
      lineChart(magnitudes(results, options.stepSizes), {
        id: 'theory-error',
        title: 'Error of the first-order prediction over the step size',
        caption: 'Median over all sequences. A slope of 2 is what a first-order theory leaves.',
        x: 'η (step size)',
        y: '|measured − predicted| (nats)',
        logX: true,
        logY: true,
        points: true,
      }),
    ],
    tables: [pairsTable(results, options), sequencesTable(results, options)],
    data: { ...facts, beta: options.beta, stepSizes: options.stepSizes, results },
  };
}
