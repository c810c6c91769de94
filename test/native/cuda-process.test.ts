// Whole processes with a GPU, or its imitation (test/simt): they end cleanly with work pending, several worker threads have
// streams of their own, and memory that runs out comes back, also for what kernels need beside their tensors.
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { runtimeInfo } from '../../src/native/info.js';
import { Compiled, type Finished } from '../support/compiled.js';
import { testDevices } from '../support/devices.js';

const able = testDevices().some((device) => device.startsWith('cuda'));

const clean = (code = 0): Partial<Finished> => ({ code, signal: null });

describe.skipIf(!able)('a process with a GPU (needs one: KEELGRAD_TEST_DEVICES=cuda)', () => {
  let compiled: Compiled;
  let prelude: string;
  beforeAll(() => {
    compiled = new Compiled();
    prelude =
      `${compiled.prelude}` +
      `import { setDefaultDevice } from '${compiled.url('tensor/storage.js')}';\nsetDefaultDevice('cuda');\n`;
  });
  afterAll(() => compiled.dispose());

  const run = (script: string, shell?: string): Promise<Finished> =>
    compiled.run(prelude + script, { prelude: false, shell });

  const pending = `
    const a = Tensor.from(new Float32Array(1 << 14).fill(0.001), { shape: [128, 128] });
    let y = a;
    for (let i = 0; i < 500; i++) y = y.matmul(a);`;

  test('ends with work pending that nobody reads', async () => {
    expect(await run(`${pending}console.log('end');`)).toMatchObject({ ...clean(), stdout: 'end\n', stderr: '' });
  });

  test('ends by process.exit with a read pending', async () => {
    const child = await run(`${pending}void y.data(); setTimeout(() => process.exit(4), 20);`);
    expect(child).toMatchObject({ ...clean(4), stderr: '' });
  });

  test('ends after a pending await, not under it', async () => {
    const child = await run(`${pending}console.log((await y.data()).length);`);
    expect(child).toMatchObject({ ...clean(), stdout: '16384\n', stderr: '' });
  });

  test('ends with a rejected read that nobody handles, naming the op', async () => {
    const child = await run(`
      const bad = Tensor.from([[1]]).gatherRows(Tensor.from(Int32Array.of(7)));
      await bad.data();`);
    expect(child).toMatchObject(clean(1));
    expect(child.stderr).toContain('[gatherRows] expected ids[0] in [0, 1), found 7');
  });

  test('computes in worker threads side by side, each with a stream of its own', async () => {
    const body = `
      ${prelude}
      import { parentPort, workerData } from 'node:worker_threads';
      const n = 40;
      const a = Tensor.from(new Float32Array(n * n).fill(workerData), { shape: [n, n] });
      let sum = 0;
      for (let i = 0; i < 10; i++) sum += scope(() => a.matmul(a).sum().item());
      const bad = Tensor.from([[1]]).gatherRows(Tensor.from(Int32Array.of(workerData)));
      const error = await bad.data().catch((e) => e.message);
      a.dispose();
      bad.dispose();
      parentPort.postMessage({ sum, error });`;
    const child = await run(`
      import { Worker } from 'node:worker_threads';
      const url = new URL('data:text/javascript,' + encodeURIComponent(${JSON.stringify(body)}));
      const answers = await Promise.all([1, 2, 3].map((workerData) => new Promise((done, fail) => {
        const worker = new Worker(url, { workerData });
        worker.on('message', done).on('error', fail);
      })));
      const own = scope(() => Tensor.from([5, 6]).sum().item());
      console.log(JSON.stringify({ answers, own }));`);
    expect(child).toMatchObject({ ...clean(), stderr: '' });
    const answers = [1, 2, 3].map((v) => ({
      sum: 10 * 40 ** 3 * v * v,
      error: `[gatherRows] expected ids[0] in [0, 1), found ${v}`,
    }));
    expect(JSON.parse(child.stdout)).toEqual({ answers, own: 11 });
  });

  test('goes on while a worker thread ends with work pending', async () => {
    const body = `${prelude}
      import { parentPort } from 'node:worker_threads';
      ${pending}
      void y.data();
      parentPort.postMessage('started');`;
    const child = await run(`
      import { Worker } from 'node:worker_threads';
      const url = new URL('data:text/javascript,' + encodeURIComponent(${JSON.stringify(body)}));
      for (let i = 0; i < 2; i++) {
        const worker = new Worker(url);
        await new Promise((done) => worker.once('message', done));
        await worker.terminate();
      }
      console.log(scope(() => Tensor.from([5, 6]).sum().item()));`);
    expect(child).toMatchObject({ ...clean(), stdout: '11\n', stderr: '' });
  });

  const simt = 'export KEELGRAD_SIMT_PROTECT=0';

  test('without cuBLAS is told so, at its status and at the first use, and what to do', async ({ skip }) => {
    skip(runtimeInfo().cuda.devices[0].name !== 'SIMT layer', 'needs the SIMT layer');
    const child = await run(
      `
      import { runtimeInfo } from '${compiled.url('native/info.js')}';
      import { resolveDevice } from '${compiled.url('train/setup.js')}';
      const { available, reason, remedy, devices } = runtimeInfo().cuda;
      const attempt = (f) => { try { return f(); } catch (error) { return error.message; } };
      const use = attempt(() => Tensor.from([1]));
      const train = attempt(() => resolveDevice('cuda'));
      console.log(JSON.stringify({ available, reason, remedy, gpus: devices.length, use, train, auto: resolveDevice('auto') }));`,
      `${simt} KEELGRAD_CUBLAS=/nowhere`,
    );
    expect(child).toMatchObject(clean());
    const { reason, remedy, ...answer } = JSON.parse(child.stdout);
    expect(reason).toBe('KEELGRAD_CUBLAS: there is no file or folder /nowhere');
    expect(remedy).toMatch(/^install cuBLAS of CUDA 12 or 13 .* and set KEELGRAD_CUBLAS to the folder/);
    expect(answer).toEqual({
      available: false,
      gpus: 1,
      use: `device cuda:0 is not available: ${reason}; ${remedy}`,
      train: `--device cuda: not available: ${reason}; ${remedy}`,
      auto: 'cpu',
    });
  });

  test('without a GPU that is recent enough is told so', async ({ skip }) => {
    skip(runtimeInfo().cuda.devices[0].name !== 'SIMT layer', 'needs the SIMT layer');
    const child = await run(
      `
      import { runtimeInfo } from '${compiled.url('native/info.js')}';
      import { resolveDevice } from '${compiled.url('train/setup.js')}';
      const { available, reason, remedy, devices } = runtimeInfo().cuda;
      const attempt = (f) => { try { return f(); } catch (error) { return error.message; } };
      const use = attempt(() => Tensor.from([1]));
      const gpus = devices.map((gpu) => gpu.capability);
      console.log(JSON.stringify({ available, reason, remedy, gpus, use, auto: resolveDevice('auto') }));`,
      `${simt} KEELGRAD_SIMT_CAPABILITY=75 KEELGRAD_SIMT_OLD_DEVICES=1`,
    );
    expect(child).toMatchObject(clean());
    const reason = 'old GPU has compute capability 7.5, expected 8.0 (Ampere) or later';
    expect(JSON.parse(child.stdout)).toEqual({
      available: false,
      reason,
      remedy: 'use --device cpu',
      gpus: [75, 75],
      use: `device cuda:0 is not available: ${reason}; use --device cpu`,
      auto: 'cpu',
    });
  });

  test('says what to do where the host has no page-locked memory for a copy', async ({ skip }) => {
    skip(runtimeInfo().cuda.devices[0].name !== 'SIMT layer', 'needs the SIMT layer');
    const child = await run(
      `
      const x = Tensor.empty([1 << 19]).mul(0);
      const error = await x.data().catch((e) => e.message);
      console.log(JSON.stringify({ error, sum: scope(() => Tensor.from([5, 6]).sum().item()) }));`,
      `${simt} KEELGRAD_SIMT_PINNED=1`,
    );
    expect(child).toMatchObject(clean());
    const { error, sum } = JSON.parse(child.stdout);
    expect(error).toMatch(
      /^\[copy to the host\] out of host memory: expected \d\.\d MiB of page-locked memory .*; try to end other processes/,
    );
    expect(sum).toBe(11);
  });

  test('finds memory again, for tensors and for the workspace of products', async ({ skip }) => {
    skip(runtimeInfo().cuda.devices[0].name !== 'SIMT layer', 'needs a GPU of 128 MiB');
    const child = await run(
      `
      import { OutOfMemoryError } from '${compiled.url('tensor/out-of-memory.js')}';
      const tensor = () => Tensor.empty([1 << 21]);
      const errors = [];
      const attempt = (f) => {
        try {
          return f();
        } catch (error) {
          errors.push((error instanceof OutOfMemoryError ? '' : 'no OutOfMemoryError: ') + error.message);
        }
      };
      const held = [withTag('weights', tensor)];
      attempt(() => { for (;;) held.push(tensor()); });
      const full = memory();
      // Eight MiB are free: enough for the operands, not for the 32 MiB that products want.
      held.pop().dispose();
      const product = () => scope(() => {
        const a = Tensor.from(new Float32Array(64).fill(2), { shape: [8, 8] });
        return a.matmul(a).sum().item();
      });
      const readLater = async () => {
        const a = Tensor.from(new Float32Array(64).fill(2), { shape: [8, 8] });
        const y = a.matmul(a);
        await y.data().catch((error) => attempt(() => { throw error; }));
        for (const t of [a, y]) t.dispose();
      };
      attempt(product);
      await readLater();
      attempt(() => scope(() => held[0].exp().exp()));
      while (held.length > 1) held.pop().dispose();
      // All of it is in the cache of the allocator, which gives it back.
      const after = [attempt(product), attempt(() => scope(() => Tensor.empty([1 << 23]).size))];
      console.log(JSON.stringify({ errors, after, held: full.byTag, storages: memory().storages }));`,
      'export KEELGRAD_SIMT_MEMORY=128 KEELGRAD_SIMT_PROTECT=0',
    );
    expect(child).toMatchObject(clean());
    const answer = JSON.parse(child.stdout);
    expect(answer).toMatchObject({ after: [8 * 8 * 32, 1 << 23], storages: 1 });
    expect(answer.held.weights).toBe(8 << 20);
    const held = 'held: weights 8\\.0, gradients 0\\.0, optimizer 0\\.0, cache 0\\.0, activations [\\d.]+ MiB';
    const why = `${held}, by kernels as scratch [\\d.]+, in the cache for reuse [\\d.]+, kept for graphs [\\d.]+; the device has [\\d.]+ of 128\\.0 MiB left; try a smaller batch`;
    const matmul = expect.stringMatching(
      `^\\[matmul\\] out of memory: 32\\.0 MiB asked for as workspace of matrix products; ${why}.*` +
        '\\(float32\\[8,8\\], float32\\[8,8\\], float32\\[8,8\\].*\\)$',
    );
    expect(answer.errors).toEqual([
      expect.stringMatching(`^out of memory: 8\\.0 MiB asked for; ${why}.*\\(for float32 \\[2097152\\] on cuda:0\\)$`),
      matmul,
      matmul,
      expect.stringMatching(
        `^\\[exp\\] out of memory: 8\\.0 MiB asked for; ${why}.*\\(for float32 \\[2097152\\] on cuda:0\\)$`,
      ),
    ]);
  });
});
