// The executable as a process of its own: exit codes, real signals, nothing on the error stream that was not meant.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { makeModelFolder } from '../fixtures/make.js';
import { Compiled, type Finished } from '../support/compiled.js';
import { fixturePairs, readMetrics, readRun, temporaryFolder } from '../train/support.js';

const folder = temporaryFolder();
let compiled: Compiled;
let inputs: string[];

beforeAll(async () => {
  compiled = new Compiled();
  inputs = [
    '--model',
    await makeModelFolder(folder.path('llama'), 'llama'),
    '--data',
    folder.write('pairs.json', fixturePairs(6)),
  ];
});
afterAll(() => compiled.dispose());

/** Runs keelgrad in a process, after `before` (JavaScript) in the same one. */
function keelgrad(argv: readonly string[], before = '', shell?: string): Promise<Finished> {
  const main = `process.argv = [process.argv[0], 'keelgrad', ...${JSON.stringify(argv)}]; await import('${compiled.url('cli/main.js')}');`;
  return compiled.run(`${before}\n${main}`, { prelude: false, shell });
}

/** Sends `count` SIGINT to the process itself once its metrics have two lines. */
const interrupting = (output: string, count: number): string => `
import { readFileSync } from 'node:fs';
const lines = () => { try { return readFileSync(${JSON.stringify(join(output, 'metrics.jsonl'))}, 'utf8').split('\\n').length - 1; } catch { return 0; } };
let left = ${count};
setInterval(() => { if (left > 0 && lines() >= 2) { left--; process.kill(process.pid, 'SIGINT'); } }, 1).unref();
`;

it('trains and ends with 0', async () => {
  const output = folder.path('done');
  const ended = await keelgrad(['spo', ...inputs, '--output', output, '--max-steps', '3']);
  expect(ended).toMatchObject({ code: 0, signal: null });
  expect(ended.stdout).toMatch(/spo finished at step 3: .*\nsaved in /);
  expect(readMetrics(output)).toHaveLength(3);
});

it('Ctrl-C: ends after the current step with 130, everything saved', async () => {
  const output = folder.path('interrupted');
  const argv = ['spo', ...inputs, '--output', output, '--max-steps', '100000', '--batch-size', '1'];
  const ended = await keelgrad(argv, interrupting(output, 1));
  expect(ended).toMatchObject({ code: 130, signal: null });
  expect(ended.stderr).toContain('stopping after the current step');
  const run = readRun(output);
  expect(run.status).toBe('interrupted');
  expect(readMetrics(output)).toHaveLength(run.steps);
  const scored = await keelgrad([
    'score',
    '--json',
    '--model',
    join(output, 'model'),
    '--adapter',
    join(output, 'adapter'),
    ...inputs.slice(2),
  ]);
  expect(scored).toMatchObject({ code: 0 });
  expect(scored.stdout.split('\n')).toHaveLength(7);
});

it('nobody reads its notes any more: goes on and saves', async () => {
  const output = folder.path('unwatched');
  const argv = ['dpo', ...inputs, '--output', output, '--max-steps', '5'];
  const ended = await keelgrad(argv, '', 'exec 2> >(true); sleep 0.3');
  expect(ended).toMatchObject({ code: 0, signal: null });
  expect(ended.stdout).toContain('dpo finished at step 5');
  expect(readRun(output)).toMatchObject({ status: 'completed', steps: 5 });
});

it('bad input: one line, 1', async () => {
  const ended = await keelgrad(['dpo', ...inputs, '--output', folder.path('never'), '--beta', '-1']);
  expect(ended).toMatchObject({ code: 1, signal: null, stdout: '' });
  expect(ended.stderr).toBe('error: --beta: expected a number above 0, found -1\n');
});

it('a loss that is not finite: 1, and no rejection that nobody handled', async () => {
  const rows = fixturePairs(4).map((pair, i) => ({
    ...pair,
    ref_chosen_logps: i === 2 ? 1e300 : -3,
    ref_rejected_logps: -3,
  }));
  const data = folder.write('infinite.json', rows);
  const output = folder.path('infinite');
  const argv = ['spo', inputs[0], inputs[1], '--data', data, '--output', output, '--batch-size', '1', '--no-shuffle'];
  const ended = await keelgrad(argv);
  expect(ended).toMatchObject({ code: 1, signal: null });
  expect(ended.stderr.trimEnd().split('\n').at(-1)).toMatch(/^error: step 3: loss is Infinity \(records 2\)/);
  expect(ended.stderr).not.toMatch(/unhandled|node:internal| {4}at /i);
  expect(readFileSync(join(output, 'metrics.jsonl'), 'utf8').split('\n')).toHaveLength(3);
});
