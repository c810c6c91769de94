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
  /** Length of the error bar on either side of y: one standard error. */
  readonly error?: number;
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

/** Ticks of a logarithmic axis: powers of ten, and 2 and 5 times these where the values span little. */
function logTicks(values: readonly number[]): number[] {
  const [first, last] = [Math.floor(Math.log10(Math.min(...values))), Math.ceil(Math.log10(Math.max(...values)))];
  const decades = Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i));
  return last - first > 3 ? decades : decades.flatMap((decade) => [decade, 2 * decade, 5 * decade]);
}

interface Axis {
  readonly title: string;
  readonly scale: object;
  axis: { readonly tickMinStep?: number; readonly values?: number[]; readonly format?: string };
}

/** Title, scale and ticks of an axis that shows `values`. */
function axis(title: string, values: readonly number[], log: boolean | undefined): Axis {
  if (!log) {
    const tickMinStep = values.every(Number.isInteger) ? 1 : undefined;
    return { title, scale: { zero: false, nice: true }, axis: { tickMinStep } };
  }
  const format = Math.min(...values) < 1e-3 ? '.3~e' : '.3~g';
  return {
    title,
    scale: { type: 'log' as const, nice: false, padding: 10 },
    axis: { values: logTicks(values), format },
  };
}

function layers(points: readonly Point[], axes: Axes) {
  const series = named(points);
  const legend = { title: null, orient: 'bottom' as const, labelLimit: 0, columns: series.length > 4 ? 3 : undefined };
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
  const of = (key: 'x' | 'y'): number[] => points.map((p) => p[key]);
  const x = { field: 'x', type: 'quantitative' as const, ...axis(axes.x, of('x'), axes.logX) };
  // Few settings that were chosen are their own ticks.
  if (axes.logX && new Set(of('x')).size <= 6) x.axis = { ...x.axis, values: [...new Set(of('x'))] };
  const y = { field: 'y', type: 'quantitative' as const, ...axis(axes.y, of('y'), axes.logY) };
  const tooltip = [
    { field: 'series', type: 'nominal' as const, title: 'curve' },
    { field: 'x', type: 'quantitative' as const, title: axes.x },
    { field: 'y', type: 'quantitative' as const, title: axes.y, format: '.4g' },
  ];
  return [
    ...(axes.zero ? [{ mark: { type: 'rule' as const, color: '#444' }, encoding: { y: { datum: 0 } } }] : []),
    ...(points.some((p) => p.error !== undefined)
      ? [
          {
            mark: { type: 'errorbar' as const, ticks: { size: 7 } },
            transform: [{ filter: 'isValid(datum.error)' }],
            encoding: { x, y, yError: { field: 'error' }, color },
          },
        ]
      : []),
    ...(points.some((p) => p.raw)
      ? [
          {
            mark: { type: 'line' as const, strokeWidth: 1, opacity: 0.4 },
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

/** Bars of one value by category, grouped by series. A `|` breaks a category's label. */
export function barChart(
  bars: readonly { category: string; value: number; series: string }[],
  axes: Omit<Axes, 'points' | 'logX' | 'logY' | 'zero'>,
): Chart {
  const series = [...new Set(bars.map((b) => b.series))];
  const categories = [...new Set(bars.map((b) => b.category))];
  const spec = {
    data: { values: bars as unknown as object[] },
    width: 640,
    height: 260,
    mark: { type: 'bar' },
    encoding: {
      x: {
        field: 'category',
        type: 'nominal',
        title: axes.x,
        sort: categories,
        axis: { labelAngle: 0, labelExpr: "split(datum.label, '|')" },
      },
      xOffset: { field: 'series', type: 'nominal', sort: series },
      y: { field: 'value', type: 'quantitative', title: axes.y },
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

/** One of many things that change: exactly, and as predicted. */
export interface Bar {
  /** Place on the x axis, from 1. */
  readonly x: number;
  readonly y: number;
  readonly predicted: number;
  /** What the legend names, by colour. */
  readonly role: string;
  readonly panel: string;
}

/** A bar for every one of many changes with a mark where the prediction is; panels one below the other, each with its own y scale. */
export function changeChart(bars: readonly Bar[], axes: Omit<Axes, 'points' | 'logX' | 'logY' | 'zero'>): Chart {
  const roles = [...new Set(bars.map((b) => b.role))];
  const panels = [...new Set(bars.map((b) => b.panel))];
  const prediction = 'to first order';
  const color = {
    scale: { domain: [...roles, prediction], range: [...roles.map((_, i) => palette[i % palette.length]), '#000'] },
    legend: { title: null, orient: 'bottom' },
  };
  const x = { field: 'x', type: 'quantitative', title: axes.x, scale: { nice: false, padding: 4 } };
  const y = { type: 'quantitative', title: axes.y, axis: { tickCount: 4, format: '.2~g' } };
  const tooltip = [
    { field: 'role', type: 'nominal', title: 'role' },
    { field: 'x', type: 'quantitative', title: axes.x },
    { field: 'y', type: 'quantitative', title: axes.y, format: '.4g' },
    { field: 'predicted', type: 'quantitative', title: prediction, format: '.4g' },
  ];
  const spec = {
    data: { values: bars as unknown as object[] },
    facet: {
      row: {
        field: 'panel',
        type: 'nominal',
        title: null,
        sort: panels,
        header: { labelAngle: 0, labelOrient: 'top' },
      },
    },
    spec: {
      width: 620,
      height: 130,
      layer: [
        {
          mark: { type: 'bar', size: Math.max(2, Math.floor(500 / (bars.length / panels.length))) },
          encoding: { x, y: { ...y, field: 'y' }, color: { field: 'role', type: 'nominal', ...color }, tooltip },
        },
        {
          mark: { type: 'point', filled: true, size: 9, opacity: 1 },
          encoding: { x, y: { ...y, field: 'predicted' }, color: { datum: prediction, type: 'nominal', ...color } },
        },
      ],
    },
    resolve: { scale: { y: 'independent' } },
  } as unknown as TopLevelSpec;
  return { id: axes.id, title: axes.title, caption: axes.caption, spec };
}

/** Points, for a prediction beside its measurement; the diagonal is where they agree. */
export function agreementChart(
  points: readonly { x: number; y: number; series: string }[],
  axes: Omit<Axes, 'points' | 'logX' | 'logY' | 'zero'>,
): Chart {
  const series = [...new Set(points.map((p) => p.series))];
  const ends = points.flatMap((p) => [p.x, p.y]);
  const diagonal = [Math.min(...ends), Math.max(...ends)].map((v) => ({ x: v, y: v }));
  const of = (key: 'x' | 'y'): number[] => points.map((p) => p[key]);
  const x = { field: 'x', type: 'quantitative', ...axis(axes.x, of('x'), false) };
  const y = { field: 'y', type: 'quantitative', ...axis(axes.y, of('y'), false) };
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

/**
 * Exponential moving average of values one after another, corrected for its start (as Adam's moments are).
 * @param decay weight of the past after one unit of `at`, 0 to below 1
 * @param at where the values stand, rising; one apart by default
 */
export function movingAverage(values: readonly number[], decay: number, at?: readonly number[]): number[] {
  let [sum, weight] = [0, 0];
  return values.map((value, i) => {
    const kept = decay ** (at && i > 0 ? at[i] - at[i - 1] : 1);
    sum = kept * sum + (1 - kept) * value;
    weight = kept * weight + (1 - kept);
    return sum / weight;
  });
}

/** A curve twice: its values, drawn pale, and their moving average over x. */
export function rawAndSmooth(
  curve: readonly { readonly x: number; readonly y: number }[],
  decay: number,
  labels: Pick<Point, 'series' | 'panel'>,
): Point[] {
  const smooth = movingAverage(
    curve.map(({ y }) => y),
    decay,
    curve.map(({ x }) => x),
  );
  return [
    ...curve.map((point) => ({ ...point, ...labels, raw: true })),
    ...curve.map(({ x }, i) => ({ x, y: smooth[i], ...labels })),
  ];
}
