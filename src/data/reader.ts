// Reads records from JSON lines or a JSON array, each with the line it starts on.
// Knows nothing of what a record means; every complaint is `file:line`.

import { readFile } from 'node:fs/promises';
import { KeelgradError, show } from '../errors.js';
import { isRecord } from '../io/fields.js';

export interface RawRecord {
  /** Position in the file, from 0. */
  readonly index: number;
  /** Line on which the record starts, from 1. */
  readonly line: number;
  /** `file:line`, for messages. */
  readonly where: string;
  readonly value: Readonly<Record<string, unknown>>;
}

const NEWLINE = 10;

function parseRecord(text: string, index: number, line: number, path: string): RawRecord {
  const where = `${path}:${line}`;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    const reason = (error as Error).message;
    throw new KeelgradError(`${where}: not valid JSON: ${reason}; expected one record (a JSON object)`, {
      cause: error,
    });
  }
  if (!isRecord(value)) throw new KeelgradError(`${where}: expected a JSON object, found ${show(value)}`);
  return { index, line, where, value };
}

function decodeUtf8(bytes: Uint8Array, where: string): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes); // drops a byte order mark
  } catch {
    throw new KeelgradError(`${where}: not UTF-8 text; convert the file to UTF-8`);
  }
}

/** Splits at newline bytes alone: U+2028 and the like may stand inside of JSON strings. */
function parseLines(bytes: Uint8Array, path: string): RawRecord[] {
  const records: RawRecord[] = [];
  let line = 0;
  for (let begin = 0; begin < bytes.length; ) {
    const newline = bytes.indexOf(NEWLINE, begin);
    const end = newline < 0 ? bytes.length : newline;
    line++;
    const text = decodeUtf8(bytes.subarray(begin, end), `${path}:${line}`);
    if (text.trim() !== '') records.push(parseRecord(text, records.length, line, path));
    begin = end + 1;
  }
  return records;
}

/** Finds where the elements of a top-level array begin and end, without parsing them. */
class ArrayScanner {
  private readonly text: string;
  private readonly path: string;
  private position = 0;
  private line = 1;

  constructor(text: string, path: string) {
    this.text = text;
    this.path = path;
  }

  private fail(expected: string): KeelgradError {
    const found = this.position < this.text.length ? show(this.text[this.position]) : 'the end of the file';
    return new KeelgradError(`${this.path}:${this.line}: expected ${expected}, found ${found}`);
  }

  private step(): void {
    if (this.text.charCodeAt(this.position++) === NEWLINE) this.line++;
  }

  private skipSpace(): string {
    while (' \t\r\n'.includes(this.text[this.position] ?? 'x')) this.step();
    return this.text[this.position] ?? '';
  }

  private skipString(): void {
    for (this.step(); this.position < this.text.length && this.text[this.position] !== '"'; this.step()) {
      if (this.text[this.position] === '\\') this.step();
    }
  }

  /** Moves behind one element, to the `,` or `]` after it. */
  private skipElement(): void {
    for (let depth = 0; this.position < this.text.length; this.step()) {
      const character = this.text[this.position];
      if (character === '"') this.skipString();
      else if (character === '{' || character === '[') depth++;
      else if (depth === 0 && (character === ',' || character === ']')) return;
      else if (character === '}' || character === ']') depth--;
    }
    throw this.fail('"," or "]"');
  }

  *elements(): Generator<{ text: string; line: number }> {
    this.skipSpace();
    this.step(); // the opening bracket
    if (this.skipSpace() === ']') this.step();
    else yield* this.rest();
    if (this.skipSpace() !== '') throw this.fail('nothing behind the array');
  }

  private *rest(): Generator<{ text: string; line: number }> {
    for (let closed = false; !closed; this.step()) {
      if ([',', ']', ''].includes(this.skipSpace())) throw this.fail('a record');
      const { position: begin, line } = this;
      this.skipElement();
      yield { text: this.text.slice(begin, this.position), line };
      closed = this.text[this.position] === ']';
    }
  }
}

function parseArray(bytes: Uint8Array, path: string): RawRecord[] {
  const elements = new ArrayScanner(decodeUtf8(bytes, path), path).elements();
  return Array.from(elements, ({ text, line }, index) => parseRecord(text, index, line, path));
}

const firstCharacter = (bytes: Uint8Array): string => {
  const begin = bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf ? 3 : 0;
  const at = bytes.subarray(begin).findIndex((byte) => byte > 32);
  return at < 0 ? '' : String.fromCharCode(bytes[begin + at]);
};

/** All records of a file of JSON lines or of a JSON array. A file without records is an error. */
export async function readRecords(path: string): Promise<RawRecord[]> {
  const bytes = await readFile(path).catch((error: NodeJS.ErrnoException) => {
    const reason = error.code === 'ENOENT' ? 'no such file' : error.message;
    throw new KeelgradError(`${path}: cannot be read: ${reason}`, { cause: error });
  });
  const first = firstCharacter(bytes);
  if (first !== '' && first !== '[' && first !== '{') {
    throw new KeelgradError(`${path}: expected JSON lines or a JSON array, found a file beginning with ${show(first)}`);
  }
  const records = first === '[' ? parseArray(bytes, path) : parseLines(bytes, path);
  if (records.length === 0) throw new KeelgradError(`${path}: expected at least one record, found none`);
  return records;
}

/** Records that are in memory already; `source` stands for the file in messages. */
export function recordsFrom(values: readonly object[], source = 'records'): RawRecord[] {
  return values.map((value, index) => {
    if (!isRecord(value)) throw new KeelgradError(`${source}:${index + 1}: expected an object, found ${show(value)}`);
    return { index, line: index + 1, where: `${source}:${index + 1}`, value };
  });
}
