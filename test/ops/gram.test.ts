// x xᵀ of one tensor: a backend may copy one half of it from the other, and nobody sees that.
import { expect, test } from 'vitest';
import { contiguous, emptyLike, fill, transpose } from '../../src/ops/movement.js';
import { matmulInto } from '../../src/ops/product.js';
import { accumulationDType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { testDevices } from '../support/devices.js';

const dtypes = ['float32', 'float64', 'bfloat16'] as const;
/** Around the tiles, bands and blocks of K of every instruction set. */
const shapes = [
  [1, 7],
  [29, 40],
  [64, 33],
  [255, 576],
  [301, 900],
] as const;

for (const device of testDevices())
  for (const dtype of dtypes)
    test(`rows' inner products have the bits of any product, ${device} ${dtype}`, () => {
      for (const [rows, width] of shapes)
        scope(() => {
          const x = Tensor.from(
            Float32Array.from({ length: rows * width }, (_, i) => Math.sin(i * 1.7) + i / 9e4),
            { shape: [rows, width], device, dtype },
          );
          const other = contiguous(transpose(contiguous(transpose(x))));
          const [own, plain] = [0, 1].map(() => emptyLike(x, [rows, rows], accumulationDType(dtype)));
          fill(own, NaN);
          matmulInto(own, x, transpose(x), { alpha: 0.5 });
          matmulInto(plain, x, transpose(other), { alpha: 0.5 });
          expect([...own.dataSync()]).toEqual([...plain.dataSync()]);
        });
    });
