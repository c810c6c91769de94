// Cases of movement: what is moved must arrive bit for bit, whatever the strides.
import {
  arange,
  argmax,
  broadcastTo,
  cast,
  clone,
  concat,
  contiguous,
  copyInto,
  emptyLike,
  fill,
  full,
  gatherLast,
  gatherRows,
  ones,
  onesLike,
  permute,
  reshape,
  scatterLast,
  scatterRows,
  slice,
  squeeze,
  stack,
  to,
  transpose,
  unsqueeze,
  zeros,
  zerosLike,
} from '../../../src/ops/movement.js';
import type { DType } from '../../../src/tensor/dtype.js';
import type { Tensor } from '../../../src/tensor/tensor.js';
import { build, type Host, host, mapBroadcast, pick, roundTo, sizeOf, transposeLast } from '../host.js';
import { floats, given, type InputSpec, ids, input, integers, type OpCase, opCase, type Place } from '../op-case.js';

type More = Partial<OpCase> & { note?: string };

const move = (
  op: string,
  inputs: InputSpec[],
  run: (...x: Tensor[]) => Tensor,
  reference: (...x: Host[]) => Host,
  more: More = {},
): OpCase =>
  opCase({
    op,
    opClass: 'exact',
    inputs,
    run: (_, ...x) => run(...x),
    reference: (_, ...x) => reference(...x),
    ...more,
  });

const everyDtype: readonly DType[] = [...floats, 'int32', 'uint8', 'bool'];

const same = (x: Host): Host => x;
const copies = (): OpCase[] => [
  move('clone', [input([2, 3])], clone, same, { rows: [0] }),
  move('clone', [input([9, 35], -1, 1, 'transposed')], clone, same, { size: 'large' }),
  move('clone', [given([2, 5], [1, 0, 1, 1])], clone, same, { dtypes: everyDtype, differentiable: false }),
  move('contiguous', [input([2, 3])], contiguous, same),
  move('contiguous', [input([2, 3], -1, 1, 'transposed')], contiguous, same),
  move('contiguous', [input([67, 131], -1, 1, 'transposed')], contiguous, same, { size: 'large' }),
  move('contiguous', [input([259, 515], -1, 1, 'transposed')], contiguous, same, { size: 'threads' }),
  move('contiguous', [input([2, 3], -1, 1, 'sliced')], contiguous, same),
  move('contiguous', [input([2048, 1024], -1, 1, 'transposed')], contiguous, same, {
    size: 'bench',
    cost: { elements: 2 * 2048 * 1024 },
  }),
  move('clone', [input([2048, 1024])], clone, same, { size: 'bench', cost: { elements: 2 * 2048 * 1024 } }),
  move(
    'copyInto',
    [input([6, 5])],
    (x) => {
      const wide = zeros([6, 11], { dtype: x.dtype, device: x.device });
      copyInto(slice(wide, 1, 3, 8), x);
      return wide;
    },
    (x) => build([6, 11], ([i, j]) => (j >= 3 && j < 8 ? pick(x, [i, j - 3]) : 0)),
    { differentiable: false },
  ),
];

const castable: readonly DType[] = [...floats, 'float16'];
const castCases = (): OpCase[] => [
  ...castable.map((to) =>
    opCase({
      op: 'cast',
      opClass: 'exact',
      inputs: [input([3, 37], -3, 3, 'transposed')],
      run: (_, x) => cast(cast(x, to), 'float64'),
      reference: (_, x) => mapBroadcast((v) => castTo(to, v), [x], 'float64'),
      size: 'large',
      gradientClass: 'elementwise',
      note: `to ${to}`,
    }),
  ),
  opCase({
    op: 'cast',
    opClass: 'exact',
    inputs: [input([2, 3])],
    run: (_, x) => cast(x, 'float64'),
    reference: (_, x) => ({ ...x, dtype: 'float64' }),
    gradientClass: 'elementwise',
  }),
  opCase({
    op: 'to',
    opClass: 'exact',
    inputs: [input([2, 3], -1, 1, 'transposed')],
    run: (at, x) => to(to(x, { device: at.device }), { dtype: 'float64', device: at.device }),
    reference: (_, x) => ({ ...x, dtype: 'float64' }),
    gradientClass: 'elementwise',
  }),
  opCase({
    op: 'cast',
    opClass: 'exact',
    inputs: [given([8], [0, -0, 1.75, -1.75, 100.5, 3, -7, 0.25])],
    run: (_, x) => [cast(x, 'int32'), cast(x, 'bool'), cast(cast(x, 'int32'), x.dtype)],
    reference: (at, x) => [
      mapBroadcast(Math.trunc, [x], 'int32'),
      mapBroadcast((v) => (v !== 0 ? 1 : 0), [x], 'bool'),
      mapBroadcast(Math.trunc, [x], at.dtype),
    ],
    differentiable: false,
    note: 'to integers',
  }),
  opCase({
    op: 'cast',
    opClass: 'exact',
    inputs: [given([7], [Infinity, -Infinity, NaN, 65504, -0, 1e-7, 70000])],
    run: (_, x) => [cast(cast(x, 'float16'), 'float32'), cast(cast(x, 'bfloat16'), 'float32')],
    reference: (_, x) => [
      mapBroadcast((v) => castTo('float16', v), [x], 'float32'),
      mapBroadcast((v) => roundTo('bfloat16', v), [x], 'float32'),
    ],
    differentiable: false,
    dtypes: ['float32', 'float64'],
    note: 'special values',
  }),
  opCase({
    op: 'cast',
    opClass: 'exact',
    inputs: [input([2048, 1024])],
    run: (at, x) => cast(x, at.dtype === 'bfloat16' ? 'float32' : 'bfloat16'),
    size: 'bench',
    cost: { elements: 1.5 * 2048 * 1024 },
  }),
];

