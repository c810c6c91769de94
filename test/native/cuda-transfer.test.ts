// Between devices: tensors that move, models that are loaded straight to a GPU, long copies in parts, uploads that take
// their turn, a fault that moves along. On a GPU, or its imitation (test/simt).
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { grad } from '../../src/autograd/transforms.js';
import { readSafetensorsHeader } from '../../src/io/safetensors.js';
import { writeSafetensors } from '../../src/io/safetensors-write.js';
import { tensorSource, WeightReader } from '../../src/io/weights.js';
import { to } from '../../src/ops/movement.js';
import { scope } from '../../src/tensor/scope.js';
import { memory, synchronize } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { testDevices } from '../support/devices.js';

const device = testDevices().find((name) => name.startsWith('cuda'));

describe.skipIf(!device)('between devices (needs a GPU: KEELGRAD_TEST_DEVICES=cuda)', () => {
  const there = device!;
  let before: number[];
  const counts = (): number[] => [memory('cpu').storages, memory(there).storages];
  beforeEach(() => {
    before = counts();
  });
  afterEach(() => expect(counts()).toEqual(before));

  const numbers = (count: number): Float32Array => Float32Array.from({ length: count }, (_, i) => (i % 255) - 127);

  test('a tensor goes there and back, views and dtypes too', async () => {
    const back = scope(() => {
      const x = Tensor.from([
        [1, 2, 3],
        [4, 5, 6],
      ]);
      const moved = to(x.transpose(), { device: there, dtype: 'bfloat16' });
      expect([moved.device, moved.dtype, moved.shape]).toEqual(['cuda:0', 'bfloat16', [3, 2]]);
      return to(moved.mul(2), { device: 'cpu', dtype: 'float32' });
    });
    expect([...(await back.data())]).toEqual([2, 8, 4, 10, 6, 12]);
    back.dispose();
  });

  test('nothing waits for it: a chain over both devices', () => {
    scope(() => {
      let x = Tensor.from(numbers(5000));
      for (let i = 0; i < 4; i++) x = to(to(x, { device: there }).mul(2), { device: 'cpu' }).add(1);
      expect([...x.dataSync()]).toEqual([...numbers(5000)].map((v) => 16 * v + 15));
      expect(to(to(Tensor.from([]), { device: there }), { device: 'cpu' }).dataSync()).toHaveLength(0);
    });
  });

  test('a fault moves along, under the name of its op', () => {
    scope(() => {
      const x = Tensor.from([[1], [2]], { device: there });
      const bad = to(x.gatherRows(Tensor.from(Int32Array.of(5), { device: there })), { device: 'cpu' });
      expect(() => bad.add(1).dataSync()).toThrow('[gatherRows] expected ids[0] in [0, 2), found 5');
      expect([...x.dataSync()]).toEqual([1, 2]);
    });
  });

  test('a differentiated tensor does not', () => {
    scope(() => {
      const x = Tensor.from([1, 2], { device: 'cpu' });
      expect(() => grad((t: Tensor) => to(t, { device: there }).sum())(x)).toThrow('[to]');
    });
  });

  test('long copies pass in parts, and what is written meanwhile waits', async () => {
    const count = 2_200_000; // four parts: a block of pinned memory has 4 MiB
    const values = numbers(count);
    const [x, y] = scope(() => {
      const t = Tensor.from(values, { device: there });
      return [t, t.add(1)];
    });
    const reads = [x.data(), y.data()];
    x.write(new Float32Array(count));
    x.dispose();
    const [first, second] = await Promise.all(reads);
    y.dispose();
    expect(first).toEqual(values);
    expect(second.every((v, i) => v === values[i] + 1)).toBe(true);
  });

  test('uploads of every length land where they belong', () => {
    scope(() => {
      const x = Tensor.from(new Float32Array(4000), { device: there });
      for (const [at, length] of [
        [0, 1],
        [7, 1000],
        [1500, 1030],
      ]) {
        x.view([length], [1], 4 * at).write(numbers(length).map((v) => v + at));
        expect([...x.view([length], [1], 4 * at).dataSync()]).toEqual([...numbers(length)].map((v) => v + at));
      }
      expect([x.dataSync()[3999], x.dataSync()[2], x.dataSync()[1499]]).toEqual([0, 0, 0]);
    });
  });

  test('weights are read from the file, and cast there', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'keelgrad-weights-'));
    const file = join(folder, 'model.safetensors');
    using weights = Tensor.from(numbers(3000), { shape: [3, 1000] });
    using half = weights.detach();
    using none = weights.view([0, 4], [4, 1]);
    await writeSafetensors(file, [
      tensorSource('a', weights, 'float32'),
      tensorSource('b', half, 'bfloat16'),
      tensorSource('none', none, 'float32'),
    ]);
    const { tensors } = await readSafetensorsHeader(file);
    const reader = new WeightReader();
    const read = ['a', 'b', 'none'].map((name) => reader.read(tensors.get(name)!, 'float32', there));
    reader.dispose(); // before anything has arrived
    expect(read.map((t) => [t.device, t.dtype])).toEqual(read.map(() => ['cuda:0', 'float32']));
    for (const t of read.slice(0, 2)) expect(await t.data()).toEqual(numbers(3000));
    expect(read[2].shape).toEqual([0, 4]);
    for (const t of read) t.dispose();
    rmSync(folder, { recursive: true });
  });

  test('a short read is not held up by what is enqueued after it', async () => {
    const x = Tensor.from([3], { device: there });
    const order: number[] = [];
    const reads = [0, 1, 2].map((i) => x.data().then(() => order.push(i)));
    synchronize(there);
    await Promise.all(reads);
    expect(order).toEqual([0, 1, 2]);
    x.dispose();
  });
});
