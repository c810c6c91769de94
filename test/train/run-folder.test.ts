// The output folder: what is refused, what --overwrite replaces and what it leaves, and what a run writes.

import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { KeelgradError } from '../../src/errors.js';
import { checkOutput, packageVersion, type RunFacts, RunFolder } from '../../src/train/run-folder.js';

let root = '';
let output = '';

beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'keelgrad-run-folder-'));
  output = join(root, 'runs', 'out');
});
afterEach(() => rmSync(root, { recursive: true, force: true }));

const facts: RunFacts = {
  method: 'spo',
  options: { beta: 0.5, 'lora-targets': ['q_proj'] },
  model: { path: 'm', sha256: 'abc', files: { 'config.json': 'def' } },
  data: { path: 'd', sha256: '012', records: 7 },
  totalSteps: 5,
};
const fresh = { overwrite: false, inputs: [] };
const overwriting = { overwrite: true, inputs: [] };

function put(path: string, text = 'x'): void {
  mkdirSync(dirname(join(output, path)), { recursive: true });
  writeFileSync(join(output, path), text);
}

async function refusal(settings: { overwrite: boolean; inputs: string[] }): Promise<string> {
  const before = existsSync(output) ? readdirSync(output, { recursive: true }).sort() : [];
  const error: unknown = await checkOutput(output, settings).catch((reason: unknown) => reason);
  expect(error).toBeInstanceOf(KeelgradError);
  expect(readdirSync(output, { recursive: true }).sort()).toStrictEqual(before);
  return (error as Error).message;
}

async function finishedRun(): Promise<void> {
  const run = await RunFolder.begin(output, facts, fresh);
  run.appendMetrics({ step: 1, loss: 1 });
  put('model/model-00001-of-00002.safetensors', 'old');
  put('model/config.json', 'old');
  put('adapter/adapter_config.json', 'old');
  await run.finish('completed', 1);
}

const readRun = (): Record<string, unknown> => JSON.parse(readFileSync(join(output, 'run.json'), 'utf8'));

describe('checkOutput', () => {
  it('accepts a folder that is missing or empty, and creates nothing', async () => {
    await checkOutput(output, fresh);
    expect(existsSync(output)).toBe(false);
    mkdirSync(output, { recursive: true });
    await checkOutput(output, fresh);
  });

  it('refuses anything in the folder without --overwrite, and names it', async () => {
    put('notes.txt');
    expect(await refusal({ overwrite: false, inputs: [] })).toBe(
      `${output}: expected a new or empty folder, found notes.txt; name another --output, or use --overwrite`,
    );
  });

  it('refuses a file in place of the folder', async () => {
    mkdirSync(dirname(output), { recursive: true });
    writeFileSync(output, 'x');
    await expect(checkOutput(output, overwriting)).rejects.toThrow('expected a folder for the output, found a file');
  });

  it.each(['metrics.jsonl', 'model/model.safetensors', 'adapter/adapter_config.json', 'run.json'])(
    'refuses to replace a %s that no run wrote, even with --overwrite',
    async (path) => {
      put(path, '{}');
      expect(await refusal({ overwrite: true, inputs: [] })).toContain('not written by keelgrad');
    },
  );

  it("refuses to replace an earlier run's model folder with other files in it", async () => {
    await finishedRun();
    put('model/thesis.tex');
    expect(await refusal({ overwrite: true, inputs: [] })).toContain('found model/thesis.tex, not written by keelgrad');
  });

  it("refuses to replace the run's own inputs, through links too", async () => {
    await finishedRun();
    const link = join(root, 'link');
    symlinkSync(join(output, 'model'), link);
    for (const input of [join(output, 'model'), link, join(output, 'metrics.jsonl')]) {
      const message = await refusal({ overwrite: true, inputs: [join(root, 'absent'), input] });
      expect(message).toBe(`${input}: is read by this run and would be replaced by it; name another --output`);
    }
  });
});

describe('RunFolder', () => {
  it('writes metrics line by line, unrounded, non-finite numbers as null', async () => {
    const run = await RunFolder.begin(output, facts, fresh);
    const lines: Record<string, number>[] = [
      { step: 1, loss: Math.LN2, 'rewards/margins': 0.1 + 0.2 },
      { step: 2, loss: Number.NaN },
    ];
    run.appendMetrics(lines[0]);
    const read = (): unknown[] =>
      readFileSync(join(output, 'metrics.jsonl'), 'utf8')
        .trimEnd()
        .split('\n')
        .map((line) => JSON.parse(line));
    expect(read()).toStrictEqual([lines[0]]);
    run.appendMetrics(lines[1]);
    expect(read()[1]).toStrictEqual({ step: 2, loss: null });
    await run.finish('completed', 2);
  });

  it('keeps run.json true from the first moment to the last', async () => {
    const run = await RunFolder.begin(output, facts, fresh);
    const { method, options, model, data } = facts;
    const versions = {
      keelgrad: packageVersion(),
      node: process.versions.node,
      platform: process.platform,
      arch: process.arch,
    };
    expect(readRun()).toMatchObject({
      method,
      status: 'running',
      steps: 0,
      total_steps: 5,
      options,
      versions,
      model,
      data,
    });
    expect(readRun()).not.toHaveProperty('ended_at');
    await run.finish('failed', 3, 'loss is NaN at step 4');
    expect(readRun()).toMatchObject({ status: 'failed', steps: 3, error: 'loss is NaN at step 4' });
    const { started_at, ended_at } = readRun() as { started_at: string; ended_at: string };
    expect(Date.parse(ended_at)).toBeGreaterThanOrEqual(Date.parse(started_at));
    expect(readdirSync(output).sort()).toStrictEqual(['metrics.jsonl', 'run.json']);
  });

  it('replaces an earlier run and leaves everything else', async () => {
    await finishedRun();
    put('notes.txt', 'mine');
    put('.model.123.0a0b0c0d.tmp/model.safetensors');
    const run = await RunFolder.begin(output, facts, overwriting);
    expect(readdirSync(output).sort()).toStrictEqual(['metrics.jsonl', 'notes.txt', 'run.json']);
    expect(readFileSync(join(output, 'metrics.jsonl'), 'utf8')).toBe('');
    expect(readRun()).toMatchObject({ status: 'running' });
    expect(readFileSync(join(output, 'notes.txt'), 'utf8')).toBe('mine');
    await run.finish('interrupted', 0);
  });

  it('says which folder cannot be created', async () => {
    put('file');
    const below = join(output, 'file', 'deeper');
    await expect(RunFolder.begin(below, facts, fresh)).rejects.toThrow(below);
  });
});