function castTo(to: DType, x: number): number {
  if (to !== 'float16') return roundTo(to, x);
  const v = Math.fround(x);
  if (!Number.isFinite(v)) return v;
  const step = 2 ** Math.max(Math.floor(Math.log2(Math.abs(v) || 1)) - 10, -24);
  const down = Math.floor(v / step);
  const rest = v / step - down;
  const whole = rest > 0.5 || (rest === 0.5 && down % 2 !== 0) ? down + 1 : down;
  const rounded = whole * step;
  return Math.abs(rounded) > 65504 ? Math.sign(rounded) * Infinity : rounded === 0 ? 0 * Math.sign(v) : rounded;
}

const views = (): OpCase[] => [
  move(
    'reshape',
    [input([2, 6])],
    (x) => reshape(x, [3, -1]),
    (x) => host([3, 4], x.values),
  ),
  move(
    'reshape',
    [input([2, 6], -1, 1, 'transposed')],
    (x) => reshape(x, [4, 3]),
    (x) => host([4, 3], x.values),
  ),
  move(
    'reshape',
    [input([1])],
    (x) => reshape(x, []),
    (x) => host([], x.values),
  ),
  move(
    'permute',
    [input([2, 3, 4])],
    (x) => permute(x, [2, 0, 1]),
    (x) => build([4, 2, 3], ([i, j, k]) => pick(x, [j, k, i])),
  ),
  move('transpose', [input([2, 3])], (x) => transpose(x), transposeLast),
  move(
    'transpose',
    [input([2, 3, 2])],
    (x) => transpose(x, 0, -2),
    (x) => build([3, 2, 2], ([i, j, k]) => pick(x, [j, i, k])),
  ),
  move(
    'broadcastTo',
    [input([3, 1])],
    (x) => broadcastTo(x, [2, 3, 4]),
    (x) => build([2, 3, 4], (i) => pick(x, i)),
    { gradientClass: 'reduction' },
  ),
  move(
    'unsqueeze',
    [input([2, 3])],
    (x) => unsqueeze(x, 1),
    (x) => host([2, 1, 3], x.values),
  ),
  move(
    'unsqueeze',
    [input([2, 3])],
    (x) => unsqueeze(x, -1),
    (x) => host([2, 3, 1], x.values),
    { note: 'at the end' },
  ),
  move(
    'squeeze',
    [input([2, 1, 3])],
    (x) => squeeze(x, 1),
    (x) => host([2, 3], x.values),
  ),
  move(
    'slice',
    [input([4, 3])],
    (x) => slice(x, 0, 1, 3),
    (x) => build([2, 3], ([i, j]) => pick(x, [i + 1, j])),
  ),
  move(
    'slice',
    [input([3, 5], -1, 1, 'transposed')],
    (x) => slice(x, -1, 2),
    (x) => build([3, 3], ([i, j]) => pick(x, [i, j + 2])),
  ),
  move(
    'slice',
    [input([3, 5])],
    (x) => slice(x, 1, 2, 2),
    () => host([3, 0], []),
    { differentiable: false },
  ),
];

const joins = (): OpCase[] => [
  move(
    'concat',
    [input([2, 3]), input([1, 3]), input([3, 3], -1, 1, 'transposed')],
    (...x) => concat(x),
    (a, b, c) => host([6, 3], [...a.values, ...b.values, ...c.values]),
  ),
  move(
    'concat',
    [input([2, 3]), input([2, 2], -1, 1, 'sliced')],
    (...x) => concat(x, -1),
    (a, b) => build([2, 5], ([i, j]) => (j < 3 ? pick(a, [i, j]) : pick(b, [i, j - 3]))),
  ),
  move(
    'stack',
    [input([2, 3]), input([2, 3], -1, 1, 'transposed')],
    (...x) => stack(x),
    (a, b) => host([2, 2, 3], [...a.values, ...b.values]),
  ),
];

