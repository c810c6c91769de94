// Cases of elementwise ops: every row of the tables at three layouts and at special values; where, clamp, in-place sums.
import {
  addInPlace,
  type BinaryName,
  binary,
  binaryNames,
  type CompareName,
  clamp,
  compare,
  compareNames,
  scaleInPlace,
  type UnaryName,
  unary,
  unaryNames,
  where,
} from '../../../src/ops/elementwise.js';
import { clone } from '../../../src/ops/movement.js';
import { type Host, mapBroadcast } from '../host.js';
import { flags, given, type InputSpec, input, integers, type OpCase, opCase } from '../op-case.js';
import { sigmoid, softplus } from '../reference.js';

interface UnaryMeaning {
  f: (x: number) => number;
  /** Where the function is smooth and its derivatives moderate. */
  domain: [number, number];
  special: number[];
}

const everywhere = [0, -0, 1, -1, 0.5, -2.5, 3e4, -3e4, 1e-20, Infinity, -Infinity, NaN];
const positive = [0, -0, 1, 0.5, 2.5, 3e4, 1e-20, 1e30, Infinity, -1, NaN];

const unaryMeaning: Record<UnaryName, UnaryMeaning> = {
  neg: { f: (x) => -x, domain: [-2, 2], special: everywhere },
  abs: { f: Math.abs, domain: [-2, 2], special: everywhere },
  sign: { f: Math.sign, domain: [-2, 2], special: everywhere },
  exp: { f: Math.exp, domain: [-3, 3], special: [...everywhere, 80, -80, 89, -100, 700, -740] },
  expm1: { f: Math.expm1, domain: [-2, 2], special: [...everywhere, 80, -80, 1e-6, -1e-6, 0.3, -0.3] },
  log: { f: Math.log, domain: [0.2, 4], special: [...positive, 1.0078125, 0.99609375, 1.5, 1.40625] },
  log1p: { f: Math.log1p, domain: [-0.7, 4], special: [...positive, 1e-6, -1e-6, -0.5, 0.5, -0.99609375] },
  sqrt: { f: Math.sqrt, domain: [0.3, 4], special: positive },
  rsqrt: { f: (x) => 1 / Math.sqrt(x), domain: [0.3, 4], special: positive.filter((x) => !Object.is(x, -0)) },
  reciprocal: { f: (x) => 1 / x, domain: [0.4, 3], special: everywhere },
  square: { f: (x) => x * x, domain: [-2, 2], special: everywhere },
  sin: { f: Math.sin, domain: [-4, 4], special: [0, -0, 1, -1, 30, -100, 1e-20, Infinity, NaN] },
  cos: { f: Math.cos, domain: [-4, 4], special: [0, -0, 1, -1, 30, -100, 1e-20, Infinity, NaN] },
  tanh: { f: Math.tanh, domain: [-3, 3], special: [...everywhere, 0.01, -0.3, 8, 20] },
  sigmoid: { f: sigmoid, domain: [-4, 4], special: [...everywhere, 17, -30, 60, -80] },
  logSigmoid: { f: (x) => -softplus(-x), domain: [-4, 4], special: [...everywhere, 10, -30, 60, -80] },
  softplus: { f: softplus, domain: [-4, 4], special: [...everywhere, 10, -30, 60, -80] },
  relu: { f: (x) => Math.max(x, 0), domain: [-2, 2], special: everywhere },
  silu: { f: (x) => x * sigmoid(x), domain: [-4, 4], special: [0, -0, 1, -1, 30, -30, 3e4, 1e-20, Infinity, NaN] },
};

function unaryCases(name: UnaryName): OpCase[] {
  const { f, domain, special } = unaryMeaning[name];
  const of = (spec: InputSpec, more: Partial<OpCase> & { note?: string } = {}): OpCase =>
    opCase({
      op: name,
      opClass: 'elementwise',
      inputs: [spec],
      run: (_, x) => unary(name, x),
      reference: (_, x) => mapBroadcast(f, [x]),
      rows: [0],
      ...more,
    });
  return [
    of(input([2, 3], ...domain)),
    of(input([7, 19], ...domain, 'transposed'), { size: 'large', rows: [] }),
    of(input([3, 5, 41], ...domain, 'sliced'), { size: 'large' }),
    of(given([special.length], special), { size: 'large', differentiable: false, note: 'special values' }),
    of(input([67, 1031], ...domain), { size: 'threads' }),
    of(input([2048, 1024], ...domain), { size: 'bench', cost: { elements: 2 * 2048 * 1024 } }),
  ];
}

