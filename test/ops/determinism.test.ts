// Bits that must not depend on circumstances: the number of threads, a row's neighbours, a second run. And memory that must
// come back after each case.
import { afterAll, describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { runtimeInfo, setThreads } from '../../src/native/info.js';
import type { DType } from '../../src/tensor/dtype.js';
import { memory } from '../../src/tensor/storage.js';
import { checkedCases } from '../support/cases.js';
import { bytesOf, checkRows } from '../support/checks.js';
import { testDevices } from '../support/devices.js';
import type { OpCase } from '../support/op-case.js';

const threads = runtimeInfo().threads;
afterAll(() => setThreads(threads));

/** float64 takes the same paths as float32. */
const dtypesOf = (c: OpCase): readonly DType[] =>
  c.dtypes.length > 1 ? c.dtypes.filter((d) => d !== 'float64') : c.dtypes;

/**
 * On a GPU the whole shape decides on a product's order of summation where rows have no unit stride (native/cuda/gemm.h):
 * transposed views, as weight gradients have them, never the rows of tokens.
 */
const apart = (c: OpCase, device: string): boolean =>
  device.startsWith('cuda') && c.opClass === 'product' && c.rows.some((i) => c.inputs[i].layout === 'transposed');

for (const device of testDevices()) {
  describe(`one and two threads give the same bits on ${device}, and all memory comes back`, () => {
    for (const c of checkedCases())
      test(c.name, async () => {
        for (const dtype of dtypesOf(c)) {
          setThreads(1);
          const one = await bytesOf(c, { device, dtype });
          const { storages, allocated } = memory(device);
          setThreads(2);
          const two = await bytesOf(c, { device, dtype });
          expect(two.map((b) => Buffer.from(b).toString('hex'))).toEqual(
            one.map((b) => Buffer.from(b).toString('hex')),
          );
          expect(memory(device)).toMatchObject({ storages, allocated });
        }
      });
  });

  describe(`rows do not depend on their neighbours on ${device}`, () => {
    for (const c of checkedCases().filter((c) => c.rows.length > 0 && !apart(c, device)))
      test(c.name, () => {
        for (const dtype of dtypesOf(c)) checkRows(c, { device, dtype });
      });

    // A library of matrix products may refuse the algorithm that all rows are to have.
    test('no product had an algorithm of its own', () => expect(runtimeInfo().cuda.unplannedProducts ?? 0).toBe(0));
  });
}
