// The Tensor: how it is made, read, viewed, shared and let go of.
import { describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import type { DType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';

describe('making', () => {
  test('nested numbers are float32, typed arrays keep their type', () => {
    scope(() => {
      expect(String(Tensor.from([[1, 2, 3]]))).toBe('f32[1,3]@cpu');
      expect(String(Tensor.from(5))).toBe('f32[]@cpu');
      expect(Tensor.from(Float64Array.of(1)).dtype).toBe('float64');
      expect(Tensor.from(Int32Array.of(1, 2), { shape: [2, 1] }).shape).toEqual([2, 1]);
      expect(Tensor.from(Uint8Array.of(7)).dtype).toBe('uint8');
      expect(Tensor.from([], { dtype: 'int32' }).shape).toEqual([0]);
    });
  });

  test.each([
    ['float32', [1.5, -2, 0], [1.5, -2, 0]],
    ['float64', [1.1, -2, 0], [1.1, -2, 0]],
    ['bfloat16', [1.00390625, 1.01171875, -3.1], [1, 1.015625, -3.09375]],
    ['float16', [1.00048828125, 65519, 2 ** -24], [1, 65504, 2 ** -24]],
    ['int32', [3, -7, 0], [3, -7, 0]],
    ['uint8', [3, 255, 0], [3, 255, 0]],
    ['bool', [3, 0, -1], [1, 0, 1]],
  ] as [DType, number[], number[]][])('%s rounds to nearest even and comes back', async (dtype, values, expected) => {
    using t = Tensor.from(values, { dtype });
    expect([...(await t.data())]).toEqual(expected);
    expect([...t.dataSync()]).toEqual(expected);
  });

  test('what does not fit is refused', () => {
    expect(() => Tensor.from([[1, 2], [3]])).toThrow('[Tensor.from] expected a rectangular array of shape [2,2]');
    expect(() => Tensor.from([[1], 2] as never)).toThrow('rectangular');
    expect(() => Tensor.from(['a'] as never)).toThrow('expected numbers at depth 1, found string');
    expect(() => Tensor.from(Float32Array.of(1, 2), { shape: [3] })).toThrow(
      'expected 3 values for shape [3], found 2',
    );
    expect(() => Tensor.from(new BigInt64Array(1) as never)).toThrow('found BigInt64Array');
    expect(() => Tensor.empty([2, -1])).toThrow('expected non-negative integers as shape, found [2,-1]');
    expect(() => Tensor.empty([1.5])).toThrow('[1.5]');
    expect(() => Tensor.empty([1], { dtype: 'float8' as never })).toThrow('expected a dtype out of float32, float64');
    expect(() => Tensor.empty([2 ** 31, 2 ** 31])).toThrow('expected a size that can be addressed');
  });
});

test('integers refuse numbers and means that they would cut off', () => {
  using x = Tensor.from([3, 4], { dtype: 'int32' });
  expect(() => x.mul(1.5)).toThrow(
    '[mul] expected an int32 number beside i32[2]@cpu, found 1.5; cast the tensor first',
  );
  expect(() => x.add(2 ** 31)).toThrow('found 2147483648');
  expect(() => x.mean()).toThrow('[mean] expected a floating dtype, found i32[2]@cpu; cast it first');
  using y = x.mul(-2);
  expect([...y.dataSync()]).toEqual([-6, -8]);
});

describe('reading and writing', () => {
  test('views are read row by row', async () => {
    using x = Tensor.from([
      [1, 2, 3],
      [4, 5, 6],
    ]);
    using t = x.transpose();
    expect([...t.dataSync()]).toEqual([1, 4, 2, 5, 3, 6]);
    await expect(t.bytes()).rejects.toThrow('[bytes] expected a contiguous tensor');
    expect(() => t.write([1, 2, 3, 4, 5, 6])).toThrow('[write] expected a contiguous tensor');
  });

  test('a write changes every tensor over the storage', () => {
    using x = Tensor.from([1, 2, 3, 4]);
    using part = x.slice(0, 1, 3);
    part.write([20, 30]);
    expect([...x.dataSync()]).toEqual([1, 20, 30, 4]);
    expect(() => x.write([1])).toThrow('[write] expected 4 values for f32[4]@cpu, found 1');
  });

  test('item is for one element', () => {
    using x = Tensor.from([[3]]);
    expect(x.item()).toBe(3);
    using two = Tensor.from([3, 4]);
    expect(() => two.item()).toThrow('[item] expected one element, found f32[2]@cpu');
  });

  test('bytes are raw', async () => {
    using x = Tensor.from([1], { dtype: 'bfloat16' });
    expect([...(await x.bytes())]).toEqual([0x80, 0x3f]);
    using none = Tensor.empty([0, 3]);
    expect((await none.bytes()).length).toBe(0);
    expect((await none.data()).length).toBe(0);
    expect(none.dataSync().length).toBe(0);
  });

  test('the promise of data keeps its answer when the tensor is disposed of meanwhile', async () => {
    const x = Tensor.from([1, 2, 3]);
    const y = x.mul(2);
    const answer = y.data();
    y.dispose();
    x.dispose();
    using other = Tensor.from([7, 7, 7]);
    expect([...(await answer)]).toEqual([2, 4, 6]);
    expect(other.dataSync()[0]).toBe(7);
  });
});

describe('ownership', () => {
  test('a storage lives as long as one tensor over it', () => {
    const before = memory().storages;
    const x = Tensor.from([1, 2]);
    const alias = x.alias();
    const view = x.slice(0, 1, 2);
    expect(memory().storages).toBe(before + 1);
    x.dispose();
    x.dispose();
    expect(x.disposed).toBe(true);
    expect([...alias.dataSync()]).toEqual([1, 2]);
    alias.dispose();
    expect(view.item()).toBe(2);
    view.dispose();
    expect(memory().storages).toBe(before);
  });

  test('using disposes of at the end of the block, errors included', () => {
    const before = memory().storages;
    const block = (): void => {
      using x = Tensor.from([1]);
      throw new Error(`${x.item()}`);
    };
    expect(block).toThrow('1');
    expect(memory().storages).toBe(before);
  });

  test.each([
    ['add', (x: Tensor) => x.add(1)],
    ['alias', (x: Tensor) => x.alias()],
    ['view', (x: Tensor) => x.view([1], [1])],
    ['data', (x: Tensor) => x.dataSync()],
    ['write', (x: Tensor) => x.write([1])],
  ])('%s of a disposed tensor is an error that names the tensor', (op, use) => {
    const x = Tensor.from([1]);
    x.dispose();
    expect(() => use(x)).toThrow(`[${op}] a tensor f32[1]@cpu was used after it was disposed of`);
  });

  test('data and bytes of a disposed tensor reject', async () => {
    const x = Tensor.from([1]);
    x.dispose();
    await expect(x.data()).rejects.toThrow('after it was disposed of');
    await expect(x.bytes()).rejects.toThrow('after it was disposed of');
  });

  test('an op that refuses its arguments leaks nothing', () => {
    using x = Tensor.from([1, 2]);
    using y = Tensor.from([1, 2, 3]);
    const before = memory();
    for (const bad of [() => x.add(y), () => x.reshape([3]), () => x.matmul(y), () => x.sum({ axes: 4 })]) {
      expect(() => scope(bad)).toThrow();
      expect(memory()).toMatchObject({ storages: before.storages, allocated: before.allocated });
    }
  });

  test('a view outside of its storage is refused', () => {
    using x = Tensor.from([1, 2, 3, 4]);
    using beyond = x.view([3], [2]);
    expect(() => scope(() => beyond.add(1))).toThrow(/\[add\].*outside of its storage of 16 bytes/);
  });
});

describe('devices', () => {
  test('an unknown or absent device says so', () => {
    expect(() => Tensor.empty([1], { device: 'tpu' as never })).toThrow(/tpu/);
  });

  test('to() on the same device is a view or a cast', () => {
    using x = Tensor.from([1.5]);
    using same = x.to({ device: 'cpu' });
    expect(same.storage).toBe(x.storage);
    using wide = x.to({ dtype: 'float64' });
    expect(String(wide)).toBe('f64[1]@cpu');
  });
});

describe('promotion in ops', () => {
  test('tensors promote, numbers do not', () => {
    scope(() => {
      const [i, b, f, d] = (['int32', 'bfloat16', 'float32', 'float64'] as const).map((dtype) =>
        Tensor.from([3], { dtype }),
      );
      expect(i.add(b).dtype).toBe('bfloat16');
      expect(b.mul(f).dtype).toBe('float32');
      expect(f.sub(d).dtype).toBe('float64');
      expect(b.mul(0.1).dtype).toBe('bfloat16');
      expect(i.add(2).dtype).toBe('int32');
      expect(() => i.add(1.9)).toThrow('expected an int32 number');
      expect(b.greater(f).dtype).toBe('bool');
      expect(b.reshape([1, 1]).matmul(f.reshape([1, 1])).dtype).toBe('float32');
    });
  });
});