const rowsByIds = (x: Host, at: Host): Host =>
  build([at.values.length, x.shape[1]], ([i, j]) => pick(x, [at.values[i], j]));
const scattered = (x: Host, at: Host, count: number): Host => {
  const out = host([count, x.shape[1]], new Float64Array(count * x.shape[1]));
  build(x.shape, ([i, j], n) => {
    out.values[at.values[i] * x.shape[1] + j] += x.values[n];
    return 0;
  });
  return out;
};

const scatter = (src: InputSpec, at: InputSpec, rows: number, more: More = {}): OpCase =>
  move(
    'scatterRows',
    [src, at],
    (x, to) => scatterRows(x, to, rows),
    (x, to) => scattered(x, to, rows),
    { opClass: 'reduction', ...more },
  );

/** On both sides of what one thread block sorts on a GPU; ids of one to three digits there, in runs of every length. */
const scatters = (): OpCase[] => [
  scatter(input([6, 3]), integers([6], [4, 0, 4, 2, 1, 4]), 5),
  scatter(input([1, 3]), integers([1], [1]), 2),
  scatter(input([5, 2]), ids(5, 1), 1, { note: 'one id' }),
  scatter(input([8, 2]), integers([8], [3, 300, 298, 0, 2, 299, 1, 150]), 301, { note: 'distinct' }),
  scatter(input([0, 3]), ids(0, 4), 4, { note: 'of nothing' }),
  scatter(input([100, 67], -1, 1, 'transposed'), ids(100, 7), 8, { size: 'large' }),
  scatter(input([40, 1030]), ids(40, 12), 12, { size: 'large', note: 'two panels of columns' }),
  scatter(input([600, 5]), integers([600], [2]), 4, { size: 'large', note: 'equal' }),
  scatter(input([3000, 2]), ids(3000, 151936), 151936, { size: 'large' }),
  scatter(input([9000, 2]), ids(9000, 151936), 151936, { size: 'large' }),
  scatter(input([9000, 2]), integers([9000], [1, 4, 1, 0]), 6, { size: 'large', note: 'long runs' }),
  move('scatterRows', [input([1024, 576]), ids(1024, 49152)], (x, at) => scatterRows(x, at, 49152), same, {
    size: 'bench',
    cost: { elements: 49152 * 576 },
  }),
];

const lookups = (): OpCase[] => [
  move('gatherRows', [input([5, 3]), integers([6], [4, 0, 4, 2, 1, 4])], gatherRows, rowsByIds, {
    gradientClass: 'reduction',
  }),
  move('gatherRows', [input([9, 67], -1, 1, 'transposed'), ids(40, 9)], gatherRows, rowsByIds, {
    size: 'large',
    gradientClass: 'reduction',
  }),
  move('gatherRows', [input([9, 5]), ids(0, 9)], gatherRows, rowsByIds, { note: 'of nothing' }),
  move('gatherRows', [integers([3, 2], [1, 2, 3, 4, 5, 6]), ids(4, 3)], gatherRows, rowsByIds, {
    dtypes: ['int32'],
    differentiable: false,
  }),
  move('gatherRows', [input([49152, 576]), ids(1024, 49152)], gatherRows, rowsByIds, {
    size: 'bench',
    cost: { elements: 2 * 1024 * 576 },
  }),
  move(
    'gatherLast',
    [input([4, 5]), integers([4], [4, 0, 2, 2])],
    gatherLast,
    (x, at) => build([4], ([i]) => pick(x, [i, at.values[i]])),
    { rows: [0, 1] },
  ),
  move(
    'gatherLast',
    [input([33, 70], -1, 1, 'transposed'), ids(33, 70)],
    gatherLast,
    (x, at) => build([33], ([i]) => pick(x, [i, at.values[i]])),
    { size: 'large' },
  ),
  move(
    'scatterLast',
    [input([4]), integers([4], [4, 0, 2, 2])],
    (x, at) => scatterLast(x, at, 5),
    (x, at) => build([4, 5], ([i, j]) => (at.values[i] === j ? x.values[i] : 0)),
    { rows: [0, 1] },
  ),
  move('gatherLast', [input([1024, 4096]), ids(1024, 4096)], gatherLast, same, { size: 'bench' }),
  move('scatterLast', [input([1024]), ids(1024, 4096)], (x, at) => scatterLast(x, at, 4096), same, {
    size: 'bench',
    cost: { elements: 1024 * 4096 },
  }),
];

