// What the demo says at the end: table, charts, and the paper's claims beside what was measured.
// Every sentence about an outcome is chosen by the numbers; none is written in advance.
import {
  type CurvePoint,
  curveOf,
  type Estimate,
  estimate,
  estimateDifference,
  finalMargins,
  type MethodResult,
  toNumbers,
} from './curves.js';
import type { DemoMethod } from './settings.js';
import { arrange, chartGap, drawChart, labelWidth, roundLimits } from './terminal-chart.js';

export type Results = Readonly<Record<DemoMethod, MethodResult>>;

const titles: Readonly<Record<DemoMethod, string>> = { dpo: 'DPO', spo: 'SPO' };
const signed = (value: number, digits = 2): string => `${value < 0 ? '-' : '+'}${Math.abs(value).toFixed(digits)}`;
const percent = (value: number): string => `${(100 * value).toFixed(1)} %`;
const share = (flags: readonly boolean[]): number => estimate(toNumbers(flags)).mean;

type Row = readonly string[];
const header: Row = ['', 'step', 'chosen', 'rejected', 'margin', 'chosen likelier', 'right answers'];
const widths = [7, 6, 10, 10, 10, 17, 15];

const tableRow = (cells: Row): string => `${cells.map((cell, i) => cell.padStart(widths[i])).join('')}\n`;

const valueRow = (name: string, point: CurvePoint, right: readonly boolean[]): Row => [
  name,
  String(point.step),
  point.chosen.toFixed(2),
  point.rejected.toFixed(2),
  point.margin.toFixed(2),
  percent(point.chosenLikelier),
  percent(share(right)),
];

const changeRow = (point: CurvePoint): Row => [
  '',
  'change',
  signed(point.chosenChange.mean),
  signed(point.rejectedChange.mean),
  signed(point.marginChange.mean),
  '',
  '',
];

/** Log-probabilities before and after, with what came of the answers. */
export function describeTable(results: Results): string {
  const rows: Row[] = [header, valueRow('start', curveOf(results.dpo)[0], results.dpo.rightBefore)];
  for (const result of [results.dpo, results.spo]) {
    const last = curveOf(result)[result.points.length - 1];
    rows.push(valueRow(titles[result.method], last, result.rightAfter), changeRow(last));
  }
  return rows.map(tableRow).join('');
}

/** The change of log-probabilities over the steps, DPO and SPO on the same axes. */
export function describeCharts(results: Results, columns: number): string {
  const curves = [results.dpo, results.spo].map((result) => ({
    title: titles[result.method],
    points: curveOf(result),
  }));
  const values = curves.flatMap(({ points }) => points.flatMap((p) => [p.chosenChange.mean, p.rejectedChange.mean]));
  const { low, high } = roundLimits(values);
  const width = Math.max(24, Math.floor((Math.min(columns, 120) - chartGap.length) / 2) - labelWidth);
  const frame = { width, height: 13, low, high };
  const charts = curves.map(({ title, points }) => {
    const series = [
      { label: 'rejected', mark: '○', points: points.map((p) => [p.step, p.rejectedChange.mean] as const) },
      { label: 'chosen', mark: '●', points: points.map((p) => [p.step, p.chosenChange.mean] as const) },
    ];
    return drawChart(title, series, { ...frame, xTitle: 'optimizer steps' });
  });
  return arrange(charts, columns);
}

export type Verdict = 'as reported' | 'not so here' | 'no clear difference here';

/** Whether a measured difference has the sign that was reported, at two standard errors. */
export function judge({ mean, error }: Estimate, reported: 1 | -1): Verdict {
  if (Math.abs(mean) <= 2 * error) return 'no clear difference here';
  return Math.sign(mean) === reported ? 'as reported' : 'not so here';
}

const spread = ({ mean, error }: Estimate, unit = '', factor = 1): string =>
  `${signed(factor * mean, unit ? 1 : 2)} ± ${(2 * factor * error).toFixed(unit ? 1 : 2)}${unit}`;

export interface Finding {
  readonly claim: string;
  readonly measured: Estimate;
  readonly verdict: Verdict;
  readonly text: string;
}

const finding = (claim: string, measured: Estimate, reported: 1 | -1, unit = '', factor = 1): Finding => ({
  claim,
  measured,
  verdict: judge(measured, reported),
  text: spread(measured, unit, factor),
});

/** The paper's claims (its figures 1 and 4, and its accuracies) beside the same quantities of this run. */
export function findings({ dpo, spo }: Results): Finding[] {
  const last = { dpo: curveOf(dpo)[dpo.points.length - 1], spo: curveOf(spo)[spo.points.length - 1] };
  const margins = estimateDifference(finalMargins(spo), finalMargins(dpo));
  const right = estimateDifference(toNumbers(spo.rightAfter), toNumbers(dpo.rightAfter));
  const dpoRight = estimateDifference(toNumbers(dpo.rightAfter), toNumbers(dpo.rightBefore));
  const spoRight = estimateDifference(toNumbers(spo.rightAfter), toNumbers(spo.rightBefore));
  return [
    finding('DPO lowers the log-probability of chosen answers', last.dpo.chosenChange, -1),
    finding('DPO lowers that of rejected answers', last.dpo.rejectedChange, -1),
    finding('SPO raises the log-probability of chosen answers', last.spo.chosenChange, 1),
    finding('SPO lowers that of rejected answers', last.spo.rejectedChange, -1),
    finding("SPO's margin ends above DPO's", margins, 1),
    finding('DPO loses right answers against the start', dpoRight, -1, ' points', 100),
    finding('SPO gains right answers against the start', spoRight, 1, ' points', 100),
    finding('SPO answers more problems right than DPO', right, 1, ' points', 100),
  ];
}

/** One line a claim: what was measured, and whether it is what was reported. */
export function describeFindings(list: readonly Finding[]): string {
  const width = Math.max(...list.map(({ claim }) => claim.length));
  const textWidth = Math.max(...list.map(({ text }) => text.length));
  return list
    .map(({ claim, text, verdict }) => `  ${claim.padEnd(width)}  ${text.padStart(textWidth)}  ${verdict}\n`)
    .join('');
}

const among = (list: readonly Finding[], verdict: Verdict): number => list.filter((f) => f.verdict === verdict).length;

/** One sentence over all findings. */
export function conclude(list: readonly Finding[]): string {
  const [same, other, unclear] = (['as reported', 'not so here', 'no clear difference here'] as const).map((verdict) =>
    among(list, verdict),
  );
  const parts = [`${same} of ${list.length} came out as reported`];
  if (other > 0) parts.push(`${other} the other way`);
  if (unclear > 0) parts.push(`${unclear} within the noise`);
  return `${parts.join(', ')}. One small model, one seed: --seed N trains it another time.\n`;
}
