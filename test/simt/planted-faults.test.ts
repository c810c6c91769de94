// The SIMT layer must find what it is there to find: each fault of cpp/layer/faults.cc, planted on purpose, with a message
// that says what and where; and the twins of collectives compute what the PTX ISA says.
import { join } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { BUILD_TIMEOUT, type Environment, type Finished, missingCompiler, run, simtBuild } from './support.js';

let folder = '';
const fault = (name: string, env: Environment = {}): Promise<Finished> => run(join(folder, 'simt-faults'), [name], env);

/** Ends the process, with a message. */
const findings: Record<string, RegExp> = {
  'write after a buffer': /out of bounds: .* 0 bytes after the end of allocation 0 of 4096 bytes in .*writeAt, block/,
  'write just after a buffer': /out of bounds: this launch wrote just before or after allocation 0 of 4000 bytes/,
  'write before a buffer': /out of bounds: .* before any allocation in .*writeAt/,
  'write far before a buffer': /out of bounds: .* before any allocation in .*writeAt/,
  'write after dynamic shared memory': /out of bounds: the kernel touched .* past its shared memory in .*sharedWriteAt/,
  'write before dynamic shared memory': /out of bounds: the block wrote outside of its 512 bytes of dynamic shared/,
  'write just after dynamic shared memory': /out of bounds: the block wrote outside of its 516 bytes of dynamic shared/,
  'write after a shared array': /out of bounds: the block wrote past a static shared array of 512 bytes/,
  'use after free': /use after free: .* byte 12 of allocation 0 of 256 bytes, which was freed in .*readAt/,
  'host reads device memory': /host code touched device memory at .*: 20 bytes inside allocation 0 of 256 bytes/,
  'wild pointer': /the kernel touched .*, which is neither device nor shared memory in .*follow/,
  'local arrays too large': /the stack of a CUDA thread is used up: local arrays are too large in .*deepStack/,
  'divergent barrier':
    /divergent barrier: threads 0-63 at the barrier .*faults.cc:\d+; threads 64-127 at the barrier .*faults.cc:\d+ in/,
  'barrier after threads left': /a barrier after threads have left: threads 0-31 gone; thread 32 at the barrier/,
  'unequal numbers of barriers': /a barrier after threads have left: threads 0-63 gone/,
  'warp collective with missing lanes':
    /deadlock: threads 0-15 at the shuffle .*faults.cc:\d+ of warp 0; threads 16-31 gone/,
  'warp collective beside a barrier': /deadlock: threads 0-15 at the shuffle .* threads 16-31 at the barrier/,
  'divergent warp collective': /divergent warp collective: lane 0 is at the shuffle .*, lane 16 is at the shuffle/,
  'misaligned asynchronous copy': /the global end of a 16-byte copy is not 16-byte aligned: .*faults.cc:\d+ in/,
  'misaligned matrix row': /a row of loadMatrix4 is not 16-byte aligned: .*faults.cc:\d+ in/,
  'too much shared memory without opt-in':
    /too much shared memory without opt-in: 512 bytes of static arrays and 48656 dynamic ones, 49152 are the limit/,
  'too much shared memory with opt-in':
    /too much shared memory: 512 bytes of static arrays and 100880 dynamic ones, 101376 are the limit together/,
  "another thread's work in a capture": /work of another thread went into a capture/,
  'too much static shared memory': /too much shared memory: 49168 bytes of static arrays, 49152 are the limit/,
};

/** Answered with CUDA's error, and a remark on what was wrong. */
const errors: Record<string, [error: string, remark: RegExp]> = {
  'host pointer as an argument': [
    'an illegal memory access was encountered',
    /a host pointer, .*, is argument 0 of .*readAt/,
  ],
  'too much dynamic shared memory': [
    'invalid argument',
    /too much shared memory: 102400 bytes for .*fillOnes; .* 101376/,
  ],
  'too much dynamic shared memory without opt-in': [
    'invalid argument',
    /too much shared memory: 49168 bytes for .*fillOnes; it may have 49152, and more by cudaFuncSetAttribute/,
  ],
  'shared memory beyond its opt-in': [
    'invalid argument',
    /too much shared memory: 65552 bytes for .*staticBesideDynamic; it may have 65536/,
  ],
  'too many threads': ['invalid configuration argument', /bad launch size: blocks of \(1056, 1, 1\) threads/],
  'threads that are no whole warps': ['invalid configuration argument', /bad launch size: blocks of \(100, 1, 1\)/],
  'an empty grid': ['invalid configuration argument', /bad launch size: a grid of \(0, 1, 1\) blocks/],
  'a grid too high': ['invalid configuration argument', /bad launch size: a grid of \(1, 65536, 1\) blocks/],
  'a copy beyond a buffer': ['invalid argument', /out of bounds: the target of a copy of 1024 bytes .* of 256 bytes/],
  'a copy of the wrong kind': ['invalid argument', /a copy of kind 2 from host to device memory/],
  'memory freed twice': ['invalid argument', /cudaFree of .*, which is no allocation/],
  'out of memory': ['out of memory', /^$/],
};

