// Cases of reductions: every combination of axes of small tensors, other layouts, long sums, and sumTo.
import { max, mean, min, type ReduceOptions, sum, sumTo } from '../../../src/ops/reduce.js';
import type { Tensor } from '../../../src/tensor/tensor.js';
import { type Host, host, sizeOf } from '../host.js';
import { given, type InputSpec, input, integers, type OpCase, opCase } from '../op-case.js';
import { reduce } from '../reference.js';

const all = (x: Host): number[] => x.shape.map((_, i) => i);
const axesOf = (x: Host, options: ReduceOptions): number[] =>
  options.axes === undefined ? all(x) : [options.axes].flat().map((a) => (a < 0 ? a + x.shape.length : a));

const nan = (f: (a: number, b: number) => number) => (a: number, b: number) =>
  Number.isNaN(a) || Number.isNaN(b) ? NaN : f(a, b);

const reductions: Record<string, { run: typeof sum; reference: (x: Host, options: ReduceOptions) => Host }> = {
  sum: { run: sum, reference: (x, o) => reduce(x, axesOf(x, o), o.keepDims ?? false, 0, (a, b) => a + b) },
  mean: {
    run: mean,
    reference: (x, o) => {
      const axes = axesOf(x, o);
      const total = reduce(x, axes, o.keepDims ?? false, 0, (a, b) => a + b);
      const count = sizeOf(axes.map((i) => x.shape[i]));
      return host(
        total.shape,
        total.values.map((v) => v / count),
      );
    },
  },
  max: { run: max, reference: (x, o) => reduce(x, axesOf(x, o), o.keepDims ?? false, -Infinity, nan(Math.max)) },
  min: { run: min, reference: (x, o) => reduce(x, axesOf(x, o), o.keepDims ?? false, Infinity, nan(Math.min)) },
};

function reductionCases(name: string): OpCase[] {
  const { run, reference } = reductions[name];
  const of = (spec: InputSpec, options: ReduceOptions, more: Partial<OpCase> = {}): OpCase =>
    opCase({
      op: name,
      opClass: 'reduction',
      inputs: [spec],
      run: (_, x) => run(x, options),
      reference: (_, x) => reference(x, options),
      note: `axes ${options.axes ?? 'all'}${options.keepDims ? ' kept' : ''}`,
      params: { ...options },
      ...more,
    });
  const rows = { rows: [0] };
  return [
    of(input([2, 3]), {}),
    of(input([]), {}),
    of(input([2, 3]), { axes: 0 }),
    of(input([2, 3]), { axes: -1, keepDims: true }, rows),
    of(input([2, 3, 2]), { axes: [0, 2] }),
    of(input([2, 3, 2]), { axes: [1], keepDims: true }, rows),
    of(input([2, 1, 3], -1, 1, 'transposed'), { axes: [1, 2] }, rows),
    of(input([33, 70], -1, 1, 'transposed'), { axes: 0 }, { size: 'large' }),
    of(input([33, 70], -1, 1, 'transposed'), { axes: 1 }, { size: 'large' }),
    of(input([5, 7, 67], -1, 1, 'sliced'), { axes: [0, 2] }, { size: 'large' }),
    of(input([3, 50021]), { axes: 1 }, { size: 'threads', ...rows }),
    of(input([50021, 3]), { axes: 0 }, { size: 'threads' }),
    ...(name === 'mean'
      ? []
      : [of(integers([2, 3], [4, -7, 2, 9, 0, 1]), { axes: 1 }, { dtypes: ['int32'], differentiable: false })]),
    of(input([2048, 1024]), {}, { size: 'bench', cost: { elements: 2048 * 1024 } }),
    of(input([2048, 1024]), { axes: 0 }, { size: 'bench', cost: { elements: 2048 * 1024 } }),
    of(input([2048, 1024]), { axes: 1 }, { size: 'bench', cost: { elements: 2048 * 1024 } }),
  ];
}

const extremeCases = (): OpCase[] =>
  (['max', 'min'] as const).map((name) =>
    opCase({
      op: name,
      opClass: 'exact',
      inputs: [given([3, 5], [1, NaN, 2, 0, 1, Infinity, -Infinity, 3, 3, 3, 4, 4, 4, 4, 4])],
      run: (_, x: Tensor) => reductions[name].run(x, { axes: 1 }),
      reference: (_, x) => reductions[name].reference(x, { axes: 1 }),
      differentiable: false,
      note: 'special values',
    }),
  );

const sumToCases = (): OpCase[] =>
  [
    { from: [2, 3], to: [3] },
    { from: [2, 3], to: [2, 1] },
    { from: [2, 3], to: [] },
    { from: [2, 3], to: [2, 3] },
    { from: [4, 2, 3], to: [1, 3] },
  ].map(({ from, to }) =>
    opCase({
      op: 'sumTo',
      opClass: 'reduction',
      inputs: [input(from)],
      run: (_, x) => sumTo(x, to),
      reference: (_, x) => sumToReference(x, to),
      note: `to [${to}]`,
    }),
  );

function sumToReference(x: Host, to: readonly number[]): Host {
  const shift = x.shape.length - to.length;
  const axes = all(x).filter((i) => i < shift || to[i - shift] === 1);
  return host(to, reduce(x, axes, true, 0, (a, b) => a + b).values);
}

const emptyCases = (): OpCase[] => [
  opCase({
    op: 'sum',
    opClass: 'exact',
    inputs: [input([3, 0])],
    run: (_, x) => sum(x, { axes: 1 }),
    reference: () => host([3], [0, 0, 0]),
    note: 'of nothing',
  }),
  opCase({
    op: 'sum',
    opClass: 'exact',
    inputs: [input([0, 3])],
    run: (_, x) => sum(x, { axes: 1 }),
    reference: () => host([0], []),
    note: 'to nothing',
  }),
];

export const reduceCases = (): OpCase[] => [
  ...Object.keys(reductions).flatMap(reductionCases),
  ...extremeCases(),
  ...sumToCases(),
  ...emptyCases(),
];
