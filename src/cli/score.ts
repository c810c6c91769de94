// `keelgrad score`: one line per record, JSON for programs or a table for people, and what they add up to.
// Prints nothing but records to standard output under --json.

import type { ScoreRecord, ScoreSummary } from '../train/hooks.js';
import type { ResolvedScoreOptions } from '../train/options.js';
import { type CliIo, type Work, withInterrupt } from './io.js';

const columns: readonly (readonly [title: string, width: number, cell: (record: ScoreRecord) => string])[] = [
  ['record', 8, (record) => String(record.index)],
  ['chosen', 14, (record) => record.chosen_logps.toFixed(4)],
  ['tokens', 8, (record) => String(record.chosen_tokens)],
  ['rejected', 14, (record) => record.rejected_logps.toFixed(4)],
  ['tokens', 8, (record) => String(record.rejected_tokens)],
  ['margin', 14, (record) => record.margin.toFixed(4)],
];

const tableHeader = (): string => `${columns.map(([title, width]) => title.padStart(width)).join('')}\n`;

const tableRow = (record: ScoreRecord): string =>
  `${columns.map(([, width, cell]) => cell(record).padStart(width)).join('')}\n`;

/** Running sums over records; nothing is kept of the records themselves. */
class Totals {
  #records = 0;
  #preferred = 0;
  #chosen = 0;
  #rejected = 0;
  #chosenTokens = 0;
  #rejectedTokens = 0;

  add(record: ScoreRecord): void {
    this.#records += 1;
    this.#preferred += record.margin > 0 ? 1 : 0;
    this.#chosen += record.chosen_logps;
    this.#rejected += record.rejected_logps;
    this.#chosenTokens += record.chosen_tokens;
    this.#rejectedTokens += record.rejected_tokens;
  }

  describe(): string {
    const n = this.#records;
    if (n === 0) return 'no records scored\n';
    const line = (name: string, sum: number, tokens: number): string =>
      `mean ${name.padEnd(9)}${(sum / n).toFixed(4).padStart(14)}   per token ${(sum / tokens).toFixed(4)}\n`;
    const share = (this.#preferred / n).toFixed(4);
    return (
      `\n${line('chosen', this.#chosen, this.#chosenTokens)}${line('rejected', this.#rejected, this.#rejectedTokens)}` +
      `mean margin   ${((this.#chosen - this.#rejected) / n).toFixed(4).padStart(14)}\n` +
      `accuracy      ${share.padStart(14)}   chosen above rejected in ${this.#preferred} of ${n} records\n`
    );
  }
}

function describeGaps({ dropped, interrupted }: ScoreSummary): string[] {
  const notes: string[] = [];
  if (dropped > 0) notes.push(`${dropped} records dropped: their prompt alone fills --max-length`);
  if (interrupted) notes.push('stopped early: the records above are not all');
  return notes;
}

/** Returns the exit code: 0, or 130 when Ctrl-C ended it early. */
export async function scoreCommand(options: ResolvedScoreOptions, io: CliIo, work: Work): Promise<number> {
  const note = (text: string): void => void io.stderr.write(`${text}\n`);
  const totals = new Totals();
  let first = true;
  const onRecord = (record: ScoreRecord): void => {
    if (options.json) return void io.stdout.write(`${JSON.stringify(record)}\n`);
    io.stdout.write((first ? tableHeader() : '') + tableRow(record));
    first = false;
    totals.add(record);
  };
  const summary = await withInterrupt(io, note, (signal) =>
    work.scoreFile(options, { onRecord, signal, onMessage: note }),
  );
  if (!options.json) io.stdout.write(totals.describe());
  describeGaps(summary).forEach(note);
  return summary.interrupted ? 130 : 0;
}
