// What a case is: an op at one set of shapes, with its inputs, its meaning and what may be checked of it. Cases are data:
// the tests, the benchmark and any other device's runner read the same list (cases.ts).
import { concat, slice, transpose } from '../../src/ops/movement.js';
import { accumulationDType, type DType } from '../../src/tensor/dtype.js';
import type { Device } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { type Host, host, randomSource, roundTo, sizeOf } from './host.js';
import type { OpClass } from './tolerances.js';

/** Where and in which dtype a case runs. */
export interface Place {
  readonly device: Device;
  readonly dtype: DType;
}

/** `transposed`: last two axes exchanged in memory; `sliced`: columns of a wider buffer, at an odd offset. */
export type Layout = 'contiguous' | 'transposed' | 'sliced';

export interface InputSpec {
  readonly shape: readonly number[];
  /** `value`: the case's dtype; `accumulator`: float32, or float64 for float64; others as they are named. */
  readonly kind: 'value' | 'accumulator' | 'float32' | 'float64' | 'int32' | 'bool';
  readonly layout: Layout;
  /** Data that nothing is differentiated for. */
  readonly fixed?: boolean;
  /** The value at a position, from numbers in [0, 1). */
  readonly value: (random: () => number, at: number) => number;
}

export interface OpCase {
  /** Unique: the op, the shapes, what is special. */
  readonly name: string;
  /** The function of src/ops, or the kernel of native/ops, that this is a case of. */
  readonly op: string;
  readonly opClass: OpClass;
  /** The class of its gradient where that is another kind of op: a sum behind a copy. */
  readonly gradientClass: OpClass;
  readonly inputs: readonly InputSpec[];
  readonly run: (at: Place, ...inputs: Tensor[]) => Tensor | readonly Tensor[];
  /** The answer in float64 from the definition; absent in cases for the benchmark alone. */
  readonly reference?: (at: Place, ...inputs: Host[]) => Host | readonly Host[];
  /** A fused op's own definition in primitive ops: checked against the reference, and the oracle of gradients. */
  readonly definition?: (at: Place, ...inputs: Tensor[]) => Tensor | readonly Tensor[];
  readonly dtypes: readonly DType[];
  readonly differentiable: boolean;
  /** Inputs whose axis 0 is the output's axis 0, each row on its own. */
  readonly rows: readonly number[];
  /** small: every check; large: no finite differences; threads: large enough to be split among threads; bench: timed only. */
  readonly size: 'small' | 'large' | 'threads' | 'bench';
  /** For the benchmark's table: what a run costs (operations; elements read and written), numbers that a peer needs. */
  readonly cost: { flops?: number; elements?: number };
  readonly params: Readonly<Record<string, unknown>>;
}

export const floats: readonly DType[] = ['float64', 'float32', 'bfloat16'];

type Required = 'op' | 'opClass' | 'inputs' | 'run';

/** A case from what is not usual about it. Its name is the op and the shapes, with `note` behind. */
export function opCase(given: Pick<OpCase, Required> & Partial<OpCase> & { note?: string }): OpCase {
  const { note, ...rest } = given;
  const shapes = given.inputs.map((i) => `[${i.shape}]${i.layout === 'contiguous' ? '' : ` ${i.layout}`}`).join(' ');
  return {
    name: [given.op, shapes, note].filter(Boolean).join(' '),
    gradientClass: given.opClass,
    dtypes: floats,
    differentiable: true,
    rows: [],
    size: 'small',
    cost: {},
    params: {},
    ...rest,
  };
}

/** Floating input with values in [low, high). */
export const input = (shape: readonly number[], low = -1, high = 1, layout: Layout = 'contiguous'): InputSpec => ({
  shape,
  kind: 'value',
  layout,
  value: (random) => low + (high - low) * random(),
});

/** Floating input of given values, repeated to fill the shape. */
export const given = (shape: readonly number[], values: readonly number[]): InputSpec => ({
  shape,
  kind: 'value',
  layout: 'contiguous',
  value: (_, at) => values[at % values.length],
});

/** int32 ids in [0, limit). */
export const ids = (count: number, limit: number): InputSpec => ({
  shape: [count],
  kind: 'int32',
  layout: 'contiguous',
  value: (random) => Math.floor(limit * random()),
});

export const integers = (shape: readonly number[], values: readonly number[]): InputSpec => ({
  ...given(shape, values),
  kind: 'int32',
});

export const flags = (shape: readonly number[]): InputSpec => ({
  shape,
  kind: 'bool',
  layout: 'contiguous',
  value: (random) => (random() < 0.5 ? 0 : 1),
});

/** In the accumulation dtype: statistics, coefficients, gradients of parameters. */
export const accumulator = (shape: readonly number[], low = -1, high = 1): InputSpec => ({
  ...input(shape, low, high),
  kind: 'accumulator',
});

export function dtypeOf(spec: InputSpec, dtype: DType): DType {
  if (spec.kind === 'value') return dtype;
  return spec.kind === 'accumulator' ? accumulationDType(dtype) : spec.kind;
}

/** The values of a case's inputs, as the dtypes hold them: float64 references see what the op sees. */
export function hostInputs(c: OpCase, dtype: DType): Host[] {
  const random = randomSource(c.name);
  return c.inputs.map((spec) => {
    const values = Float64Array.from({ length: sizeOf(spec.shape) }, (_, at) =>
      roundTo(dtypeOf(spec, dtype), spec.value(random, at)),
    );
    return host(spec.shape, values, dtypeOf(spec, dtype));
  });
}

/** Contiguous tensors of host values. */
export const toTensor = (x: Host, device: Device, dtype: DType = x.dtype ?? 'float64'): Tensor =>
  Tensor.from(x.values, { shape: x.shape, dtype, device });

/** The same values in another place in memory, by differentiable ops. */
export function layOut(x: Tensor, layout: Layout): Tensor {
  if (layout === 'contiguous') return x;
  if (layout === 'transposed') return transpose(transpose(x).asContiguous());
  const axis = x.ndim - 1;
  return slice(concat([slice(x, axis, 0, 1), x, x], axis), axis, 1, 1 + x.shape[axis]);
}

/** A case's op on contiguous tensors, which it lays out as the case says. */
export const call =
  (c: OpCase, at: Place) =>
  (...inputs: Tensor[]): Tensor[] =>
    [c.run(at, ...inputs.map((x, i) => layOut(x, c.inputs[i].layout)))].flat() as Tensor[];
