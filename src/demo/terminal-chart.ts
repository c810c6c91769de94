// A line chart in characters: a few series over one axis of steps. Knows nothing of what the numbers mean.

export interface Series {
  readonly label: string;
  readonly mark: string;
  readonly points: readonly (readonly [x: number, y: number])[];
}

export interface ChartFrame {
  /** Columns and rows of the plot itself, axes come on top. */
  readonly width: number;
  readonly height: number;
  readonly low: number;
  readonly high: number;
  readonly xTitle: string;
}

/** The value of a series at x, on straight lines between its points. */
function valueAt(points: Series['points'], x: number): number {
  const after = points.findIndex(([at]) => at >= x);
  if (after < 0) return points[points.length - 1][1];
  if (after === 0) return points[0][1];
  const [[x0, y0], [x1, y1]] = [points[after - 1], points[after]];
  return y0 + ((y1 - y0) * (x - x0)) / (x1 - x0);
}

/** Round limits around values: steps of 1, 2 or 5 times a power of ten. */
export function roundLimits(values: readonly number[], ticks = 5): { low: number; high: number; step: number } {
  const [least, most] = [Math.min(0, ...values), Math.max(0, ...values)];
  const raw = (most - least || 1) / ticks;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5].find((n) => n * power >= raw) ?? 10);
  return { low: Math.floor(least / step) * step, high: Math.max(Math.ceil(most / step) * step, 0), step };
}

/** Columns left of a plot: its numbers and its axis. */
export const labelWidth = 9;

/** Between charts that stand side by side. */
export const chartGap = '   ';

/** Lines of a chart, all of the same length. Later series lie above earlier ones. */
export function drawChart(title: string, series: readonly Series[], frame: ChartFrame): string[] {
  const { width, height, low, high } = frame;
  const grid = Array.from({ length: height }, () => Array.from({ length: width }, () => ' '));
  const rowOf = (y: number): number => Math.round(((high - y) / (high - low || 1)) * (height - 1));
  if (low <= 0 && high >= 0) grid[rowOf(0)].fill('·');
  const end = Math.max(...series.flatMap(({ points }) => points.map(([x]) => x)));
  for (const { mark, points } of series)
    for (let column = 0; column < width; column++)
      grid[rowOf(valueAt(points, (end * column) / Math.max(1, width - 1)))][column] = mark;
  const labels = new Map([low, 0, high].map((y) => [rowOf(y), String(Number(y.toPrecision(3)))]));
  const lines = grid.map((cells, row) => `${(labels.get(row) ?? '').padStart(labelWidth - 2)} ┤${cells.join('')}`);
  const legend = series.map(({ mark, label }) => `${mark} ${label}`).join('   ');
  const axis = `${' '.repeat(labelWidth - 1)}└${'─'.repeat(width)}`;
  const last = `${end}`;
  const xLabels = `${' '.repeat(labelWidth)}0${frame.xTitle.padStart((width + frame.xTitle.length) / 2 - 1)}`;
  const bottom = `${xLabels.padEnd(labelWidth + width - last.length)}${last}`;
  const all = [`${' '.repeat(labelWidth)}${title}`, `${' '.repeat(labelWidth)}${legend}`, ...lines, axis, bottom];
  return all.map((line) => line.padEnd(labelWidth + width));
}

/** Charts side by side where they fit, one below the other where they do not. */
export function arrange(charts: readonly (readonly string[])[], columns: number): string {
  const width = charts.reduce((sum, chart) => sum + chart[0].length, chartGap.length * (charts.length - 1));
  const rows =
    width <= columns
      ? charts[0].map((_, row) => charts.map((chart) => chart[row]).join(chartGap))
      : charts.flatMap((chart, i) => (i > 0 ? ['', ...chart] : chart));
  return rows.map((row) => `${row.trimEnd()}\n`).join('');
}
