// The demo's chart as one self-contained SVG: a panel for each method, the same axes, lines with their spread, labels at their ends.
import type { CurvePoint, Estimate } from './curves.js';
import { roundLimits } from './terminal-chart.js';

export interface Panel {
  readonly title: string;
  readonly curve: readonly CurvePoint[];
}

export interface ChartText {
  readonly title: string;
  readonly subtitle: string;
}

interface Line {
  readonly name: string;
  readonly color: string;
  readonly dash: string;
  readonly of: (p: CurvePoint) => Estimate;
}

const lines: readonly Line[] = [
  { name: 'chosen', color: '#1f6fb4', dash: '', of: (p) => p.chosenChange },
  { name: 'rejected', color: '#d1601f', dash: '6 4', of: (p) => p.rejectedChange },
];

const size = { panel: 330, height: 260, left: 70, top: 84, gap: 96, right: 90, bottom: 56 };

const escaped = (text: string): string => text.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');
const fixed = (value: number): string => String(Math.round(value * 100) / 100);

interface Scale {
  x(step: number): number;
  y(change: number): number;
}

const text = (x: number, y: number, content: string, rest = ''): string =>
  `<text x="${fixed(x)}" y="${fixed(y)}" ${rest}>${escaped(content)}</text>`;

function gridLines(scale: Scale, steps: number, limits: { low: number; high: number; step: number }): string[] {
  const { low, high, step } = limits;
  const out: string[] = [];
  for (let i = Math.round(low / step); i <= Math.round(high / step); i++) {
    const y = scale.y(i * step);
    const color = i === 0 ? '#444' : '#ddd';
    out.push(
      `<line x1="${fixed(scale.x(0))}" x2="${fixed(scale.x(steps))}" y1="${fixed(y)}" y2="${fixed(y)}" stroke="${color}"/>`,
    );
    out.push(text(scale.x(0) - 8, y + 4, String(Number((i * step).toPrecision(6))), 'text-anchor="end"'));
  }
  const marks = roundLimits([steps], 5);
  for (let x = 0; x <= steps; x += Math.max(1, marks.step)) {
    const at = scale.x(x);
    const y = scale.y(low);
    out.push(`<line x1="${fixed(at)}" x2="${fixed(at)}" y1="${fixed(y)}" y2="${fixed(y + 5)}" stroke="#444"/>`);
    out.push(text(at, y + 19, String(x), 'text-anchor="middle"'));
  }
  return out;
}

/** The line and, behind it, two standard errors to either side. */
function drawLine(line: Line, curve: readonly CurvePoint[], scale: Scale): string[] {
  const at = (p: CurvePoint, errors: number): string => {
    const { mean, error } = line.of(p);
    return `${fixed(scale.x(p.step))},${fixed(scale.y(mean + errors * error))}`;
  };
  const band = [...curve.map((p) => at(p, 2)), ...[...curve].reverse().map((p) => at(p, -2))].join(' ');
  const path = curve.map((p) => at(p, 0)).join(' ');
  const dash = line.dash && ` stroke-dasharray="${line.dash}"`;
  return [
    `<polygon points="${band}" fill="${line.color}" fill-opacity="0.15"/>`,
    `<polyline points="${path}" fill="none" stroke="${line.color}" stroke-width="2.2"${dash}/>`,
  ];
}

/** Names at the ends of the lines, moved apart where they would overlap. */
function endLabels(curve: readonly CurvePoint[], scale: Scale): string[] {
  const last = curve[curve.length - 1];
  const placed = lines.map((line) => ({ line, y: scale.y(line.of(last).mean) })).sort((a, b) => a.y - b.y);
  for (let i = 1; i < placed.length; i++) placed[i].y = Math.max(placed[i].y, placed[i - 1].y + 15);
  return placed.map(({ line, y }) =>
    text(scale.x(last.step) + 7, y + 4, line.name, `fill="${line.color}" font-weight="bold"`),
  );
}

/** A chart of the change of log-probabilities over the steps, one panel a run, all on the same axes. */
export function drawSvg(panels: readonly Panel[], { title, subtitle }: ChartText): string {
  const values = panels.flatMap(({ curve }) =>
    curve.flatMap((p) => lines.flatMap(({ of }) => [of(p).mean - 2 * of(p).error, of(p).mean + 2 * of(p).error])),
  );
  const limits = roundLimits(values, 6);
  const steps = Math.max(...panels.flatMap(({ curve }) => curve.map((p) => p.step)));
  const width = size.left + panels.length * size.panel + (panels.length - 1) * size.gap + size.right;
  const height = size.top + size.height + size.bottom;
  const body = panels.flatMap(({ title: name, curve }, i) => {
    const left = size.left + i * (size.panel + size.gap);
    const scale: Scale = {
      x: (step) => left + (step / Math.max(1, steps)) * size.panel,
      y: (change) => size.top + ((limits.high - change) / (limits.high - limits.low)) * size.height,
    };
    const middle = left + size.panel / 2;
    return [
      text(middle, size.top - 14, name, 'text-anchor="middle" font-weight="bold" font-size="14"'),
      ...gridLines(scale, steps, limits),
      ...lines.flatMap((line) => drawLine(line, curve, scale)),
      ...endLabels(curve, scale),
      text(middle, size.top + size.height + 42, 'optimizer steps', 'text-anchor="middle"'),
    ];
  });
  const yTitle = 'change of log-probability (nats an answer)';
  const middle = size.top + size.height / 2;
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222">`,
    `<title>${escaped(title)}</title>`,
    `<rect width="${width}" height="${height}" fill="#fff"/>`,
    text(size.left, 24, title, 'font-size="16" font-weight="bold"'),
    text(size.left, 44, subtitle, 'fill="#555"'),
    text(18, middle, yTitle, `text-anchor="middle" transform="rotate(-90 18 ${middle})"`),
    ...body,
    '</svg>\n',
  ].join('\n');
}
