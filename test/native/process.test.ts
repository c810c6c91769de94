// Whole processes: they end cleanly whatever is pending, several worker threads share the addon, and memory that runs out
// or is forgotten comes back.
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { Compiled, type Finished } from '../support/compiled.js';

let compiled: Compiled;
beforeAll(() => {
  compiled = new Compiled();
});
afterAll(() => compiled.dispose());

/** A minute of products, enqueued at once. */
const pending = `
const a = Tensor.from(new Float32Array(1 << 20).fill(0.001), { shape: [1024, 1024] });
let y = a;
for (let i = 0; i < 2000; i++) y = y.matmul(a);
`;

const clean = (code = 0): Partial<Finished> => ({ code, signal: null });

describe('a process ends cleanly', () => {
  test('with work pending that nobody reads', async () => {
    const child = await compiled.run(`${pending}console.log('end');`);
    expect(child).toMatchObject({ ...clean(), stdout: 'end\n', stderr: '' });
  });

  test('by process.exit with work pending', async () => {
    const child = await compiled.run(`${pending}process.exit(3);`);
    expect(child).toMatchObject({ ...clean(3), stderr: '' });
  });

  test('by process.exit with a read pending', async () => {
    const child = await compiled.run(`${pending}void y.data(); setTimeout(() => process.exit(4), 50);`);
    expect(child).toMatchObject({ ...clean(4), stderr: '' });
  });

  test('by an uncaught error with work pending', async () => {
    const child = await compiled.run(`${pending}throw new Error('mine');`);
    expect(child).toMatchObject(clean(1));
    expect(child.stderr).toContain('Error: mine');
  });

  test('after a pending await, not under it', async () => {
    const child = await compiled.run(`
      const t = Tensor.from(new Float32Array(1 << 18).fill(0.001), { shape: [512, 512] });
      const y = t.matmul(t).matmul(t).matmul(t);
      console.log((await y.data()).length);`);
    expect(child).toMatchObject({ ...clean(), stdout: '262144\n', stderr: '' });
  });

  test('with a rejected read that nobody handles, naming the op', async () => {
    const child = await compiled.run(`
      const bad = Tensor.from([[1]]).gatherRows(Tensor.from(Int32Array.of(7)));
      await bad.data();`);
    expect(child).toMatchObject(clean(1));
    expect(child.stderr).toMatch(/\[gatherRows\].*7/);
  });
});

describe('worker threads', () => {
  test('compute side by side, each with its own streams, over one pool of threads', async () => {
    const body = `
      ${compiled.prelude}
      import { parentPort, workerData } from 'node:worker_threads';
      const n = 96;
      const a = Tensor.from(new Float32Array(n * n).fill(workerData), { shape: [n, n] });
      let sum = 0;
      for (let i = 0; i < 200; i++) sum += scope(() => a.matmul(a).sum().item());
      const first = (await a.matmul(a).data())[0];
      a.dispose();
      parentPort.postMessage({ sum, first, storages: memory().storages });`;
    const child = await compiled.run(`
      import { Worker } from 'node:worker_threads';
      const url = new URL('data:text/javascript,' + encodeURIComponent(${JSON.stringify(body)}));
      const run = (workerData) => new Promise((done, fail) => {
        const worker = new Worker(url, { workerData });
        worker.on('message', done).on('error', fail);
      });
      const answers = await Promise.all([1, 2, 3, 4].map(run));
      const own = scope(() => Tensor.from([5, 6]).sum().item());
      console.log(JSON.stringify({ answers, own }));`);
    expect(child).toMatchObject({ ...clean(), stderr: '' });
    const n = 96;
    expect(JSON.parse(child.stdout)).toEqual({
      // matmul without scope left one tensor behind: its result.
      answers: [1, 2, 3, 4].map((v) => ({ sum: 200 * n * n * n * v * v, first: n * v * v, storages: 1 })),
      own: 11,
    });
  });

  test('end with work pending while the process goes on', async () => {
    const body = `
      ${compiled.prelude}
      import { parentPort } from 'node:worker_threads';
      ${pending}
      void y.data();
      parentPort.postMessage('started');`;
    const child = await compiled.run(`
      import { Worker } from 'node:worker_threads';
      const url = new URL('data:text/javascript,' + encodeURIComponent(${JSON.stringify(body)}));
      for (let i = 0; i < 3; i++) {
        const worker = new Worker(url);
        await new Promise((done) => worker.once('message', done));
        await worker.terminate();
      }
      console.log(scope(() => Tensor.from([5, 6]).sum().item()));`);
    expect(child).toMatchObject({ ...clean(), stdout: '11\n', stderr: '' });
  });
});

describe('memory', () => {
  test('that runs out is an error that says what is held; the process goes on', async () => {
    const child = await compiled.run(
      `
      const held = [withTag('weights', () => Tensor.empty([1 << 24]))];
      let message = '';
      try {
        for (let i = 0; i < 1000; i++) held.push(Tensor.empty([1 << 24]));
      } catch (error) {
        message = error.message;
      }
      const count = held.length;
      const before = memory();
      for (let i = 0; i < 2; i++) held.pop().dispose();
      const sum = scope(() => Tensor.from([5, 6]).sum().item());
      const more = scope(() => Tensor.empty([1 << 24]).size);
      for (const t of held) t.dispose();
      const large = scope(() => Tensor.empty([1 << 26]).size);
      const counted = before.storages === count;
      console.log(JSON.stringify({ message, count, counted, sum, more, large, after: memory().storages }));`,
      // Node itself reserves most of this address space.
      { shell: `ulimit -v ${6 * 1024 * 1024}` },
    );
    expect(child).toMatchObject({ ...clean(), stderr: '' });
    const answer = JSON.parse(child.stdout);
    expect(answer).toMatchObject({ counted: true, sum: 11, more: 1 << 24, large: 1 << 26, after: 0 });
    expect(answer.count).toBeGreaterThan(2);
    expect(answer.message).toMatch(
      /out of memory: 64\.0 MiB asked for; held: weights 64\.0.*activations \d+\.\d MiB; try/,
    );
  });

  test('of forgotten tensors comes back with the garbage collector', async () => {
    const child = await compiled.run(
      `
      (() => { for (let i = 0; i < 10; i++) Tensor.empty([1 << 20]).mul(2); })();
      const most = memory().storages;
      for (let i = 0; i < 50 && memory().storages > 0; i++) {
        globalThis.gc();
        await new Promise((done) => setTimeout(done, 10));
      }
      console.log(JSON.stringify({ most, left: memory().storages }));`,
      { node: ['--expose-gc'] },
    );
    expect(child).toMatchObject({ ...clean(), stdout: '{"most":20,"left":0}\n', stderr: '' });
  });

  test('of forgotten tensors weighs on the garbage collector, unasked', async () => {
    const child = await compiled.run(`
      let most = 0;
      for (let i = 0; i < 5000; i++) {
        Tensor.empty([1 << 20]);
        most = Math.max(most, memory().allocated);
        await new Promise((done) => setImmediate(done));
      }
      console.log(most / 2 ** 30);`);
    expect(child).toMatchObject({ ...clean(), stderr: '' });
    // Twenty GiB went through.
    expect(Number(child.stdout)).toBeLessThan(5);
  });
});
