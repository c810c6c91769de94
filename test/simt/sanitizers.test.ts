// Small op cases on the CUDA kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer with
// one of its threads for each CUDA thread: a race detector. A run under node is recorded and replayed by a program that is
// instrumented from end to end.
import { mkdtempSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { bundleDigests } from './bundle.js';
import {
  BUILD_TIMEOUT,
  type Finished,
  missingCompiler,
  root,
  run,
  type Sanitizer,
  simtBuild,
  simtEnvironment,
} from './support.js';

let folder = '';
let trace = '';

/** The cases' names before the first report, and the report. */
function report({ code, signal, stdout, stderr }: Finished): string {
  const lines = stderr.split('\n');
  const at = lines.findIndex((line) => /WARNING: |ERROR: |runtime error: |^simt: |^failed: /.test(line));
  const label = lines.slice(0, Math.max(at, 0)).findLast((line) => line.startsWith('case: '));
  return [`exit ${code ?? signal}: ${stdout.trim()}`, label, ...lines.slice(Math.max(at, 0), at + 30)].join('\n');
}

/** Which cases: the race detector is slow, and float64 runs the same code as float32. */
const labels: Readonly<Record<Sanitizer, string>> = {
  '': '',
  'address,undefined': '',
  thread: '(float32|bfloat16)$',
};

const options = {
  ASAN_OPTIONS: 'detect_leaks=0:abort_on_error=1',
  UBSAN_OPTIONS: 'print_stacktrace=1',
  TSAN_OPTIONS: 'halt_on_error=1',
  KEELGRAD_SIMT_PROTECT: '0',
};

async function record(): Promise<void> {
  const build = await simtBuild();
  folder = mkdtempSync(join(root, 'build', 'simt-trace-'));
  trace = join(folder, 'trace');
  const environment = simtEnvironment(build);
  const result = await run(process.execPath, [await bundleDigests(folder)], {
    ...environment,
    KEELGRAD_ADDON: join(import.meta.dirname, 'recorder.cjs'),
    KEELGRAD_SIMT_RECORDED: environment.KEELGRAD_ADDON,
    KEELGRAD_SIMT_TRACE: trace,
    KEELGRAD_SIMT_SIZES: 'small',
  });
  if (result.code !== 0) throw new Error(report(result));
}

describe.skipIf(missingCompiler)(`sanitizers on CUDA kernels (${missingCompiler ?? 'SIMT layer'})`, () => {
  beforeAll(record, BUILD_TIMEOUT);
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  describe.for<Sanitizer>(['address,undefined', 'thread'])('%s', (sanitizer) => {
    let build = '';
    beforeAll(async () => {
      build = await simtBuild(sanitizer);
    }, BUILD_TIMEOUT);

    test('every small op case', { timeout: 900_000 }, async () => {
      const env = { ...options, KEELGRAD_CUBLAS: build, KEELGRAD_DIRECT_ALLOCATION: '1' };
      const result = await run(join(build, 'simt-replay'), [trace, labels[sanitizer]], env);
      if (result.code !== 0) throw new Error(report(result));
      const [, cases, answers, different] = /^(\d+) cases, (\d+) answers, 0 failed, (\d+) with/.exec(result.stdout)!;
      expect(Number(cases)).toBeGreaterThan(400);
      expect(Number(different)).toBeLessThan(0.01 * Number(answers));
    });

    test('the layer itself', async () => {
      expect(await run(join(build, 'simt-collectives'), [], options)).toMatchObject({ code: 0, stdout: 'right\n' });
    });

    const faults: Record<Sanitizer, [fault: string, message: RegExp][]> = {
      '': [],
      'address,undefined': [
        ['write just after a buffer', /AddressSanitizer: use-after-poison/],
        ['write after a shared array', /runtime error: index 128 out of bounds for type/],
        ['write just after dynamic shared memory', /AddressSanitizer: use-after-poison/],
      ],
      thread: [
        ['missing barrier after a write', /WARNING: ThreadSanitizer: data race/],
        ['missing barrier before reuse', /WARNING: ThreadSanitizer: data race/],
        ['missing warp barrier', /WARNING: ThreadSanitizer: data race/],
        ['asynchronous copy without a barrier', /WARNING: ThreadSanitizer: data race/],
        ['race between blocks', /WARNING: ThreadSanitizer: data race/],
      ],
    };
    test.for(faults[sanitizer])('finds: %s', async ([fault, message]) => {
      const { code, stderr } = await run(join(build, 'simt-faults'), [fault], options);
      expect(stderr).toMatch(message);
      expect(code).not.toBe(0);
    });
  });
});
