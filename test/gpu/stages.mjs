// What a GPU run consists of: stages of test files, the same files that run everywhere. Data alone; runner/main.ts runs it.
// `files` are globs of sources; `except` takes some out, which need sources or a compiler, a second instruction
// set or no device.

/**
 * @typedef {object} Stage
 * @property {string} name
 * @property {string} about what a reader of the results learns from it
 * @property {string[]} files
 * @property {string[]} [except]
 * @property {string[]} [skip] names of tests that speak of the CPU in what they expect
 * @property {Record<string, string>} [env] for the processes of this stage
 * @property {boolean} [alone] one file at a time: it wants the memory, or it is slow enough
 * @property {string} [sanitizer] the tool of compute-sanitizer under which the files run
 * @property {number} [parts] processes that share a file's cases (KEELGRAD_TEST_PART)
 * @property {number} timeout seconds that a file, or a part of it, may take
 */

const sanitized = (/** @type {string} */ tool) => ({
  name: tool,
  about: `small op cases under compute-sanitizer --tool ${tool}`,
  files: ['test/gpu/small-cases.test.ts'],
  // Each tensor is an allocation of its own: in an arena an overrun would hit a neighbour unseen.
  env: { KEELGRAD_DIRECT_ALLOCATION: '1' },
  alone: true,
  sanitizer: tool,
  // Some 50 cases a process: it ends well before its time, and what a deadline cuts off is a part and not everything.
  parts: 8,
  timeout: 900,
});

/** @type {Stage[]} */
export const stages = [
  {
    name: 'ops',
    about: 'every op: float64 definitions, gradients, guard zones, rows among neighbours, equal bits',
    files: ['test/ops/*.test.ts'],
    except: [
      'test/ops/cases-avx2.test.ts',
      'test/ops/cases-base.test.ts',
      'test/ops/completeness.test.ts',
      'test/ops/methods.test.ts',
    ],
    timeout: 900,
  },
  {
    name: 'autograd',
    about: 'derivatives, checkpoints, sinks, LoRA layers, optimizers',
    files: ['test/autograd/*.test.ts', 'test/nn/*.test.ts', 'test/optim/*.test.ts'],
    skip: [
      'inputs in less than float64 are refused',
      'integer inputs take part and get zeros',
      'a result that is not one element is refused',
      'a saved tensor that was written since is an error',
    ],
    timeout: 300,
  },
  {
    name: 'runtime',
    about: 'tensors, scopes, memory counters, faults that surface at the next read',
    files: ['test/tensor/*.test.ts', 'test/native/*.test.ts'],
    except: [
      'test/tensor/tensor.test.ts', // its messages say cpu
      'test/native/process.test.ts',
      'test/native/isa.test.ts',
      'test/native/cublas-prototypes.test.ts',
      'test/native/cuda-drivers.test.ts',
    ],
    timeout: 300,
  },
  {
    name: 'models',
    about: 'logits, log-probabilities and every gradient of recorded models; the GPU beside the CPU',
    files: [
      'test/models/*.test.ts',
      'test/io/model-folder.test.ts',
      'test/io/adapter.test.ts',
      'test/gpu/parity.test.ts',
    ],
    timeout: 600,
  },
  {
    name: 'objectives',
    about: 'recorded losses, rewards and gradients; one evaluation of SPO',
    files: ['test/objectives/*.test.ts'],
    timeout: 600,
  },
  {
    name: 'training',
    about: 'recorded trajectories of SFT, DPO and SPO, step by step; the GPU beside the CPU',
    files: ['test/train/*.test.ts', 'test/gpu/trajectories.test.ts'],
    except: ['test/train/losses-page.test.ts'],
    timeout: 900,
  },
  { name: 'determinism', about: 'two runs, equal bits', files: ['test/gpu/determinism.test.ts'], timeout: 300 },
  {
    name: 'memory',
    about: 'out of memory and on from there; 2,000 steps without a leak',
    files: ['test/gpu/out-of-memory.test.ts', 'test/gpu/leak.test.ts'],
    alone: true,
    timeout: 900,
  },
  sanitized('memcheck'),
  sanitized('racecheck'),
];
