// Cases of the optimizer kernels, through `launch`: two groups of tensors, AdamW and SGD as torch defines them.
import { launch } from '../../../src/native/launch.js';
import { clone, zeros } from '../../../src/ops/movement.js';
import type { DType } from '../../../src/tensor/dtype.js';
import { Tensor } from '../../../src/tensor/tensor.js';
import { type Host, host } from '../host.js';
import { type InputSpec, input, type OpCase, opCase, type Place } from '../op-case.js';

type More = Partial<OpCase> & { note?: string };

const wide: readonly DType[] = ['float64', 'float32'];
const base = { opClass: 'optimizer', differentiable: false } as const;

/** A vector of scalars on the device: learning rate, step, factor of the gradient, skip. */
const scalars = (at: Place, values: readonly number[]): Tensor =>
  Tensor.from(Float64Array.from(values), { device: at.device });

const gradient = (shape: readonly number[], dtype?: 'float32'): InputSpec =>
  dtype ? { ...input(shape), kind: dtype } : input(shape);

interface AdamwSetting {
  lr: number;
  step: number;
  factor: number;
  skip: number;
  betas: [number, number];
  epsilon: number;
  decay: number;
}
const adamwSetting: AdamwSetting = {
  lr: 0.01,
  step: 3,
  factor: 0.5,
  skip: 0,
  betas: [0.9, 0.98],
  epsilon: 1e-8,
  decay: 0.1,
};

/** One group's [param, m, v] after the step. */
function adamwReference([param, m, v, grad]: readonly Host[], s: AdamwSetting): Host[] {
  const out = [param, m, v].map((x) => host(x.shape, x.values));
  if (s.skip) return out;
  grad.values.forEach((given, i) => {
    const g = given * s.factor;
    const mean = s.betas[0] * m.values[i] + (1 - s.betas[0]) * g;
    const variance = s.betas[1] * v.values[i] + (1 - s.betas[1]) * g * g;
    const root = Math.sqrt(variance) / Math.sqrt(1 - s.betas[1] ** s.step);
    const moved = param.values[i] * (1 - s.lr * s.decay);
    out[0].values[i] = moved - ((s.lr / (1 - s.betas[0] ** s.step)) * mean) / (root + s.epsilon);
    out[1].values[i] = mean;
    out[2].values[i] = variance;
  });
  return out;
}

/** Four inputs a group; every second group has a bfloat16 copy of its parameter. */
function adamwCase(shapes: readonly (readonly number[])[], change: Partial<AdamwSetting>, more: More = {}): OpCase {
  const s = { ...adamwSetting, ...change };
  return opCase({
    ...base,
    op: 'adamw',
    inputs: shapes.flatMap((shape) => [
      input(shape),
      input(shape, -0.1, 0.1),
      input(shape, 0.001, 0.1),
      gradient(shape),
    ]),
    run: (at, ...x) => {
      const groups = shapes.map((shape, i) => {
        const [param, m, v] = x.slice(4 * i, 4 * i + 3).map(clone);
        const low = i % 2 === 1 ? zeros(shape, { dtype: 'bfloat16', device: at.device }) : null;
        return [param, m, v, x[4 * i + 3], low];
      });
      const attributes = [...s.betas, s.epsilon, s.decay];
      launch('adamw', [scalars(at, [s.lr, s.step, s.factor, s.skip]), ...groups.flat()], attributes);
      return groups.flatMap(([param, m, v, , low]) => [param!, m!, v!, ...(low ? [low] : [])]);
    },
    reference: (_, ...x) =>
      shapes.flatMap((_shape, i) => {
        const group = adamwReference(x.slice(4 * i, 4 * i + 4), s);
        const low = host(group[0].shape, s.skip ? group[0].values.map(() => 0) : group[0].values, 'bfloat16');
        return i % 2 === 1 ? [...group, low] : group;
      }),
    dtypes: wide,
    ...more,
  });
}

interface SgdSetting {
  lr: number;
  step: number;
  factor: number;
  skip: number;
  momentum: number;
  decay: number;
}

function sgdReference(x: readonly Host[], s: SgdSetting): Host[] {
  const [param, buffer, grad] = x;
  const out = [param, buffer].map((h) => host(h.shape, h.values));
  if (s.skip) return out;
  grad.values.forEach((given, i) => {
    const g = s.factor * given + s.decay * param.values[i];
    out[1].values[i] = s.step === 1 ? g : s.momentum * buffer.values[i] + g;
    out[0].values[i] = param.values[i] - s.lr * (s.momentum ? out[1].values[i] : g);
  });
  return out;
}

