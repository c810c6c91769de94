// Cases of products: every shape class of matmul (vectors, batches, broadcasts, transposed operands, sizes around the
// tiles), linear with its weight contribution, and the in-place forms.

import { emptyLike, fill } from '../../../src/ops/movement.js';
import { asRows, gradientBuffer, LinearContribution, linear, matmul, matmulInto } from '../../../src/ops/product.js';
import { mapBroadcast, transposeLast } from '../host.js';
import { type InputSpec, input, type Layout, type OpCase, opCase } from '../op-case.js';
import { linear as linearOf, matmul as matmulOf } from '../reference.js';

function product(a: InputSpec, b: InputSpec, more: Partial<OpCase> = {}): OpCase {
  return opCase({
    op: 'matmul',
    opClass: 'product',
    inputs: [a, b],
    run: (_, x, y) => matmul(x, y),
    reference: (_, x, y) => matmulOf(x, y),
    ...more,
  });
}

const layouts: Layout[] = ['contiguous', 'transposed', 'sliced'];

const small = (): OpCase[] => [
  product(input([2, 3]), input([3, 4]), { rows: [0] }),
  product(input([3]), input([3, 2])),
  product(input([2, 3]), input([3])),
  product(input([3]), input([3])),
  product(input([2, 2, 3]), input([2, 3, 2]), { rows: [0, 1] }),
  product(input([2, 1, 2, 3]), input([2, 3, 2])),
  product(input([2, 3]), input([2, 3, 1])),
  product(input([2, 3], -1, 1, 'transposed'), input([3, 2], -1, 1, 'transposed')),
  product(input([2, 0]), input([0, 3]), { differentiable: false }),
];

/** Sizes around register tiles, packing panels and blocks of K; and thin ones, which take other paths. */
const shapes: [number, number, number][] = [
  [1, 1, 1],
  [1, 70, 33],
  [2, 129, 100],
  [5, 64, 1],
  [13, 31, 47],
  [33, 400, 65],
  [64, 16, 97],
  [100, 1, 40],
  [130, 257, 67],
];

const tiles = (): OpCase[] =>
  shapes.flatMap(([m, k, n]) =>
    layouts.map((layout) =>
      product(input([m, k], -1, 1, layout), input([k, n], -1, 1, layouts[(layouts.indexOf(layout) + 1) % 3]), {
        size: 'large',
        rows: [0],
      }),
    ),
  );

const batched = (): OpCase[] => [
  product(input([3, 17, 20]), input([3, 20, 9], -1, 1, 'transposed'), { size: 'large' }),
  product(input([3, 17, 20]), input([20, 9]), { size: 'large' }),
  product(input([4, 1, 9, 12], -1, 1, 'transposed'), input([3, 12, 11]), { size: 'large' }),
  product(input([17, 20]), input([6, 20, 3]), { size: 'large' }),
];

const gemm = (m: number, k: number, n: number, b: Layout = 'contiguous'): OpCase =>
  product(input([m, k]), input([k, n], -1, 1, b), { size: 'bench', cost: { flops: 2 * m * n * k } });

const benches = (): OpCase[] => [
  gemm(1024, 1024, 1024),
  gemm(512, 896, 4864, 'transposed'),
  gemm(512, 576, 49152, 'transposed'),
  gemm(2048, 576, 1536, 'transposed'),
  gemm(8, 896, 896, 'transposed'),
  gemm(1, 576, 1536, 'transposed'),
];

const linears = (): OpCase[] => {
  const of = (inputs: InputSpec[], more: Partial<OpCase> = {}): OpCase =>
    opCase({
      op: 'linear',
      opClass: 'product',
      inputs,
      run: (_, x, w, b) => linear(x, w, b ?? null),
      reference: (_, x, w, b) => linearOf(x, w, b),
      rows: [0],
      ...more,
    });
  return [
    of([input([3, 4]), input([2, 4]), input([2])]),
    of([input([3, 4]), input([2, 4])]),
    of([input([2, 2, 3]), input([4, 3]), input([4])]),
    of([input([3]), input([4, 3]), input([4])], { rows: [] }),
    of([input([3, 4], -1, 1, 'transposed'), input([2, 4], -1, 1, 'transposed'), input([2])]),
    of([input([65, 96]), input([131, 96]), input([131])], { size: 'large' }),
    of([input([65, 96], -1, 1, 'sliced'), input([131, 96], -1, 1, 'sliced'), input([131], -1, 1, 'sliced')], {
      size: 'large',
    }),
    of([input([300, 192]), input([512, 192]), input([512])], { size: 'large' }),
    of([input([1024, 576]), input([1536, 576])], { size: 'bench', cost: { flops: 2 * 1024 * 576 * 1536 } }),
    of([input([1024, 896]), input([896, 896]), input([896])], { size: 'bench', cost: { flops: 2 * 1024 * 896 * 896 } }),
  ];
};

const inPlace = (): OpCase[] => [
  opCase({
    op: 'matmulInto',
    opClass: 'product',
    inputs: [input([35, 20]), input([20, 33]), input([33])],
    run: (_, a, b, bias) => {
      const out = fill(emptyLike(a, [35, 33]), 2);
      matmulInto(out, a, b, { alpha: -0.5, accumulate: true, bias });
      return out;
    },
    reference: (_, a, b, bias) => mapBroadcast((p, q) => 2 - 0.5 * p + q, [matmulOf(a, b), bias]),
    differentiable: false,
    note: 'accumulated',
  }),
  opCase({
    op: 'gradientBuffer',
    opClass: 'exact',
    inputs: [input([3, 5])],
    run: (_, x) => gradientBuffer(x),
    reference: (at, x) => mapBroadcast(() => 0, [x], at.dtype === 'float64' ? 'float64' : 'float32'),
    differentiable: false,
  }),
  opCase({
    op: 'LinearContribution',
    opClass: 'product',
    inputs: [input([70, 20]), input([70, 33], -1, 1, 'transposed')],
    run: (at, x, g) => {
      const contribution = new LinearContribution(asRows(x), g, 0.5);
      const into = gradientBuffer(emptyLike(x, contribution.shape));
      contribution.addTo(into, 3);
      contribution.addTo(into, -1);
      return into.cast(at.dtype);
    },
    reference: (_, x, g) => matmulOf(transposeLast(g), x),
    differentiable: false,
    note: 'added twice',
  }),
];

export const productCases = (): OpCase[] => [
  ...small(),
  ...tiles(),
  ...batched(),
  ...linears(),
  ...inPlace(),
  ...benches(),
];
