// Training on the CUDA kernels, run by the SIMT layer: SFT, DPO and SPO beside the CPU, steps that wait for nothing and end in
// replayed graphs, and one evaluation of SPO against the recorded one.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { memory, setDefaultDevice } from '../../src/tensor/storage.js';
import { describeOnSimt } from './support.js';

const folder = mkdtempSync(join(tmpdir(), 'keelgrad-waits-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const env = {
  KEELGRAD_DIRECT_ALLOCATION: '0',
  KEELGRAD_SIMT_PROTECT: '0',
  KEELGRAD_SIMT_WAITS: join(folder, 'waits'),
};

describeOnSimt('training on CUDA kernels', env, async () => {
  setDefaultDevice('cuda');
  await import('../objectives/spo.test.js');
  await import('../gpu/trajectories.test.js');
  await import('../train/enqueued.test.js');
  await import('../train/update.test.js');
  test('tensors were on the device', () => expect(memory('cuda').peak).toBeGreaterThan(0));
});
