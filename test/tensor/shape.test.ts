// Shapes, strides and dtypes: pure functions.
import { describe, expect, test } from 'vitest';
import { accumulationDType, type DType, dtypes, hostArray, isFloating, promote } from '../../src/tensor/dtype.js';
import {
  broadcastShapes,
  broadcastStrides,
  contiguousStrides,
  isContiguous,
  normalizeAxis,
  sameShape,
  sizeOf,
} from '../../src/tensor/shape.js';

test('sizes and strides', () => {
  expect(sizeOf([])).toBe(1);
  expect(sizeOf([2, 0, 3])).toBe(0);
  expect(contiguousStrides([2, 3, 4])).toEqual([12, 4, 1]);
  expect(isContiguous([2, 3], [3, 1])).toBe(true);
  expect(isContiguous([2, 3], [1, 2])).toBe(false);
  expect(isContiguous([2, 1, 3], [3, 99, 1])).toBe(true);
  expect(sameShape([2, 3], [2, 3])).toBe(true);
  expect(sameShape([2, 3], [3])).toBe(false);
});

describe('broadcasting', () => {
  test.each([
    [[2, 3], [3], [2, 3]],
    [
      [2, 1],
      [3, 1, 4],
      [3, 2, 4],
    ],
    [[], [2], [2]],
    [
      [0, 3],
      [1, 3],
      [0, 3],
    ],
    [[1], [0], [0]],
  ])('[%s] and [%s] give [%s]', (a, b, shape) => {
    expect(broadcastShapes('op', a, b)).toEqual(shape);
    expect(broadcastShapes('op', b, a)).toEqual(shape);
  });

  test('shapes that do not fit are named, with the op', () => {
    expect(() => broadcastShapes('add', [2, 3], [2])).toThrow(
      '[add] expected shapes that broadcast, found [2,3] and [2]; try reshape or unsqueeze',
    );
    expect(() => broadcastShapes('add', [0], [2])).toThrow('[0] and [2]');
  });

  test('strides are 0 along stretched and new axes', () => {
    expect(broadcastStrides([3, 1], [1, 1], [2, 3, 4])).toEqual([0, 1, 0]);
  });
});

test('axes count from either end', () => {
  expect(normalizeAxis('op', -1, 3)).toBe(2);
  for (const axis of [3, -4, 0.5]) expect(() => normalizeAxis('sum', axis, 3)).toThrow(`found ${axis}`);
});

describe('promotion', () => {
  const order: DType[] = ['bool', 'uint8', 'int32', 'float16', 'bfloat16', 'float32', 'float64'];
  for (const a of order)
    for (const b of order) {
      const halves = a !== b && a.endsWith('float16') && b.endsWith('float16');
      const later = order.indexOf(a) > order.indexOf(b) ? a : b;
      test(`${a} with ${b}`, () => expect(promote(a, b)).toBe(halves ? 'float32' : later));
    }
});

test('sums are kept in float32 at least', () => {
  expect((Object.keys(dtypes) as DType[]).map((d) => [d, isFloating(d), accumulationDType(d)])).toEqual([
    ['float32', true, 'float32'],
    ['float64', true, 'float64'],
    ['bfloat16', true, 'float32'],
    ['float16', true, 'float32'],
    ['int32', false, 'float32'],
    ['uint8', false, 'float32'],
    ['bool', false, 'float32'],
  ]);
});

test('there is a JavaScript array for all but the half floats', () => {
  expect(hostArray('bool', 2)).toEqual(new Uint8Array(2));
  expect(() => hostArray('bfloat16', 1)).toThrow('cast to float32 first');
});
