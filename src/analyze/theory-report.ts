// The report of Theorem 1 and its corollaries on pairs: predictions beside measurements, bounds, and where they fail.
import { agreementChart, lineChart } from './charts.js';
import { formatNumber, type Report } from './report.js';
import type { TheoryOptions, TheoryResult } from './theory.js';

const median = (values: readonly number[]): number => {
  const sorted = values.filter((v) => !Number.isNaN(v)).sort((a, b) => a - b);
  return sorted.length > 0 ? sorted[Math.floor(sorted.length / 2)] : Number.NaN;
};

const count = (results: readonly TheoryResult[], is: (r: TheoryResult) => boolean): string =>
  `${results.filter(is).length} of ${results.length}`;

/** Median relative error of the prediction at step size k, over all sequences. */
const relativeError = (results: readonly TheoryResult[], k: number): number =>
  median(results.flatMap((r) => r.sequences.map((s) => Math.abs(s.error[k] / s.measured[k]))));

function findings(results: readonly TheoryResult[], { stepSizes }: TheoryOptions): string[] {
  const last = stepSizes.length - 1;
  const orders = results.flatMap((r) => r.sequences.flatMap((s) => s.order));
  const holds = (r: TheoryResult): boolean =>
    r.sequences[0].measured[last] >= stepSizes[last] * r.corollary1.lowerChosen * (1 - 1e-3) - 1e-12 &&
    r.sequences[1].measured[last] <= stepSizes[last] * r.corollary1.upperRejected * (1 + 1e-3) + 1e-12;
  return [
    `Theorem 1: at η = ${stepSizes[last]} the median error of the predicted Δ log π is ${formatNumber(100 * relativeError(results, last))} % of the change; the error falls with the power ${formatNumber(median(orders))} of η (2 is what a first-order theory leaves).`,
    `One step lowers log π of the chosen response in ${count(results, (r) => r.sequences[0].measured[last] < 0)} pairs, and raises that of the rejected one in ${count(results, (r) => r.sequences[1].measured[last] > 0)}.`,
    `Corollary 1 promises that the chosen response rises in ${count(results, (r) => r.corollary1.promises === 'chosen rises')} pairs (‖g_w‖ > ‖g_l‖), that the rejected one falls in the others; both bounds held at the smallest step in ${count(results, holds)}.`,
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

/** The report of analyzed pairs. */
export function theoryReport(
  results: readonly TheoryResult[],
  options: TheoryOptions,
  facts: { model: string; dtype: string },
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
      `${facts.model} in ${facts.dtype}, ${results.length} pairs, β = ${options.beta}. For each pair alone, one plain gradient step of size η on L_DPO; the model is put back by never having been changed.`,
    ],
    findings: findings(results, options),
    charts: [
      agreementChart(points, {
        id: 'theory-agreement',
        title: `Predicted and measured change of log-probability, η = ${eta}`,
        caption: 'On the dashed line they agree. Other: a response that belongs to another pair, under this prompt.',
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
    tables: [
      {
        id: 'theory-pairs',
        title: 'Pairs',
        caption: `Changes at η = ${eta}, in nats. Corollary 1: what ‖g_w‖ and ‖g_l‖ promise. Corollary 2: whether its probability form holds.`,
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
          r.corollary2.boundHolds,
          r.corollary2.differenceNegative,
        ]),
      },
    ],
    data: { ...facts, beta: options.beta, stepSizes: options.stepSizes, results },
  };
}