function sgdCase(shapes: readonly (readonly number[])[], change: Partial<SgdSetting>, more: More = {}): OpCase {
  const s = { lr: 0.1, step: 2, factor: 0.5, skip: 0, momentum: 0.9, decay: 0.01, ...change };
  return opCase({
    ...base,
    op: 'sgd',
    inputs: shapes.flatMap((shape) => [input(shape), input(shape), gradient(shape)]),
    run: (at, ...x) => {
      const groups = shapes.map((_shape, i) => {
        const [param, buffer] = x.slice(3 * i, 3 * i + 2).map(clone);
        return [param, s.momentum ? buffer : null, x[3 * i + 2], null];
      });
      launch('sgd', [scalars(at, [s.lr, s.step, s.factor, s.skip]), ...groups.flat()], [s.momentum, s.decay]);
      return groups.flatMap(([param, buffer]) => [param!, ...(buffer ? [buffer] : [])]);
    },
    reference: (_, ...x) =>
      shapes.flatMap((_shape, i) => sgdReference(x.slice(3 * i, 3 * i + 3), s).slice(0, s.momentum ? 2 : 1)),
    dtypes: wide,
    ...more,
  });
}

/** float32 master weights with gradients of the case's dtype, as beside a bfloat16 backbone. */
function mixedCase(): OpCase {
  const shape = [3, 37];
  const float32 = (spec: InputSpec): InputSpec => ({ ...spec, kind: 'float32' });
  return opCase({
    ...base,
    op: 'adamw',
    inputs: [
      float32(input(shape)),
      float32(input(shape, -0.1, 0.1)),
      float32(input(shape, 0.001, 0.1)),
      gradient(shape),
    ],
    run: (at, param, m, v, grad) => {
      const group = [clone(param), clone(m), clone(v)];
      const s = adamwSetting;
      const attributes = [...s.betas, s.epsilon, s.decay];
      launch('adamw', [scalars(at, [s.lr, s.step, s.factor, 0]), ...group, grad, null], attributes);
      return group;
    },
    reference: (_, ...x) => adamwReference(x, adamwSetting).map((h) => host(h.shape, h.values, 'float32')),
    dtypes: ['float32', 'bfloat16'],
    note: 'float32 master weights',
  });
}

const squares = (x: readonly Host[], start: number): Host =>
  host([1], [x.reduce((total, t) => t.values.reduce((a, b) => a + b * b, total), start)], 'float64');

function sumSquaresCase(shapes: readonly (readonly number[])[], accumulate: boolean, more: More = {}): OpCase {
  return opCase({
    ...base,
    op: 'sumSquares',
    inputs: shapes.map((shape) => input(shape)),
    run: (at, ...x) => {
      const total = scalars(at, [2.5]);
      launch('sumSquares', [total, ...x], [accumulate ? 1 : 0]);
      return total;
    },
    reference: (_, ...x) => squares(x, accumulate ? 2.5 : 0),
    note: accumulate ? 'accumulated' : '',
    ...more,
  });
}

const big = 2048 * 1024;
export const optimizerCases = (): OpCase[] => [
  adamwCase([[7], [2, 3], [1]], {}),
  adamwCase([[20011], [130, 131]], { step: 1, factor: 1 }, { size: 'large' }),
  // More blocks than one of a GPU, under the sanitizers too.
  adamwCase([[4100]], {}, { dtypes: ['float32'] }),
  adamwCase([[7], [2, 3]], { skip: 1 }, { note: 'skipped', opClass: 'exact' }),
  mixedCase(),
  adamwCase([[big]], {}, { size: 'bench', cost: { elements: 7 * big } }),
  sgdCase([[7], [2, 3]], {}),
  sgdCase([[7], [20011]], { momentum: 0 }, { note: 'without momentum', size: 'large' }),
  sgdCase([[7], [2, 3]], { step: 1 }, { note: 'first step' }),
  sgdCase([[7]], { skip: 1 }, { note: 'skipped', opClass: 'exact' }),
  sgdCase([[big]], {}, { size: 'bench', cost: { elements: 5 * big } }),
  sumSquaresCase([[7], [2, 3], [1]], false),
  sumSquaresCase([[16390]], false, { dtypes: ['float32'] }),
  sumSquaresCase([[20011], [300, 131], [5]], true, { size: 'large' }),
  sumSquaresCase([[big]], false, { size: 'bench', cost: { elements: big } }),
];
