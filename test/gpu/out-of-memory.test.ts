// A GPU without memory left: the error says what was asked for and who holds the rest, and the process goes on after it.
import { afterEach, describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { grad } from '../../src/autograd/transforms.js';
import { captureGraph } from '../../src/native/graph.js';
import { full } from '../../src/ops/movement.js';
import { OutOfMemoryError } from '../../src/tensor/out-of-memory.js';
import { scope } from '../../src/tensor/scope.js';
import { memory, synchronize, trimMemory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { fixturePairs, temporaryFolder, train } from '../train/support.js';
import { gpu, makeAlignedModel, needsGpu } from './device.js';

const mib = 1 << 18; // float32 elements

describe.skipIf(!gpu)(`out of memory (${gpu ?? needsGpu})`, () => {
  const folder = temporaryFolder();
  const held: Tensor[] = [];

  afterEach(() => {
    for (const t of held.splice(0)) t.dispose();
    trimMemory(gpu!);
  });

  const hold = (elements: number): Tensor => Tensor.empty([elements], { device: gpu! });

  /** Takes memory in ever smaller pieces until none of `least` MiB is left; the last error. */
  function fill(least: number): Error {
    let last = new Error('nothing failed');
    for (let size = 4096; size >= least; size /= 4)
      for (;;) {
        try {
          held.push(hold(size * mib));
        } catch (error) {
          last = error as Error;
          break;
        }
      }
    return last;
  }

  /** A sum on the device, as a check that it works. */
  const works = (): number =>
    scope(() => {
      const x = Tensor.from(Float32Array.of(1, 2, 3), { device: gpu! });
      return x.mul(x).sum().item();
    });

  test('says what was asked for and what is held, and goes on', () => {
    const before = memory(gpu!).storages;
    const { message } = fill(1);
    expect(message).toMatch(/^out of memory: [\d.]+ MiB asked for; held: weights/);
    expect(message).toMatch(
      /by kernels as scratch [\d.]+, in the cache for reuse [\d.]+, kept for graphs [\d.]+; the device has/,
    );
    expect(message).toContain('try');
    for (const t of held.splice(0)) t.dispose();
    expect(memory(gpu!).storages).toBe(before);
    expect(works()).toBe(14);
  });

  test('an op that finds no memory is named, and nothing is lost', () => {
    const x = full([16 * mib], 2, { device: gpu! });
    held.push(x);
    fill(4);
    const { storages, allocated } = memory(gpu!);
    const failing = () => scope(() => x.mul(x).dataSync());
    expect(failing).toThrow(OutOfMemoryError);
    expect(failing).toThrow(/^\[mul\] out of memory: 16\.0 MiB asked for.*\(for float32 \[4194304\] on cuda:0\)$/);
    synchronize(gpu!);
    expect(memory(gpu!)).toMatchObject({ storages, allocated });
    using first = x.view([3], [1]);
    expect(first.dataSync()).toEqual(Float32Array.of(2, 2, 2));
  });

  test('an op whose backward pass finds no memory is named, and nothing is lost', () => {
    const x = full([16 * mib], 2, { device: gpu! });
    held.push(x);
    scope(() => x.sum().item()); // its scratch memory
    const room = hold(16 * mib);
    fill(1);
    room.dispose(); // for the value, and for nothing more
    const { storages, allocated } = memory(gpu!);
    const failing = () => scope(() => grad((t: Tensor) => t.mul(t).sum())(x));
    expect(failing).toThrow(OutOfMemoryError);
    expect(failing).toThrow(
      /^\[backward of \w+\] out of memory: [\d.]+ MiB asked for.*\(for float32 \[\d+\] on cuda:0\)$/,
    );
    synchronize(gpu!);
    expect(memory(gpu!)).toMatchObject({ storages, allocated });
    expect(works()).toBe(14);
  });

  test('a capture that finds no memory leaves nothing behind, and one that was made goes on', () => {
    const x = full([4 * mib], 2, { device: gpu! });
    held.push(x);
    using graph = captureGraph(() => scope(() => x.mul(3).sum()), { device: gpu! });
    fill(4);
    const { storages, allocated } = memory(gpu!);
    const f = () => scope(() => x.mul(x).add(x));
    expect(() => captureGraph(f, { device: gpu! })).toThrow(/^\[mul\] out of memory.*kept for graphs [1-9]/);
    expect(memory(gpu!)).toMatchObject({ storages, allocated });
    graph.replay();
    expect(graph.result.item()).toBe(6 * 4 * mib);
    for (const t of held.splice(1)) t.dispose();
    using again = captureGraph(f, { device: gpu! });
    again.replay();
    using first = again.result.view([2], [1]);
    expect([...first.dataSync()]).toEqual([6, 6]);
  });

  test('a graph goes on after its scratch memory was lost to a kernel that found too little', () => {
    const x = full([16 * mib], 1, { device: gpu! });
    held.push(x);
    using graph = captureGraph(() => scope(() => x.sum()), { device: gpu! });
    graph.replay();
    fill(1);
    // What each of its columns adds up needs scratch memory of a size that is not there.
    const columns = (): unknown =>
      scope(() =>
        x
          .reshape([-1, 4096])
          .mul(1)
          .sum({ axes: [0] })
          .dataSync(),
      );
    expect(columns).toThrow(OutOfMemoryError);
    synchronize(gpu!);
    graph.replay();
    expect(graph.result.item()).toBe(16 * mib);
  });

  test('a run that finds no memory ends with the error, and the next one trains', async () => {
    const model = await makeAlignedModel(folder.path('model'));
    const data = folder.write('pairs.json', fixturePairs(8));
    const options = { model, data, device: 'cuda', 'max-steps': 2, 'batch-size': 4 };
    const before = memory(gpu!).storages;
    fill(1);
    await expect(train('dpo', options)).rejects.toThrow(OutOfMemoryError);
    for (const t of held.splice(0)) t.dispose();
    expect(memory(gpu!).storages).toBe(before);
    expect((await train('dpo', options)).metrics).toHaveLength(2);
    expect(memory(gpu!).storages).toBe(before);
  });
});
