// Memory counters: exact, by tag, with a peak; freed memory is reused and can be given back; exhaustion is survived.
import { expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { scope } from '../../src/tensor/scope.js';
import { memory, memoryTags, resetPeakMemory, Storage, trimMemory, withTag } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';

const mib = 1 << 20;

test('counts storages and bytes by tag', () => {
  const start = memory();
  const made = memoryTags.map((tag, i) => withTag(tag, () => Tensor.empty([i + 1, 256])));
  const now = memory();
  expect(now.storages - start.storages).toBe(5);
  expect(now.allocated - start.allocated).toBe(15 * 1024);
  memoryTags.forEach((tag, i) => {
    expect(now.byTag[tag] - start.byTag[tag]).toBe((i + 1) * 1024);
  });
  for (const t of made) t.dispose();
  expect(memory()).toMatchObject({ storages: start.storages, allocated: start.allocated, byTag: start.byTag });
});

test('a tag ends with its function, exceptions included', () => {
  expect(() =>
    withTag('weights', () => {
      throw new Error('mine');
    }),
  ).toThrow('mine');
  const before = memory().byTag.weights;
  using t = Tensor.empty([8]);
  expect(memory().byTag.weights).toBe(before);
  expect(t.size).toBe(8);
});

test('the peak is the most that was held at once', () => {
  resetPeakMemory();
  const start = memory().allocated;
  expect(memory().peak).toBe(start);
  scope(() => {
    const a = Tensor.empty([mib / 4]);
    a.add(1).dispose();
  });
  expect(memory().peak).toBe(start + 2 * mib);
  expect(memory().allocated).toBe(start);
  resetPeakMemory();
  expect(memory().peak).toBe(start);
});

test('freed memory is reused, and trimming gives it back', () => {
  Tensor.empty([16 * mib]).dispose();
  const { reserved } = memory();
  for (let i = 0; i < 20; i++) Tensor.empty([16 * mib]).dispose();
  expect(memory().reserved).toBe(reserved);
  const returned = trimMemory();
  expect(returned).toBeGreaterThanOrEqual(64 * mib);
  expect(memory().reserved).toBe(reserved - returned);
});

test('a request that cannot be met names what is held, and leaves everything usable', () => {
  const held = withTag('weights', () => Tensor.from(new Float32Array(mib)));
  const before = memory();
  expect(() => Tensor.empty([2 ** 46])).toThrow(/out of memory: \d+\.\d MiB asked for; held: weights [\d.]+.*try/);
  expect(memory()).toMatchObject({ storages: before.storages, allocated: before.allocated });
  const sum = scope(() => held.add(1).sum().item());
  expect(sum).toBe(mib);
  held.dispose();
});

test('versions advance with writes in place', () => {
  using t = Tensor.from([1]);
  const { version } = t.storage;
  t.write([2]);
  expect(t.storage.version).toBe(version + 1);
});

test('a storage of no bytes is a storage', () => {
  const s = Storage.create('cpu', 0);
  expect(s.exclusive).toBe(true);
  s.retain().release();
  expect(s.live).toBe(true);
  s.release();
  expect(s.live).toBe(false);
});

test('a file that is not there is named', () => {
  expect(() => Storage.map('/nowhere/model.bin', 4)).toThrow(/cannot open \/nowhere\/model\.bin: No such file/);
});