interface BinaryMeaning {
  f: (x: number, y: number) => number;
  domain: [number, number];
}

const largest = (x: number, y: number): number => (Number.isNaN(x) || Number.isNaN(y) ? NaN : Math.max(x, y));
/** As C and IEEE 754 define it: 1 to any power is 1, -1 to an infinite one too. */
const power = (x: number, y: number): number => (x === 1 || (x === -1 && Math.abs(y) === Infinity) ? 1 : x ** y);
const smallest = (x: number, y: number): number => (Number.isNaN(x) || Number.isNaN(y) ? NaN : Math.min(x, y));

const binaryMeaning: Record<BinaryName, BinaryMeaning> = {
  add: { f: (x, y) => x + y, domain: [-2, 2] },
  sub: { f: (x, y) => x - y, domain: [-2, 2] },
  rsub: { f: (x, y) => y - x, domain: [-2, 2] },
  mul: { f: (x, y) => x * y, domain: [-2, 2] },
  div: { f: (x, y) => x / y, domain: [0.4, 2] },
  rdiv: { f: (x, y) => y / x, domain: [0.4, 2] },
  pow: { f: power, domain: [0.4, 2] },
  maximum: { f: largest, domain: [-2, 2] },
  minimum: { f: smallest, domain: [-2, 2] },
};

function binaryCases(name: BinaryName): OpCase[] {
  const { f, domain } = binaryMeaning[name];
  const of = (a: InputSpec, b: InputSpec | number, more: Partial<OpCase> & { note?: string } = {}): OpCase =>
    opCase({
      op: name,
      opClass: 'elementwise',
      inputs: typeof b === 'number' ? [a] : [a, b],
      run: (_, x, y) => binary(name, x, typeof b === 'number' ? b : y),
      reference: (at, x, y) => {
        const right = typeof b === 'number' ? { shape: [], values: Float64Array.of(scalarIn(at.dtype, b)) } : y;
        return mapBroadcast(f, [x, right]);
      },
      params: typeof b === 'number' ? { scalar: b } : {},
      ...more,
    });
  const whole = [1, 2, 3, -4, 5, -6];
  return [
    of(input([2, 3], ...domain), input([2, 3], ...domain), { rows: [0, 1] }),
    of(input([2, 3], ...domain), input([3], ...domain), { rows: [0] }),
    of(input([2, 1], ...domain), input([3, 1, 2], ...domain)),
    of(input([], ...domain), input([2], ...domain)),
    of(input([2, 3], ...domain), 1.75, { rows: [0], note: 'number' }),
    of(input([9, 23], ...domain, 'transposed'), input([9, 23], ...domain, 'sliced'), { size: 'large' }),
    of(input([4, 1, 37], ...domain), input([5, 1], ...domain, 'transposed'), { size: 'large' }),
    of(input([67, 1031], ...domain), input([1031], ...domain), { size: 'threads' }),
    of(given([7], [1, -1, Infinity, -Infinity, NaN, 0, 2]), given([7, 1], [1, -1, Infinity, -Infinity, NaN, 0, 3]), {
      size: 'large',
      differentiable: false,
      note: 'special values',
    }),
    of(integers([6], whole), integers([6], [3, 5, 2, 2, 7, 1]), {
      dtypes: ['int32'],
      differentiable: false,
      reference: (_, x, y) => mapBroadcast((a, b) => Math.trunc(f(a, b)), [x, y]),
    }),
    of(input([2048, 1024], ...domain), input([2048, 1024], ...domain), {
      size: 'bench',
      cost: { elements: 3 * 2048 * 1024 },
    }),
    of(input([2048, 1024], ...domain), input([1024], ...domain), {
      size: 'bench',
      cost: { elements: 2 * 2048 * 1024 },
    }),
  ];
}

/** A number beside a tensor takes part in the compute type: float32 for bfloat16. */
const scalarIn = (dtype: string, x: number): number => (dtype === 'float64' ? x : Math.fround(x));

