// The runtime of a CUDA device on the SIMT layer: faults and their reach, the ring, copies in parts, processes and worker
// threads, captured functions, memory that runs out, steps without a leak.
import { describeOnSimt } from './support.js';

// Memory that a run can use up; sharing allocations, as on a GPU.
const env = {
  KEELGRAD_DIRECT_ALLOCATION: '0',
  KEELGRAD_SIMT_MEMORY: '512',
  KEELGRAD_SIMT_PROTECT: '0',
  KEELGRAD_TEST_STEPS: '10',
};

describeOnSimt('runtime of a CUDA device', env, async () => {
  await import('../native/executor.test.js');
  await import('../native/graph.test.js');
  await import('../native/cuda-status.test.js');
  await import('../native/cuda-transfer.test.js');
  await import('../native/cuda-process.test.js');
  await import('../native/cuda-command.test.js');
  await import('../ops/errors.test.js');
  await import('../gpu/out-of-memory.test.js');
  await import('../gpu/leak.test.js');
});
