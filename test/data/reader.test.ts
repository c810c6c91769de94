// Files of records: JSON lines and arrays, and the place of everything that is wrong in them.

import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { readRecords, recordsFrom } from '../../src/data/reader.js';
import { describeWithShared, sharedPath } from '../shared.js';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'keelgrad-'));
});
afterEach(() => rm(folder, { recursive: true }));

async function read(content: string | Buffer) {
  const path = join(folder, 'd.json');
  await writeFile(path, content);
  return readRecords(path);
}
const values = async (content: string) => (await read(content)).map(({ line, index, value }) => [index, line, value]);

describe('readRecords', () => {
  it('reads JSON lines with blank lines, CRLF, a byte order mark and no last newline', async () => {
    expect(await values('\uFEFF{"a":1}\r\n\r\n  \n{"a":2}')).toEqual([
      [0, 1, { a: 1 }],
      [1, 4, { a: 2 }],
    ]);
  });

  it('keeps characters that other line readers break at', async () => {
    expect(await values('{"a":"x\u2028y\u2029z\u0085"}\n')).toEqual([[0, 1, { a: 'x\u2028y\u2029z\u0085' }]]);
  });

  it('reads arrays, compact and spread over lines', async () => {
    expect(await values('[{"a":"],\\"["},{"a":[1,{"b":2}]}]')).toEqual([
      [0, 1, { a: '],"[' }],
      [1, 1, { a: [1, { b: 2 }] }],
    ]);
    expect(await values('\uFEFF\n[\n  {\n    "a": 1\n  },\n\n  {"a": "\\\\"}\r\n]\n')).toEqual([
      [0, 3, { a: 1 }],
      [1, 7, { a: '\\' }],
    ]);
  });

  const broken: [string, string, RegExp][] = [
    ['a broken line', '{"a":1}\n{"a":\n', /d.json:2: not valid JSON: .*expected one record/],
    ['a line that is no object', '{"a":1}\n3\n', /d.json:2: expected a JSON object, found 3/],
    ['a broken element', '[{"a":1},\n\n{"a":}]', /d.json:3: not valid JSON/],
    ['an element that is no object', '[{"a":1},\n"x"]', /d.json:2: expected a JSON object, found "x"/],
    ['an array that is not closed', '[{"a":1},\n{"b":2}\n', /d.json:3: expected "," or "]", found the end/],
    ['a text that is not closed', '[{"a":1},\n{"b":"2}]\n', /d.json:3: expected "," or "]", found the end/],
    ['a comma at the end', '[{"a":1},\n]', /d.json:2: expected a record, found "]"/],
    ['two commas', '[{"a":1},,{"a":1}]', /d.json:1: expected a record, found ","/],
    ['something behind the array', '[{"a":1}]\n[2]', /d.json:2: expected nothing behind the array, found "\["/],
    ['an empty array', '[]', /expected at least one record, found none/],
    ['an empty file', ' \n', /expected at least one record, found none/],
    ['another format', 'prompt,chosen\n', /expected JSON lines or a JSON array, found a file beginning with "p"/],
  ];
  it.each(broken)('names the place of %s', async (_, content, message) => {
    await expect(read(content)).rejects.toThrow(message);
  });

  it('names bytes that are no UTF-8, and files that are not there', async () => {
    await expect(read(Buffer.from([...Buffer.from('{"a":1}\n{"a":"'), 0xff, 0x22, 0x7d]))).rejects.toThrow(
      /json:2: not UTF-8/,
    );
    await expect(readRecords(join(folder, 'none.jsonl'))).rejects.toThrow(/none.jsonl: cannot be read: no such file/);
  });
});

describe('recordsFrom', () => {
  it('numbers records of memory', () => {
    expect(recordsFrom([{ a: 1 }])).toEqual([{ index: 0, line: 1, where: 'records:1', value: { a: 1 } }]);
    expect(() => recordsFrom([{}, []], 'pairs')).toThrow(/pairs:2: expected an object/);
  });
});

describeWithShared('real data sets', 'data/gsm8k', () => {
  it.each([
    ['data/gsm8k/pairs_train.jsonl', 621],
    ['data/gsm8k/test.jsonl', 1319],
    ['data/preference/llms-from-scratch-instruct-pref/instruction-data-with-preference.json', 1100],
    ['data/preference/llama-factory-demo/dpo_en_demo.json', 300],
    ['golden/training/data_preference.json', 96],
  ])('%s has %i records', async (path, count) => {
    const records = await readRecords(sharedPath(path));
    expect(records).toHaveLength(count);
    expect(records.at(-1)!.index).toBe(count - 1);
  });
});