const compareMeaning: Record<CompareName, (x: number, y: number) => boolean> = {
  equal: (x, y) => x === y,
  notEqual: (x, y) => x !== y,
  less: (x, y) => x < y,
  lessEqual: (x, y) => x <= y,
  greater: (x, y) => x > y,
  greaterEqual: (x, y) => x >= y,
};

function compareCases(name: CompareName): OpCase[] {
  const f = (x: number, y: number): number => (compareMeaning[name](x, y) ? 1 : 0);
  const of = (a: InputSpec, b: InputSpec | number, more: Partial<OpCase> & { note?: string } = {}): OpCase =>
    opCase({
      op: name,
      opClass: 'exact',
      inputs: typeof b === 'number' ? [a] : [a, b],
      run: (_, x, y) => compare(name, x, typeof b === 'number' ? b : y),
      reference: (_, x, y) =>
        mapBroadcast(f, [x, typeof b === 'number' ? { shape: [], values: Float64Array.of(b) } : y], 'bool'),
      differentiable: false,
      ...more,
    });
  const steps = [0, -0, 1, -1, Infinity, -Infinity, NaN, 0.5];
  return [
    of(given([8], steps), given([8, 1], steps)),
    of(given([8, 9], steps), 0.5, { note: 'number' }),
    of(input([5, 23], -1, 1, 'transposed'), input([5, 1])),
    of(integers([5], [1, 2, 3, -4, 0]), integers([5], [1, 3, 2, -4, 1]), { dtypes: ['int32'] }),
    of(input([2048, 1024]), input([2048, 1024]), { size: 'bench', cost: { elements: 2.25 * 2048 * 1024 } }),
  ];
}

const chosen = (c: number, a: number, b: number): number => (c ? a : b);

const whereCases = (): OpCase[] => {
  const of = (inputs: InputSpec[], more: Partial<OpCase> = {}): OpCase =>
    opCase({
      op: 'where',
      opClass: 'elementwise',
      inputs,
      run: (_, c, a, b) => where(c, a, b),
      reference: (_, c, a, b) => mapBroadcast(chosen, [c, a, b]),
      ...more,
    });
  return [
    of([flags([2, 3]), input([2, 3]), input([2, 3])], { rows: [0, 1, 2] }),
    of([flags([3]), input([2, 1]), input([])]),
    of([flags([6, 17]), input([6, 17], -1, 1, 'transposed'), input([17])], { size: 'large' }),
    of([flags([4]), integers([4], [1, 2, 3, 4]), integers([1], [-9])], { dtypes: ['int32'], differentiable: false }),
    of([flags([2048, 1024]), input([2048, 1024]), input([2048, 1024])], {
      size: 'bench',
      cost: { elements: 3.25 * 2048 * 1024 },
    }),
  ];
};

const clampCases = (): OpCase[] =>
  [input([3, 5], -2, 2), input([5, 29], -2, 2, 'transposed')].map((spec, i) =>
    opCase({
      op: 'clamp',
      opClass: 'elementwise',
      inputs: [spec],
      run: (_, x) => clamp(x, -0.75, 0.5),
      reference: (_, x) => mapBroadcast((v) => Math.min(Math.max(v, -0.75), 0.5), [x]),
      size: i === 0 ? 'small' : 'large',
    }),
  );

const inPlaceCases = (): OpCase[] => [
  opCase({
    op: 'addInPlace',
    opClass: 'elementwise',
    inputs: [input([5, 33]), input([33])],
    run: (_, a, b) => {
      const into = clone(a);
      addInPlace(into, b);
      return into;
    },
    reference: (_, a, b) => mapBroadcast((x, y) => x + y, [a, b]),
    differentiable: false,
  }),
  opCase({
    op: 'scaleInPlace',
    opClass: 'elementwise',
    inputs: [input([5, 33])],
    run: (_, a) => {
      const into = clone(a);
      scaleInPlace(into, -1.5);
      return into;
    },
    reference: (_, a: Host) => mapBroadcast((x) => -1.5 * x, [a]),
    differentiable: false,
  }),
];

export const elementwiseCases = (): OpCase[] => [
  ...unaryNames.flatMap(unaryCases),
  ...binaryNames.flatMap(binaryCases),
  ...compareNames.flatMap(compareCases),
  ...whereCases(),
  ...clampCases(),
  ...inPlaceCases(),
];