/** Shows in values: the first of each pair is sound, the others are not. */
const wrongValues = [
  ['download awaited', 'download not awaited'],
  ["upload's source kept", "upload's source overwritten"],
  ['streams joined by an event', 'streams not joined'],
  [undefined, 'unwritten device memory', 'unwritten shared memory'],
  ['all the shared memory without opt-in'],
  ['all the shared memory with opt-in'],
] as const;

/** Shows between schedules: the first is sound, the others differ. */
const races = [
  ['barriers in place', 'missing barrier after a write', 'missing barrier before reuse'],
  ['warp barrier in place', 'missing warp barrier'],
  ['asynchronous copies awaited', 'asynchronous copy not awaited', 'asynchronous copy without a barrier'],
  ['atomic sum of blocks', 'race between blocks'],
] as const;

const schedules: readonly Environment[] = [
  { KEELGRAD_SIMT_SCHEDULE: 'ascending', KEELGRAD_SIMT_COPIES: 'late' },
  { KEELGRAD_SIMT_SCHEDULE: 'ascending', KEELGRAD_SIMT_COPIES: 'early' },
  { KEELGRAD_SIMT_SCHEDULE: 'descending' },
  { KEELGRAD_SIMT_SCHEDULE: 'fifo' },
  { KEELGRAD_SIMT_SCHEDULE: 'random:1' },
];

async function results(name: string): Promise<Set<string>> {
  const all = await Promise.all(schedules.map((env) => fault(name, env)));
  for (const { stdout, stderr } of all) expect(`${stdout}${stderr}`).toMatch(/^result [0-9a-f]+\n$/);
  return new Set(all.map(({ stdout }) => stdout));
}

describe.skipIf(missingCompiler)(`the SIMT layer (${missingCompiler ?? 'built'})`, () => {
  beforeAll(async () => {
    folder = await simtBuild();
  }, BUILD_TIMEOUT);

  test.for(Object.entries(findings))('finds: %s', async ([name, message]) => {
    const { signal, stderr } = await fault(name);
    expect(stderr).toMatch(message);
    expect(signal).toBe('SIGABRT');
  });

  test.for(Object.entries(errors))('refuses: %s', async ([name, [error, remark]]) => {
    const { code, stdout, stderr } = await fault(name, { KEELGRAD_SIMT_MEMORY: '256' });
    expect(stdout).toContain(`CUDA: ${error} in`);
    expect(stderr).toMatch(remark);
    expect(code).toBe(3);
  });

  test.for(wrongValues)('gives wrong values where it must: %s', async ([sound, ...faulty]) => {
    if (sound) expect(await fault(sound)).toMatchObject({ code: 0, stdout: 'right\n', stderr: '' });
    for (const name of faulty) expect(await fault(name)).toMatchObject({ code: 0, stdout: 'wrong\n', stderr: '' });
  });

  test.for(races)('gives other values in other schedules: %s', async ([sound, ...faulty]) => {
    expect((await results(sound)).size).toBe(1);
    for (const name of faulty) expect((await results(name)).size).toBeGreaterThan(1);
  });

  test('every planted fault is looked for', async () => {
    const { stdout } = await fault('');
    const known = [...Object.keys(findings), ...Object.keys(errors), ...wrongValues.flat(), ...races.flat()];
    expect(stdout.trim().split('\n').sort()).toEqual(known.filter((name) => name !== undefined).sort());
  });

  test.for(schedules)('twins compute what they should: %o', async (env) => {
    expect(await run(join(folder, 'simt-collectives'), [], env)).toMatchObject({
      code: 0,
      stdout: 'right\n',
      stderr: '',
    });
  });
});
