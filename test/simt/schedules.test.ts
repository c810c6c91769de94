// Each op under several schedules of threads, blocks and asynchronous copies, and on devices of other sizes: the bits must be
// the same. A missing barrier, a race between blocks or an order that depends on any of these shows here. That the values are right, cases.test.ts says.
import { mkdtempSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { bundleDigests } from './bundle.js';
import { BUILD_TIMEOUT, type Environment, missingCompiler, root, run, simtBuild, simtEnvironment } from './support.js';

type Digests = Readonly<Record<string, string>>;

const reference: Environment = { KEELGRAD_SIMT_SCHEDULE: 'ascending', KEELGRAD_SIMT_COPIES: 'late' };
const others: readonly Environment[] = [
  { KEELGRAD_SIMT_SCHEDULE: 'descending', KEELGRAD_SIMT_COPIES: 'early', KEELGRAD_SIMT_CAPABILITY: '90' },
  { KEELGRAD_SIMT_SCHEDULE: 'random:1', KEELGRAD_SIMT_PROCESSORS: '132', KEELGRAD_SIMT_CAPABILITY: '80' },
  { KEELGRAD_SIMT_SCHEDULE: 'random:2', KEELGRAD_SIMT_STREAMS: 'eager' },
  { KEELGRAD_SIMT_SCHEDULE: 'fifo' },
];

let folder = '';
let build = '';
let digests = (_env: Environment): Promise<Digests> => Promise.reject(new Error('nothing is built'));
let expected: Digests = {};

describe.skipIf(missingCompiler)(`schedules of CUDA kernels (${missingCompiler ?? 'SIMT layer'})`, () => {
  beforeAll(async () => {
    build = await simtBuild();
    folder = mkdtempSync(join(root, 'build', 'simt-digests-'));
    const file = await bundleDigests(folder);
    digests = async (env) => {
      // Rights of pages are cases.test.ts's business.
      const fixed = { ...simtEnvironment(build), KEELGRAD_SIMT_PROTECT: '0', KEELGRAD_SIMT_SIZES: 'small,large' };
      const { code, signal, stdout, stderr } = await run(process.execPath, [file], { ...fixed, ...env });
      if (code !== 0) throw new Error(`digests: exit ${code ?? signal}\n${stderr.slice(-4000)}`);
      return JSON.parse(stdout);
    };
    expected = await digests(reference);
  }, BUILD_TIMEOUT);

  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  test('there is something to compare', () => expect(Object.keys(expected).length).toBeGreaterThan(500));

  test.for(others)('equal bits: %o', { timeout: 600_000 }, async (env) => {
    const found = await digests(env);
    const different = Object.keys(expected).filter((name) => found[name] !== expected[name]);
    expect(different, `${different.length} differ`).toEqual([]);
  });
});
