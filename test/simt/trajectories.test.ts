// Training on the CUDA kernels, run by the SIMT layer: SFT, DPO and SPO beside the CPU, and one evaluation of SPO against
// the recorded one.
import { expect, test } from 'vitest';
import { memory, setDefaultDevice } from '../../src/tensor/storage.js';
import { describeOnSimt } from './support.js';

const env = { KEELGRAD_DIRECT_ALLOCATION: '0', KEELGRAD_SIMT_PROTECT: '0' };

describeOnSimt('training on CUDA kernels', env, async () => {
  setDefaultDevice('cuda');
  await import('../objectives/spo.test.js');
  await import('../gpu/trajectories.test.js');
  test('tensors were on the device', () => expect(memory('cuda').peak).toBeGreaterThan(0));
});
