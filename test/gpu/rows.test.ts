// RMSNorm's ways to share out a row on a GPU, each against float64 on the CPU: a warp, a block, rows too wide for registers,
// rows that do not lie on 16 bytes. And faults in row maps and positions, which surface at the next read.
import { describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { vjp } from '../../src/autograd/transforms.js';
import { launch } from '../../src/native/launch.js';
import { gatherRows, scatterRows, slice } from '../../src/ops/movement.js';
import { addRmsNorm, rmsNorm, rotaryEmbedding, swiglu } from '../../src/ops/transformer.js';
import { scope } from '../../src/tensor/scope.js';
import type { Device } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { gpu, needsGpu } from './device.js';

const count = 5;
const tolerance = { float64: 1e-12, float32: 3e-6, bfloat16: 3e-2 } as const;
type Floating = keyof typeof tolerance;

/** Values that every dtype holds exactly. */
const values = (length: number, salt: number): Float64Array =>
  Float64Array.from({ length }, (_, i) => (((i * 37 + salt * 11) % 61) - 30) / 16);

/** Values and gradients of rmsNorm and addRmsNorm over `count` rows of `width`. */
function normed(device: Device, dtype: Floating, width: number): Float64Array[] {
  return scope(() => {
    const of = (shape: number[], salt: number): Tensor =>
      Tensor.from(
        values(
          shape.reduce((a, b) => a * b),
          salt,
        ),
        { shape, dtype, device },
      );
    const inputs = [of([count, width], 1), of([width], 2), of([count, width], 4)];
    const cotangents = [3, 5, 6].map((salt) => of([count, width], salt));
    const f = ([x, weight, delta]: Tensor[]): Tensor[] => [
      rmsNorm(x, weight, 1e-5),
      ...addRmsNorm(x, delta, weight, 1e-5),
    ];
    const [ys, [gradients]] = vjp(f, [inputs], () => cotangents);
    return [...ys, ...gradients].map((t) => Float64Array.from(t.cast('float64').dataSync()));
  });
}

function expectClose(found: Float64Array, expected: Float64Array, limit: number): void {
  const scale = expected.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
  const worst = found.reduce((a, x, i) => Math.max(a, Math.abs(x - expected[i])), 0);
  expect(worst / scale).toBeLessThan(limit);
}

describe.skipIf(!gpu)(`rows of every width (${gpu ?? needsGpu})`, () => {
  const widths: [Floating, number][] = [
    ...[7, 64, 1024, 1032, 2048, 3001, 8192, 8200, 8201].map((n): [Floating, number] => ['bfloat16', n]),
    ...[512, 516, 4096, 4100].map((n): [Floating, number] => ['float32', n]),
    ...[256, 258, 2048, 2050].map((n): [Floating, number] => ['float64', n]),
  ];

  test.each(widths)('rmsNorm and addRmsNorm in %s, %i wide', (dtype, width) => {
    const found = normed(gpu!, dtype, width);
    const expected = normed('cpu', 'float64', width);
    found.forEach((x, i) => {
      expectClose(x, expected[i], tolerance[dtype]);
    });
  });

  test.each([64, 1024, 2048] as const)('rows of %i have the same bits wherever they lie in memory', (width) => {
    scope(() => {
      const x = Tensor.from(values(3 * width, 1), { shape: [3, width], dtype: 'bfloat16', device: gpu! });
      const wide = Tensor.from(values(3 * width + 1, 0), { shape: [3 * width + 1], dtype: 'bfloat16', device: gpu! });
      const weight = Tensor.from(values(width, 2), { shape: [width], dtype: 'bfloat16', device: gpu! });
      // The same values one element further on: not on 16 bytes.
      const shifted = slice(wide, 0, 1, 3 * width + 1);
      launch('copy', [shifted.view([3, width], [width, 1]), x]);
      const read = (t: Tensor): number[] => [...t.cast('float32').dataSync()];
      const moved = shifted.view([3, width], [width, 1]);
      expect(read(rmsNorm(moved, weight, 1e-5))).toEqual(read(rmsNorm(x, weight, 1e-5)));
      expect(read(swiglu(moved, x))).toEqual(read(swiglu(x, x)));
    });
  });
});

describe.skipIf(!gpu)(`faults in data (${gpu ?? needsGpu})`, () => {
  const int32 = (...ids: number[]): Tensor => Tensor.from(Int32Array.from(ids), { device: gpu! });
  const filled = (...shape: number[]): Tensor =>
    Tensor.from(
      values(
        shape.reduce((a, b) => a * b),
        1,
      ),
      { shape, dtype: 'float32', device: gpu! },
    );

  test('a position outside of the table', () => {
    scope(() => {
      const turned = rotaryEmbedding(filled(3, 2, 4), int32(0, 5, 1), filled(5, 4));
      expect(() => turned.dataSync()).toThrow('expected positions[1] in [0, 5), found 5');
    });
  });

  test('a row map that leaves the primal rows', () => {
    scope(() => {
      const [dgate, dup] = [filled(3, 8), filled(3, 8)];
      launch('swigluBackward', [dgate, dup, filled(3, 8), filled(2, 8), filled(2, 8), int32(0, 1, 2)]);
      expect(() => dgate.dataSync()).toThrow('expected rowMap[2] in [0, 2), found 2');
    });
    scope(() => {
      const dx = filled(3, 8);
      const [weight, rstd] = [filled(8), filled(2)];
      launch('rmsNormBackward', [dx, null, filled(3, 8), filled(2, 8), weight, rstd, int32(0, -1, 1), null]);
      expect(() => dx.dataSync()).toThrow('expected rowMap[1] in [0, 2), found -1');
    });
  });

  test.each([
    [5, 1],
    [9000, 8999],
  ])('an id outside of the table that %i rows are added to', (rows, at) => {
    scope(() => {
      const ids = Int32Array.from({ length: rows }, (_, i) => (i === at ? -3 : (7 * i) % 4));
      const added = scatterRows(filled(rows, 2), Tensor.from(ids, { device: gpu! }), 4);
      expect(() => added.dataSync()).toThrow(`[scatterAddRows] expected ids[${at}] in [0, 4), found -3`);
    });
  });

  test('several faults before the first is read', () => {
    scope(() => {
      // A launch has one of 32 slots for its fault, by its number: some of these would have the same one.
      const gathered = Array.from({ length: 12 }, (_, i) => {
        const sound = filled(2, 2);
        return [sound.mul(2).add(1), gatherRows(filled(2, 2), int32(100 + i)), gatherRows(sound, int32(1))];
      });
      gathered.forEach(([before, faulty, after], i) => {
        expect(() => faulty.dataSync()).toThrow(`expected ids[0] in [0, 2), found ${100 + i}`);
        expect([...before.dataSync()]).toEqual([...values(4, 1)].map((x) => 2 * x + 1));
        expect([...after.dataSync()]).toEqual([...values(4, 1)].slice(2));
      });
    });
  });

  test('what comes after a fault is sound', () => {
    scope(() => {
      expect([...filled(2, 2).mul(2).dataSync()]).toEqual([...values(4, 1)].map((x) => 2 * x));
    });
  });
});