const firstLargest = (row: Float64Array): number => {
  const nan = row.findIndex(Number.isNaN);
  return nan >= 0 ? nan : row.indexOf(row.reduce((a, b) => Math.max(a, b)));
};
const argmaxOf = (x: Host): Host => {
  const width = x.shape.at(-1)!;
  return build(x.shape.slice(0, -1), (_, at) => firstLargest(x.values.subarray(at * width, (at + 1) * width)), 'int32');
};
const argmaxCases = (): OpCase[] => {
  const more: More = { differentiable: false };
  const ties = [1, 3, 3, 2, 0, NaN, 5, 5, -Infinity, -Infinity, -Infinity, -Infinity, Infinity, 1, Infinity, 0];
  return [
    move('argmax', [given([4, 4], ties)], argmax, argmaxOf, { ...more, rows: [0], note: 'ties' }),
    move('argmax', [input([7])], argmax, argmaxOf, more),
    move('argmax', [input([3, 5, 131], -1, 1, 'transposed')], argmax, argmaxOf, more),
    move('argmax', [integers([2, 4], [1, 7, 7, 2, -3, -1, -5, -1])], argmax, argmaxOf, { ...more, dtypes: ['int32'] }),
    move('argmax', [input([64, 49152])], argmax, argmaxOf, { ...more, size: 'bench', cost: { elements: 64 * 49152 } }),
  ];
};

/** Tensors made from nothing, beside one input whose place they share where they need a like. */
const creations = (): OpCase[] => {
  const options = (at: Place): { dtype: DType; device: Place['device'] } => ({ dtype: at.dtype, device: at.device });
  const make = (op: string, run: (at: Place, x: Tensor) => Tensor, answer: (shape: readonly number[]) => Host) =>
    opCase({
      op,
      opClass: 'exact',
      inputs: [input([5, 7], -1, 1, 'transposed')],
      run,
      reference: (_, x) => answer(x.shape),
      dtypes: everyDtype,
      differentiable: false,
    });
  const constant = (value: number) => (shape: readonly number[]) =>
    host(shape, new Float64Array(sizeOf(shape)).fill(value));
  return [
    make('full', (at, x) => full(x.shape, 1, options(at)), constant(1)),
    make('zeros', (at, x) => zeros(x.shape, options(at)), constant(0)),
    make('ones', (at, x) => ones(x.shape, options(at)), constant(1)),
    make('zerosLike', (_, x) => zerosLike(x), constant(0)),
    make('onesLike', (_, x) => onesLike(x), constant(1)),
    make(
      'emptyLike',
      (_, x) => fill(emptyLike(x, [x.shape[0], 3]), 1),
      () => constant(1)([5, 3]),
    ),
    make(
      'fill',
      (at) => {
        const wide = zeros([5, 7], options(at));
        fill(slice(wide, 1, 2, 5), 1);
        return wide;
      },
      () => build([5, 7], ([, j]) => (j >= 2 && j < 5 ? 1 : 0)),
    ),
    ...(['int32', 'float32', 'float64'] as const).map((dtype) =>
      opCase({
        op: 'arange',
        opClass: 'exact',
        inputs: [],
        run: (at) => arange(100001, { start: -3, step: 2, dtype, device: at.device }),
        reference: () => build([100001], ([i]) => -3 + 2 * i, dtype),
        dtypes: ['float32'],
        differentiable: false,
        size: 'large',
        note: dtype,
      }),
    ),
    opCase({
      op: 'arange',
      opClass: 'exact',
      inputs: [],
      run: (at) => arange(301, { start: -3, step: 2, dtype: at.dtype, device: at.device }),
      reference: () => build([301], ([i]) => -3 + 2 * i),
      dtypes: ['float32', 'float64'],
      differentiable: false,
      note: '301',
    }),
    opCase({
      op: 'fill',
      opClass: 'exact',
      inputs: [],
      run: (at) => full([2048, 1024], 0.5, options(at)),
      differentiable: false,
      size: 'bench',
      cost: { elements: 2048 * 1024 },
    }),
    opCase({
      op: 'arange',
      opClass: 'exact',
      inputs: [],
      run: (at) => arange(2048 * 1024, { dtype: 'int32', device: at.device }),
      dtypes: ['float32'],
      differentiable: false,
      size: 'bench',
      cost: { elements: 2048 * 1024 },
    }),
  ];
};

export const movementCases = (): OpCase[] => [
  ...copies(),
  ...castCases(),
  ...views(),
  ...joins(),
  ...lookups(),
  ...scatters(),
  ...argmaxCases(),
  ...creations(),
];
