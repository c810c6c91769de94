// The examples run as they are written, against the built package, and the pages show them as they are.

import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { describe, expect, it } from 'vitest';
import { makeModelFolder } from './fixtures/make.js';
import { writeToyTokenizer } from './io/toy-tokenizer.js';

const root = join(import.meta.dirname, '..');
const examples = join(root, 'examples');
const built = existsSync(join(root, 'dist', 'index.js'));

async function run(example: string, ...args: string[]): Promise<string[]> {
  const { stdout } = await promisify(execFile)(process.execPath, [join(examples, example), ...args]);
  return stdout.trimEnd().split('\n');
}

/** An example without the comment that it opens with. */
const codeOf = async (example: string): Promise<string> =>
  (await readFile(join(examples, example), 'utf8')).replace(/^(\/\/.*\n)+/, '').trim();

describe.skipIf(!built)('examples (need npm run build)', () => {
  it('gradients.mjs prints what its comments say', async () => {
    expect(await run('gradients.mjs')).toEqual([
      'f32[2,2]@cpu 54 Float32Array(4) [ 7, 11, 9, 13 ]',
      '12 Float32Array(2) [ 6, 12 ]',
      '5.4772 true',
    ]);
  });

  it('theory.mjs predicts what it measures, and writes a report', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'keelgrad-examples-'));
    try {
      const lines = await run('theory.mjs', folder);
      expect(lines).toHaveLength(4);
      for (const line of [lines[1], lines[3]]) {
        const [, predicted, measured] = /predicted (\S+), measured (\S+) nats/.exec(line)!.map(Number);
        expect(Math.abs(measured / predicted - 1)).toBeLessThan(0.2);
      }
      expect(await readdir(folder)).toEqual(expect.arrayContaining(['theory.html', 'theory-pairs.csv', 'theory.json']));
    } finally {
      await rm(folder, { recursive: true });
    }
  });

  it('bilevel.mjs ends where the closed form does', async () => {
    const lines = await run('bilevel.mjs');
    const found = lines.slice(0, -1).map((line) => Number(/e\^phi (\S+)$/.exec(line)![1]));
    const [, best] = /e\^phi ([\d.]+);/.exec(lines[lines.length - 1])!.map(Number);
    expect(Math.abs(found[0] / best - 1)).toBeGreaterThan(0.5);
    expect(Math.abs(found[found.length - 1] / best - 1)).toBeLessThan(0.1);
  });

  it('spo.mjs trains a folder and saves what loads again', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'keelgrad-examples-'));
    try {
      const model = await makeModelFolder(join(folder, 'in'), 'llama');
      await writeToyTokenizer(model);
      const pairs = join(folder, 'pairs.jsonl');
      const record = { prompt: 'ab:', chosen: 'abc', rejected: 'cab c' };
      await writeFile(pairs, `${JSON.stringify(record)}\n`.repeat(3));
      const lines = await run('spo.mjs', model, pairs, join(folder, 'out'));
      expect(lines).toHaveLength(10);
      for (const line of lines) expect(line).toMatch(/^step \d+: chosen -\d+\.\d\d, rejected -\d+\.\d\d$/);
      expect(await readdir(join(folder, 'out', 'model'))).toContain('tokenizer.json');
      expect(await readdir(join(folder, 'out', 'adapter'))).toContain('adapter_model.safetensors');
      expect(await run('spo.mjs', join(folder, 'out', 'model'), pairs, join(folder, 'again'))).toHaveLength(10);
    } finally {
      await rm(folder, { recursive: true });
    }
  });
});

describe('README and docs/spo.md', () => {
  it('show every example as it is', async () => {
    const pages = await Promise.all(['README.md', 'docs/spo.md'].map((page) => readFile(join(root, page), 'utf8')));
    for (const example of await readdir(examples)) {
      if (example.endsWith('.mjs')) expect(pages.join()).toContain(`\`\`\`js\n${await codeOf(example)}\n\`\`\``);
    }
  });
});
