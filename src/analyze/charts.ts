// Charts of analyses as Vega-Lite specifications: what is plotted, with titles and units. How they are drawn is report.ts's.
import type { TopLevelSpec } from 'vega-lite';

export interface Chart {
  /** File name without ending. */
  readonly id: string;
  readonly title: string;
  /** One or two sentences under the chart. */
  readonly caption: string;
  readonly spec: TopLevelSpec;
}

/** One value of a curve. */
export interface Point {
  readonly x: number;
  readonly y: number;
  /** The curve it belongs to, as the legend names it. */
  readonly series: string;
  /** Charts side by side on the same axes, one a panel. */
  readonly panel?: string;
  /** Ends of a band around y. */
  readonly low?: number;
  readonly high?: number;
  /** Drawn thin and pale behind the others: unsmoothed values. */
  readonly raw?: boolean;
}

/** Distinct in print and for colour-blind readers: blue and orange first (Okabe and Ito's order, darkened for white paper). */
const palette = ['#1f6fb4', '#d1601f', '#2b8a57', '#8a4f9e', '#8c6d1f', '#4d4d4d'];
const dashes = [[], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3]];

export interface Axes {
  readonly id: string;
  readonly title: string;
  readonly caption: string;
  readonly x: string;
  readonly y: string;
  readonly logX?: boolean;
  readonly logY?: boolean;
  /** A rule at y = 0. */
  readonly zero?: boolean;
  /** Marks at the points, for few of them. */
  readonly points?: boolean;
}

const named = (points: readonly Point[]): string[] => [...new Set(points.map((p) => p.series))];

function axis(title: string, log: boolean | undefined) {
  return { title, scale: log ? { type: 'log' as const } : { zero: false, nice: true } };
}

function layers(points: readonly Point[], axes: Axes) {
  const series = named(points);
  const legend = { title: null, orient: 'bottom' as const };
  const color = {
    field: 'series',
    type: 'nominal' as const,
    scale: { domain: series, range: series.map((_, i) => palette[i % palette.length]) },
    legend: { ...legend, symbolType: 'stroke' as const },
  };
  const dash = {
    field: 'series',
    type: 'nominal' as const,
    scale: { domain: series, range: series.map((_, i) => dashes[i % dashes.length]) },
    legend,
  };
  const x = { field: 'x', type: 'quantitative' as const, ...axis(axes.x, axes.logX) };
  const y = { field: 'y', type: 'quantitative' as const, ...axis(axes.y, axes.logY) };
  const tooltip = [
    { field: 'series', type: 'nominal' as const, title: 'curve' },
    { field: 'x', type: 'quantitative' as const, title: axes.x },
    { field: 'y', type: 'quantitative' as const, title: axes.y, format: '.4g' },
  ];
  return [
    ...(axes.zero ? [{ mark: { type: 'rule' as const, color: '#444' }, encoding: { y: { datum: 0 } } }] : []),
    ...(points.some((p) => p.low !== undefined)
      ? [
          {
            mark: { type: 'area' as const, opacity: 0.15 },
            transform: [{ filter: 'isValid(datum.low)' }],
            encoding: { x, y: { ...y, field: 'low' }, y2: { field: 'high' }, color },
          },
        ]
      : []),
    ...(points.some((p) => p.raw)
      ? [
          {
            mark: { type: 'line' as const, strokeWidth: 1, opacity: 0.3 },
            transform: [{ filter: 'datum.raw === true' }],
            encoding: { x, y, color },
          },
        ]
      : []),
    {
      mark: { type: 'line' as const, strokeWidth: 2, point: axes.points ? { size: 36, filled: true } : false },
      transform: [{ filter: 'datum.raw !== true' }],
      encoding: { x, y, color, strokeDash: dash, tooltip },
    },
  ];
}

