// Recorded models and packed batches on the CUDA kernels, run by the SIMT layer.
import { expect, test } from 'vitest';
import { memory, setDefaultDevice } from '../../src/tensor/storage.js';
import { describeOnSimt } from './support.js';

// Thousands of tensors: from the engine's own allocator, and without changing the rights of memory at every wait.
const env = { KEELGRAD_DIRECT_ALLOCATION: '0', KEELGRAD_SIMT_PROTECT: '0' };

describeOnSimt('models on CUDA kernels', env, async () => {
  setDefaultDevice('cuda');
  await import('../models/golden.test.js');
  await import('../models/packing.test.js');
  test('tensors were on the device', () => expect(memory('cuda').peak).toBeGreaterThan(0));
});
