// Rows on the CUDA kernels, run by the SIMT layer: they do not depend on their neighbours, faults in them are found and
// kept apart. And the programs that compare matrix products, the vocabulary head and scattered rows with the CPU.
import { join } from 'node:path';
import { beforeAll, expect, test } from 'vitest';
import { BUILD_TIMEOUT, describeOnSimt, run, simtBuild } from './support.js';

describeOnSimt('rows on a CUDA device', { KEELGRAD_DIRECT_ALLOCATION: '0', KEELGRAD_SIMT_PROTECT: '0' }, async () => {
  await import('../ops/determinism.test.js');
  await import('../ops/neighbours.test.js');
  await import('../ops/sequence-gradient.test.js');
  await import('../gpu/rows.test.js');

  let folder = '';
  beforeAll(async () => {
    folder = await simtBuild();
  }, BUILD_TIMEOUT);

  test.for(['products', 'head', 'scatter'])('the program %s, in two schedules', async (name) => {
    const env = { KEELGRAD_SIMT_MEMORY: '1024', KEELGRAD_SIMT_PROTECT: '0' };
    const all = ['ascending', 'random:3'].map((schedule) =>
      run(join(folder, `simt-${name}`), [], { ...env, KEELGRAD_SIMT_SCHEDULE: schedule }),
    );
    const [one, two] = await Promise.all(all);
    expect(one.stdout + one.stderr).toMatch(/^\d+ checks, 0 failed, digest [0-9a-f]+\n$/);
    expect(two.stdout).toBe(one.stdout);
  });
});
