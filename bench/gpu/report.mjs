// Tables of what was measured: printed, and as markdown with date, hardware and command. A row is
// { section, name, goal, ours, peer, ratio, met, note }, all but `met` as they are shown.
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const columns = [
  ['work', (r) => r.name],
  ['goal', (r) => r.goal ?? ''],
  ['ours', (r) => r.ours],
  ['PyTorch', (r) => r.peer ?? ''],
  ['ratio', (r) => r.ratio ?? ''],
  ['met', (r) => (r.met === undefined ? '' : r.met ? 'yes' : 'no')],
  ['', (r) => r.note ?? ''],
];

/** One section as lines of a markdown table, aligned. */
function table(rows) {
  const shown = columns.filter(([, f]) => rows.some((r) => f(r) !== ''));
  const cells = [shown.map(([head]) => head), ...rows.map((r) => shown.map(([, f]) => f(r)))];
  const widths = shown.map((_, i) => Math.max(3, ...cells.map((line) => line[i].length)));
  const line = (texts) => `| ${texts.map((text, i) => text.padEnd(widths[i])).join(' | ')} |`;
  return [line(cells[0]), `|${widths.map((w) => '-'.repeat(w + 2)).join('|')}|`, ...cells.slice(1).map(line)];
}

const sections = (rows) => [...new Set(rows.map((r) => r.section))];

export function printSection(section, rows) {
  console.log(`\n${section}\n${table(rows).join('\n')}`);
}

/** Writes <folder>/<date>-gpu.md and .json. */
export function writeReport(folder, { rows, machine, command, date }) {
  mkdirSync(folder, { recursive: true });
  const facts = Object.entries(machine).map(([key, value]) => `- ${key}: ${value}`);
  const head = [`# GPU, ${date}`, '', ...facts, `- command: \`${command}\``, ''];
  const ratio = 'Ratio: PyTorch by ours, in the same run; above 1 we are faster (for memory: use less).';
  const body = sections(rows).flatMap((s) => ['', `## ${s}`, '', ...table(rows.filter((r) => r.section === s))]);
  const path = join(folder, `${date}-gpu`);
  writeFileSync(`${path}.md`, `${[...head, ratio, ...body].join('\n')}\n`);
  writeFileSync(`${path}.json`, `${JSON.stringify({ date, machine, command, rows }, null, 1)}\n`);
  return `${path}.md`;
}
