// The debug switch KEELGRAD_SYNC=1: an op that fails throws where it is called.
process.env.KEELGRAD_SYNC = '1';

import { expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';

test('errors of the arithmetic are thrown by the op itself', () => {
  const before = memory().storages;
  scope(() => {
    const x = Tensor.from([[1], [2]]);
    const ids = Tensor.from(Int32Array.of(2));
    expect(() => x.gatherRows(ids)).toThrow(/\[gatherRows\].*2/);
    expect(x.sum().item()).toBe(3);
  });
  expect(memory().storages).toBe(before);
});
