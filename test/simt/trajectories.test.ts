// Recorded training runs, SPO's among them, on the CUDA kernels, run by the SIMT layer.
import { setDefaultDevice } from '../../src/tensor/storage.js';
import { describeOnSimt } from './support.js';

const env = { KEELGRAD_DIRECT_ALLOCATION: '0', KEELGRAD_SIMT_PROTECT: '0' };

describeOnSimt('training on CUDA kernels', env, async () => {
  setDefaultDevice('cuda');
  await import('../train/golden-trajectories.test.js');
});
