// Reports of analyses: a page that needs nothing but itself (text, tables, charts, interactive where scripts run), every chart
// as an SVG file, every table as CSV, and all numbers as JSON. Knows nothing of what is analyzed.
import { mkdir, readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { KeelgradError } from '../errors.js';
import { writeFileAtomic, writeJsonAtomic } from '../io/atomic.js';
import type { Chart } from './charts.js';

export interface Table {
  /** File name without ending. */
  readonly id: string;
  readonly title: string;
  readonly caption: string;
  readonly columns: readonly string[];
  readonly rows: readonly (readonly (string | number | boolean)[])[];
  /** Rows that the page shows, the first ones; all by default. The CSV file has all of them. */
  readonly shown?: number;
}

export interface Report {
  /** Name of the page's and the data's files. */
  readonly id: string;
  readonly title: string;
  /** What was done, with what. */
  readonly introduction: readonly string[];
  /** What came out, in sentences made of the numbers. */
  readonly findings: readonly string[];
  readonly charts: readonly Chart[];
  readonly tables: readonly Table[];
  /** Settings and all numbers, unrounded. */
  readonly data: object;
}

const look = {
  background: 'white',
  font: 'Helvetica, Arial, sans-serif',
  axis: { gridColor: '#e3e3e3', domainColor: '#666', tickColor: '#666', labelFontSize: 11, titleFontSize: 12 },
  legend: { labelFontSize: 12, symbolStrokeWidth: 2.5, symbolOpacity: 1 },
  view: { stroke: null },
} as const;

/** A chart as SVG, drawn without a screen. */
export async function drawSvg(chart: Chart): Promise<string> {
  const [vega, vegaLite] = await Promise.all([import('vega'), import('vega-lite')]);
  const compiled = vegaLite.compile(withLook(chart));
  const view = new vega.View(vega.parse(compiled.spec), { renderer: 'none', logLevel: vega.Error });
  try {
    return await view.toSVG();
  } finally {
    view.finalize();
  }
}

const withLook = (chart: Chart) =>
  ({
    $schema: 'https://vega.github.io/schema/vega-lite/v6.json',
    config: look,
    padding: 8,
    title: { text: chart.title, anchor: 'start', fontSize: 14, offset: 12 },
    ...chart.spec,
  }) as Chart['spec'];

const escaped = (text: string): string =>
  text.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;').replace(/"/g, '&quot;');

/** Four significant digits; whole numbers as they are. */
export function formatNumber(value: number): string {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? '–' : value > 0 ? '∞' : '-∞';
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

const cellText = (cell: string | number | boolean): string =>
  typeof cell === 'number' ? formatNumber(cell) : typeof cell === 'boolean' ? (cell ? 'yes' : 'no') : cell;

function tableHtml({ id, title, caption, columns, rows, shown = rows.length }: Table): string {
  const head = columns.map((c) => `<th>${escaped(c)}</th>`).join('');
  const rest = shown < rows.length ? ` The first ${shown} of ${rows.length} rows; all are in ${id}.csv.` : '';
  const body = rows
    .slice(0, shown)
    .map(
      (row) =>
        `<tr>${row
          .map((cell) => `<td${typeof cell === 'number' ? ' class="n"' : ''}>${escaped(cellText(cell))}</td>`)
          .join('')}</tr>`,
    )
    .join('\n');
  return `<section id="${id}"><h2>${escaped(title)}</h2><div class="scroll"><table><thead><tr>${head}</tr></thead><tbody>\n${body}\n</tbody></table></div><p class="caption">${escaped(caption + rest)}</p></section>`;
}

const styles = `
body{font:16px/1.5 Helvetica,Arial,sans-serif;color:#222;max-width:960px;margin:2em auto;padding:0 1em}
h1{font-size:1.6em;line-height:1.2}h2{font-size:1.15em;margin-top:2em}
figure{margin:2em 0;overflow-x:auto}figcaption,.caption{color:#555;font-size:.9em;max-width:45em}
table{border-collapse:collapse;font-size:.85em}th,td{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:left}
th{border-bottom:2px solid #888;vertical-align:bottom}td.n{text-align:right;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}footer{color:#777;font-size:.8em;margin-top:3em}
figure svg{max-width:100%;height:auto}
@media print{body{max-width:none;margin:0;font-size:11pt}.scroll,figure{overflow:visible}table{font-size:7.5pt}th,td{padding:.15em .35em}figure,section{break-inside:avoid}.vega-embed summary,.vega-embed details{display:none}}
`;

/** Vega, Vega-Lite and Vega-Embed as one script text, so that the page needs no network. */
async function scripts(): Promise<string> {
  const require = createRequire(import.meta.url);
  const files = ['vega/build/vega.min.js', 'vega-lite/build/vega-lite.min.js', 'vega-embed/build/vega-embed.min.js'];
  const texts = await Promise.all(
    files.map(async (file) => {
      const [name] = file.split('/');
      const entry = require.resolve(name);
      const folder = entry.slice(0, entry.lastIndexOf(join('node_modules', name)) + join('node_modules', name).length);
      return readFile(join(folder, ...file.split('/').slice(1)), 'utf8');
    }),
  );
  return texts.map((text) => text.replace(/<\/script/g, '<\\/script')).join('\n;\n');
}

const scriptJson = (value: unknown): string => JSON.stringify(value).replace(/</g, '\\u003c');

/** The page: charts stand in it as SVG, and become interactive where scripts run. */
export async function renderPage(report: Report, svgs: ReadonlyMap<string, string>): Promise<string> {
  const list = (items: readonly string[]): string => items.map((item) => `<li>${escaped(item)}</li>`).join('\n');
  const figures = report.charts
    .map(
      (c) =>
        `<figure><div id="chart-${c.id}">${svgs.get(c.id)}</div><figcaption>${escaped(c.caption)}</figcaption></figure>`,
    )
    .join('\n');
  const specs = Object.fromEntries(report.charts.map((c) => [`chart-${c.id}`, withLook(c)]));
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escaped(report.title)}</title><style>${styles}</style></head><body>
<h1>${escaped(report.title)}</h1>
${report.introduction.map((text) => `<p>${escaped(text)}</p>`).join('\n')}
<h2>What came out</h2><ul>
${list(report.findings)}
</ul>
${figures}
${report.tables.map(tableHtml).join('\n')}
<footer>Made by keelgrad. All numbers: ${escaped(report.id)}.json.</footer>
<script>${await scripts()}</script>
<script>for (const [id, spec] of Object.entries(${scriptJson(specs)}))
  vegaEmbed('#' + id, spec, { renderer: 'svg', actions: { source: false, compiled: false, editor: false } });</script>
</body></html>
`;
}

const csvCell = (cell: string | number | boolean): string =>
  typeof cell === 'string' && /[",\n]/.test(cell) ? `"${cell.replace(/"/g, '""')}"` : String(cell);

const csvOf = ({ columns, rows }: Table): string =>
  `${[columns, ...rows].map((row) => row.map(csvCell).join(',')).join('\n')}\n`;

/** Writes page, pictures, tables and data into a folder; returns the page's path. */
export async function writeReport(folder: string, report: Report): Promise<string> {
  await mkdir(folder, { recursive: true }).catch((error: Error) => {
    throw new KeelgradError(`${folder}: expected a folder that can be made (${error.message}); name another --output`);
  });
  const svgs = new Map<string, string>();
  for (const chart of report.charts) {
    const svg = await drawSvg(chart);
    svgs.set(chart.id, svg);
    await writeFileAtomic(join(folder, `${chart.id}.svg`), svg);
  }
  for (const table of report.tables) await writeFileAtomic(join(folder, `${table.id}.csv`), csvOf(table));
  await writeJsonAtomic(join(folder, `${report.id}.json`), report.data);
  const page = join(folder, `${report.id}.html`);
  await writeFileAtomic(page, await renderPage(report, svgs));
  return page;
}
