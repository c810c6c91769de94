// The tests of test/gpu that no other file of this folder runs, on the CUDA kernels run by the SIMT layer: rows of every
// width, whole models beside the CPU, two runs with equal bits. Small cases under a checker: scripts/check-gpu-pack.mjs.
import { describeOnSimt } from './support.js';

describeOnSimt('GPU tests', { KEELGRAD_DIRECT_ALLOCATION: '0', KEELGRAD_SIMT_PROTECT: '0' }, async () => {
  await import('../gpu/rows.test.js');
  await import('../gpu/parity.test.js');
  await import('../gpu/determinism.test.js');
});
