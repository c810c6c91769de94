// sequenceGradient: its bits are those of the product, depend on no thread and on nothing else that is asked for; a sequence
// without rows has no gradient.
import { afterAll, describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { runtimeInfo, setThreads } from '../../src/native/info.js';
import { launch } from '../../src/native/launch.js';
import { add } from '../../src/ops/elementwise.js';
import { emptyLike, fill, transpose } from '../../src/ops/movement.js';
import { matmulInto } from '../../src/ops/product.js';
import { accumulationDType, type DType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { testDevices } from '../support/devices.js';
import { randomSource } from '../support/host.js';

const threads = runtimeInfo().threads;
afterAll(() => setThreads(threads));

const bits = (t: Tensor): string => Buffer.from(Float64Array.from(t.dataSync()).buffer).toString('base64');

function inputs(device: Tensor['device'], dtype: DType, [rows, out, width]: readonly number[]) {
  const random = randomSource(`${rows} ${out} ${width}`);
  const make = (shape: number[], type: DType): Tensor =>
    Tensor.from(
      Float64Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => 2 * random() - 1),
      { shape, dtype: type, device },
    );
  const wide = accumulationDType(dtype);
  const weight = (): Tensor => make([out, width], wide);
  return {
    g: make([rows, out], dtype),
    x: make([rows, width], dtype),
    other: weight(),
    first: weight(),
    second: weight(),
    coefficients: make([2], wide),
  };
}
type Inputs = ReturnType<typeof inputs>;

/** The bits of what is wanted. */
function results({ g, x, other, first, second, coefficients }: Inputs, wanted = { sums: true, tile: true }) {
  const [a, b] = [add(first, 0), add(second, 0)];
  const sums = wanted.sums ? fill(emptyLike(g, [2], 'float64'), 0.5) : null;
  const tile = wanted.tile ? emptyLike(other) : null;
  launch('sequenceGradient', [sums, a, b, tile, g, x, other, coefficients]);
  return [sums, tile, a, b].map((t) => t && bits(t));
}

// Columns and rows that are no multiple of a tile, of bands or of spans; several blocks of rows.
const sizes = [
  [255, 192, 576],
  [255, 331, 70],
  [130, 16, 1201],
  [130, 1201, 16],
  [1000, 101, 203],
];

for (const device of testDevices())
  for (const dtype of ['float32', 'bfloat16', 'float64'] as const)
    describe(`in ${dtype} on ${device}`, () => {
      test.each(sizes)('%i rows, [%i, %i]', (...size) => {
        scope(() => {
          const given = inputs(device, dtype, size);
          setThreads(1);
          const [sums, tile, first, second] = results(given);
          const product = emptyLike(given.other);
          matmulInto(product, transpose(given.g), given.x);
          expect(tile).toBe(bits(product));
          for (const count of [1, 2, 3, 5]) {
            setThreads(count);
            expect(results(given, { sums: true, tile: false })).toEqual([sums, null, first, second]);
            expect(results(given, { sums: false, tile: true })).toEqual([null, tile, first, second]);
          }
        });
      });

      test('no rows', () => {
        scope(() => {
          const given = inputs(device, dtype, [0, 7, 5]);
          const infinite = { ...given, coefficients: fill(given.coefficients, Infinity) };
          const half = fill(emptyLike(given.g, [2], 'float64'), 0.5);
          const zero = fill(emptyLike(given.other), 0);
          expect(results(infinite)).toEqual([half, zero, given.first, given.second].map(bits));
        });
      });
    });
