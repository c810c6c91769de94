// Cases of sequenceGradient (native/ops/kernels.def): one sequence's gradient, its sums and its shares, with and without each.

import { launch } from '../../../src/native/launch.js';
import { add, div, mul, sub } from '../../../src/ops/elementwise.js';
import { cast, emptyLike, fill, stack } from '../../../src/ops/movement.js';
import { sum } from '../../../src/ops/reduce.js';
import { accumulationDType } from '../../../src/tensor/dtype.js';
import type { Tensor } from '../../../src/tensor/tensor.js';
import { type Host, host } from '../host.js';
import { accumulator, input, type Layout, type OpCase, opCase, type Place } from '../op-case.js';

interface Shape {
  /** Tokens, columns of g, columns of x. */
  readonly size: readonly [rows: number, out: number, width: number];
  readonly layout?: Layout;
}

/** [sums, their error against the tile's own, first, second, tile] and what is left where something is absent. */
function run(g: Tensor, x: Tensor, other: Tensor, before: readonly Tensor[], coefficients: Tensor): Tensor[] {
  const wide = accumulationDType(g.dtype);
  const sums = (): Tensor => fill(emptyLike(g, [2], 'float64'), 1);
  const copies = (): Tensor[] => before.map((t) => add(t, 0));
  const tile = emptyLike(other);
  const all = [sums(), ...copies()];
  launch('sequenceGradient', [...all, tile, g, x, other, coefficients]);
  const fused = [sums(), ...copies()];
  launch('sequenceGradient', [...fused, null, g, x, other, coefficients]);
  const [bare, [first, second], only] = [sums(), copies(), emptyLike(other)];
  launch('sequenceGradient', [bare, null, null, null, g, x, null, null]);
  launch('sequenceGradient', [null, first, null, null, g, x, null, coefficients]);
  launch('sequenceGradient', [null, null, second, null, g, x, null, coefficients]);
  launch('sequenceGradient', [null, null, null, only, g, x, null, null]);
  const narrow = (t: Tensor): Tensor => cast(t, wide);
  return [
    narrow(all[0]),
    offBy(all[0], tile, other),
    ...all.slice(1),
    tile,
    narrow(fused[0]),
    ...fused.slice(1),
    narrow(bare),
    first,
    second,
    only,
  ];
}

/** 1 and the errors of sums that started at 1, in units of the square: float64 sums of a tile that float32 rounded. */
function offBy(sums: Tensor, tile: Tensor, other: Tensor): Tensor {
  const [x, y] = [cast(tile, 'float64'), cast(other, 'float64')];
  const square = sum(mul(x, x));
  return add(div(sub(sub(sums, 1), stack([square, sum(mul(x, y))])), square), 1);
}

function reference(at: Place, g: Host, x: Host, other: Host, before: readonly Host[], coefficients: Host): Host[] {
  const wide = accumulationDType(at.dtype);
  const [rows, out] = g.shape;
  const width = x.shape[1];
  const tile = new Float64Array(out * width);
  for (let t = 0; t < rows; t++)
    for (let o = 0; o < out; o++)
      for (let i = 0; i < width; i++) tile[o * width + i] += g.values[t * out + o] * x.values[t * width + i];
  const dot = (a: Float64Array, b: Float64Array): number => a.reduce((n, v, i) => n + v * b[i], 0);
  const into = before.map(({ values }, i) =>
    host(
      other.shape,
      values.map((v, j) => v + coefficients.values[i] * tile[j]),
      wide,
    ),
  );
  const sums = host([2], [1 + dot(tile, tile), 1 + dot(tile, other.values)], wide);
  const formed = host(other.shape, tile, wide);
  const bare = host([2], [1 + dot(tile, tile), 1], wide);
  return [sums, host([2], [1, 1], 'float64'), ...into, formed, sums, ...into, bare, ...into, formed];
}

function sequenceGradient({ size: [rows, out, width], layout }: Shape): OpCase {
  const weight = accumulator([out, width]);
  return opCase({
    op: 'sequenceGradient',
    // float32 results of bfloat16 rows, as the head's.
    opClass: 'head',
    differentiable: false,
    inputs: [
      input([rows, out], -1, 1, layout),
      input([rows, width], -1, 1, layout),
      weight,
      weight,
      weight,
      accumulator([2]),
    ],
    size: rows * out * width > 1 << 18 ? 'threads' : 'small',
    run: (_, g, x, other, first, second, coefficients) => run(g, x, other, [first, second], coefficients),
    reference: (at, g, x, other, first, second, coefficients) =>
      reference(at, g, x, other, [first, second], coefficients),
  });
}

/** A sequence of 255 tokens, nothing kept of its gradient. */
function timed(out: number, width: number): OpCase {
  const weight = accumulator([out, width]);
  return opCase({
    op: 'sequenceGradient',
    opClass: 'head',
    differentiable: false,
    inputs: [input([255, out]), input([255, width]), weight, weight, accumulator([2])],
    run: (_, g, x, first, second, coefficients) => {
      const sums = fill(emptyLike(g, [2], 'float64'), 0);
      launch('sequenceGradient', [sums, first, second, null, g, x, null, coefficients]);
      return sums;
    },
    size: 'bench',
    cost: { flops: 2 * 255 * out * width },
    note: 'timed',
  });
}

export const sequenceGradientCases = (): OpCase[] => [
  sequenceGradient({ size: [4, 3, 5] }),
  sequenceGradient({ size: [1, 1, 33] }),
  sequenceGradient({ size: [31, 40, 70], layout: 'sliced' }),
  sequenceGradient({ size: [26, 31, 9], layout: 'transposed' }),
  sequenceGradient({ size: [60, 70, 301] }),
  sequenceGradient({ size: [90, 16, 250] }),
  sequenceGradient({ size: [90, 250, 16] }),
  // Several blocks of rows; more than one packing of them.
  sequenceGradient({ size: [900, 33, 70] }),
  sequenceGradient({ size: [800, 13, 67] }),
  sequenceGradient({ size: [8300, 17, 33] }),
  timed(1536, 576),
  timed(16, 576),
];
