// A process whose first fault belongs to a tensor that is gone by then. A file of its own: only the first fault counts.
import { expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { concat } from '../../src/ops/movement.js';
import { scope } from '../../src/tensor/scope.js';
import { synchronize } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';

test('the next tensor in the place of a failed one is sound', () => {
  scope(() => {
    const x = Tensor.from([
      [1, 2],
      [3, 4],
    ]);
    const busy = Tensor.from(new Float32Array(512 * 512), { shape: [512, 512] });
    for (let i = 0; i < 4; i++) busy.matmul(busy);
    // All of this is enqueued while the products run; concat writes its result in parts.
    x.gatherRows(Tensor.from(Int32Array.of(9))).dispose();
    const joined = concat([x, x]);
    expect(() => synchronize()).toThrow('[gatherRows]');
    expect([...joined.dataSync()]).toEqual([1, 2, 3, 4, 1, 2, 3, 4]);
  });
});
