// The report of the terms of SPO's gradient: each term's norm and share over α, K, λ and γ, one varied at a time, and all settings
// in a table.
import { type Chart, lineChart, type Point } from './charts.js';
import { formatNumber, type Report } from './report.js';
import { lossNote } from './runs.js';
import { type GroupShares, type TermNorms, type TermShares, type TermsOptions, termShares } from './terms.js';

const percent = (value: number): string => `${formatNumber(100 * value)} %`;

function findings(terms: TermNorms, dtype: string): string[] {
  const { backbone, adapters } = terms;
  const smallest = adapters.reduce((x, y) => (y.penalty < x.penalty ? y : x));
  const lost = adapters.filter((one) => one.belowRounding);
  const out = [
    `At λ = 1, α = ${smallest.lowerLearningRate}, K = ${smallest.lowerSteps}, term (b) is ${percent(smallest.penalty / smallest.preference)} of term (a): ‖b‖ = ${formatNumber(smallest.penalty)}, ‖a‖ = ${formatNumber(smallest.preference)}.`,
    `On the backbone, term (d) at λ = 1 is ${formatNumber(backbone.penalty / backbone.preference)} times term (c).`,
    backbone.regularizer + smallest.regularizer > 0
      ? `At γ = 1 the regularizer adds ${formatNumber(backbone.regularizer / backbone.preference)} times term (c) on the backbone and ${formatNumber(smallest.regularizer / smallest.preference)} times term (a) on the adapters.`
      : 'No pair of this batch is active: the regularizer adds nothing.',
  ];
  if (lost.length > 0) {
    const where = lost.map((one) => `α = ${one.lowerLearningRate}, K = ${one.lowerSteps}`).join('; ');
    out.push(
      terms.firstOrder
        ? `Term (b) is below the rounding of ${dtype} at ${where}: only its first-order form, which was taken here, can tell it from noise.`
        : `Term (b) is below the rounding of ${dtype} at ${where}: there it is noise, and the lower level does nothing that could be told from it.`,
    );
  }
  return out;
}

type Varied = 'lowerLearningRate' | 'lowerSteps' | 'lambda' | 'gamma';

const varied: readonly { key: Varied; id: string; symbol: string; axis: string; logX?: boolean }[] = [
  { key: 'lowerLearningRate', id: 'alpha', symbol: 'α', axis: 'α (learning rate of the lower level)', logX: true },
  { key: 'lowerSteps', id: 'K', symbol: 'K', axis: 'K (steps of the lower level)' },
  { key: 'lambda', id: 'lambda', symbol: 'λ', axis: 'λ (weight of the penalty)' },
  { key: 'gamma', id: 'gamma', symbol: 'γ', axis: 'γ (weight of the regularizer)' },
];

const panels: readonly { of: 'adapters' | 'backbone'; panel: string; names: readonly [string, string, string] }[] = [
  { of: 'adapters', panel: 'adapters φ', names: ['(a) preference loss', '(b) penalty', '(e) regularizer'] },
  { of: 'backbone', panel: 'backbone θ', names: ['(c) preference loss', '(d) penalty', '(e) regularizer'] },
];

/** What the others are held at while one is varied: the first value that is not 0, where there is one. */
const heldAt = (rows: readonly TermShares[]): Readonly<Record<Varied, number>> => {
  const first = (key: Varied): number => rows.find((row) => row[key] !== 0)?.[key] ?? 0;
  return {
    lowerLearningRate: first('lowerLearningRate'),
    lowerSteps: first('lowerSteps'),
    lambda: first('lambda'),
    gamma: first('gamma'),
  };
};

/** Curves of all terms over one setting; a logarithmic axis has no place for a 0. */
const curves = (rows: readonly TermShares[], key: Varied, value: keyof GroupShares): Point[] =>
  panels.flatMap(({ of, panel, names }) =>
    names.flatMap((series, term) =>
      rows.map((row) => ({ x: row[key], y: row[of][value][term], series, panel })).filter(({ y }) => y > 0),
    ),
  );

function charts(rows: readonly TermShares[]): Chart[] {
  const held = heldAt(rows);
  return varied.flatMap(({ key, id, symbol, axis, logX }) => {
    const others = varied.filter((one) => one.key !== key);
    const some = rows.filter((row) => others.every((one) => row[one.key] === held[one.key]));
    if (some.length < 2) return [];
    const at = others.map((one) => `${one.symbol} = ${held[one.key]}`).join(', ');
    const common = { x: axis, logX, logY: true, points: true };
    const zeros = 'A term that is 0 is not drawn.';
    return [
      lineChart(curves(some, key, 'norms'), {
        ...common,
        id: `terms-norms-${id}`,
        title: `Norm of each term of SPO’s gradient over ${symbol}`,
        caption: `At ${at}. ${zeros}`,
        y: 'norm of the term',
      }),
      lineChart(curves(some, key, 'shares'), {
        ...common,
        id: `terms-shares-${id}`,
        title: `Share of each term of SPO’s gradient over ${symbol}`,
        caption: `At ${at}. A term’s norm by the norm of its group’s whole gradient; terms that point against each other exceed 1. ${zeros}`,
        y: 'share of the group’s gradient norm',
      }),
    ];
  });
}

/** The report of a finished measurement. */
export function termsReport(
  terms: TermNorms,
  options: TermsOptions,
  facts: { model: string; pairs: number; dtype: string },
): Report {
  const rows = termShares(terms, options.lambdas, options.gammas);
  return {
    id: 'terms',
    title: 'What the terms of SPO’s gradient weigh',
    introduction: [
      `${facts.model}, ${facts.pairs} pairs as one batch, computed in ${facts.dtype}${lossNote(options.spo)}. On the adapters φ: (a) the preference loss, (b) the penalty: λ times the difference of two SFT gradients, (e) γ∇R. On the backbone θ: (c) the preference loss, (d) the penalty: λ times the SFT gradient, (e) γ∇R.`,
    ],
    findings: findings(terms, facts.dtype),
    charts: charts(rows),
    tables: [
      {
        id: 'terms',
        title: 'Norms and shares',
        caption:
          'Norms of the terms with their weights. A share is a term’s norm by the norm of the whole gradient of its group of variables, as in the trainer’s metrics.',
        columns: [
          'alpha',
          'K',
          'lambda',
          'gamma',
          ...['a', 'b', 'e_phi', 'c', 'd', 'e'].flatMap((term) => [`|${term}|`, `share ${term}`]),
        ],
        rows: rows.map(({ lowerLearningRate, lowerSteps, lambda, gamma, adapters, backbone }) => [
          lowerLearningRate,
          lowerSteps,
          lambda,
          gamma,
          ...[adapters, backbone].flatMap(({ norms, shares }) => norms.flatMap((n, i) => [n, shares[i]])),
        ]),
      },
    ],
    data: { ...facts, options: options.spo, terms, rows },
  };
}