/** Lines over a quantitative axis, in panels where the points name them. */
export function lineChart(points: readonly Point[], axes: Axes): Chart {
  const panels = [...new Set(points.map((p) => p.panel).filter((p) => p !== undefined))];
  const layer = layers(points, axes);
  const data = { values: points as unknown as object[] };
  const spec = (panels.length > 0
    ? {
        data,
        facet: {
          column: { field: 'panel', type: 'nominal', title: null, sort: panels, header: { labelFontSize: 13 } },
        },
        spec: { width: panels.length > 2 ? 230 : 320, height: 240, layer },
      }
    : { data, width: 560, height: 280, layer }) as unknown as TopLevelSpec;
  return { id: axes.id, title: axes.title, caption: axes.caption, spec };
}

/** Bars of one value by category, grouped by series. */
export function barChart(
  bars: readonly { category: string; value: number; series: string }[],
  axes: Omit<Axes, 'points' | 'logX'>,
): Chart {
  const series = [...new Set(bars.map((b) => b.series))];
  const categories = [...new Set(bars.map((b) => b.category))];
  const spec = {
    data: { values: bars as unknown as object[] },
    width: 560,
    height: 260,
    mark: { type: 'bar' },
    encoding: {
      x: { field: 'category', type: 'nominal', title: axes.x, sort: categories, axis: { labelAngle: 0 } },
      xOffset: { field: 'series', type: 'nominal', sort: series },
      y: { field: 'value', type: 'quantitative', title: axes.y, ...(axes.logY ? { scale: { type: 'log' } } : {}) },
      color: {
        field: 'series',
        type: 'nominal',
        scale: { domain: series, range: series.map((_, i) => palette[i % palette.length]) },
        legend: { title: null, orient: 'bottom' },
      },
      tooltip: [
        { field: 'series', type: 'nominal', title: 'series' },
        { field: 'category', type: 'nominal', title: axes.x },
        { field: 'value', type: 'quantitative', title: axes.y, format: '.4g' },
      ],
    },
  } as unknown as TopLevelSpec;
  return { id: axes.id, title: axes.title, caption: axes.caption, spec };
}

/** Points, for a prediction beside its measurement; the diagonal is where they agree. */
export function agreementChart(points: readonly { x: number; y: number; series: string }[], axes: Axes): Chart {
  const series = [...new Set(points.map((p) => p.series))];
  const ends = points.flatMap((p) => [p.x, p.y]);
  const diagonal = [Math.min(...ends), Math.max(...ends)].map((v) => ({ x: v, y: v }));
  const x = { field: 'x', type: 'quantitative', ...axis(axes.x, axes.logX) };
  const y = { field: 'y', type: 'quantitative', ...axis(axes.y, axes.logY) };
  const spec = {
    width: 420,
    height: 340,
    layer: [
      {
        data: { values: diagonal },
        mark: { type: 'line', color: '#888', strokeWidth: 1, strokeDash: [4, 3] },
        encoding: { x, y },
      },
      {
        data: { values: points as unknown as object[] },
        mark: { type: 'point', filled: true, size: 45, opacity: 0.8 },
        encoding: {
          x,
          y,
          color: {
            field: 'series',
            type: 'nominal',
            scale: { domain: series, range: series.map((_, i) => palette[i % palette.length]) },
            legend: { title: null, orient: 'bottom' },
          },
          shape: {
            field: 'series',
            type: 'nominal',
            scale: { domain: series },
            legend: { title: null, orient: 'bottom' },
          },
        },
      },
    ],
  } as unknown as TopLevelSpec;
  return { id: axes.id, title: axes.title, caption: axes.caption, spec };
}

/** Exponential moving average of values one after another, corrected for its start (as Adam's moments are). */
export function movingAverage(values: readonly number[], decay: number): number[] {
  let [sum, weight] = [0, 0];
  return values.map((value) => {
    sum = decay * sum + (1 - decay) * value;
    weight = decay * weight + (1 - decay);
    return sum / weight;
  });
}
