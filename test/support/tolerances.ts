// THE tolerance table: how far an op may be from its float64 definition, by class of op and dtype. An element passes where
// |found - expected| <= relative * |expected| + ofLargest * (largest |expected| of the tensor).
import type { DType } from '../../src/tensor/dtype.js';

export interface Tolerance {
  readonly relative: number;
  /** Of the largest element: for sums whose terms cancel. */
  readonly ofLargest: number;
}

/** What bounds an op's error; `exact` moves numbers without computing any. */
export type OpClass = 'exact' | 'elementwise' | 'reduction' | 'rows' | 'product' | 'fused' | 'head' | 'optimizer';

type Floating = 'float64' | 'float32' | 'bfloat16';
type Row = Readonly<Record<Floating, Tolerance>>;

const row = (float64: number[], float32: number[], bfloat16: number[]): Row => {
  const tolerance = ([relative, ofLargest]: number[]): Tolerance => ({ relative, ofLargest });
  return { float64: tolerance(float64), float32: tolerance(float32), bfloat16: tolerance(bfloat16) };
};

// The unit roundoffs: float64 1.1e-16, float32 6e-8, bfloat16 3.9e-3.
const values: Readonly<Record<OpClass, Row>> = {
  exact: row([0, 0], [0, 0], [0, 0]),
  // A few units in the last place; one rounding of the result in bfloat16.
  elementwise: row([1e-12, 0], [1e-6, 0], [4e-3, 0]),
  reduction: row([1e-12, 1e-14], [1e-6, 1e-6], [8e-3, 4e-3]),
  rows: row([1e-12, 1e-14], [2e-6, 1e-6], [4e-3, 4e-3]),
  product: row([1e-12, 1e-13], [1e-6, 2e-6], [4e-3, 4e-3]),
  fused: row([1e-12, 1e-13], [2e-6, 2e-6], [8e-3, 4e-3]),
  head: row([1e-12, 1e-13], [2e-6, 2e-6], [2e-6, 2e-6]),
  optimizer: row([1e-12, 1e-13], [1e-6, 1e-6], [4e-3, 0]),
};

// Gradients pass through several ops, each of which rounds; terms that cancel in a sum were rounded before it.
const gradients: Readonly<Record<OpClass, Row>> = {
  exact: row([0, 0], [0, 0], [0, 0]),
  elementwise: row([1e-12, 1e-14], [2e-6, 1e-6], [2e-2, 2e-2]),
  reduction: row([1e-12, 1e-13], [2e-6, 1e-6], [2e-2, 1e-2]),
  rows: row([1e-12, 1e-13], [2e-6, 2e-6], [2e-2, 1e-2]),
  product: row([1e-12, 1e-13], [1e-6, 2e-6], [4e-3, 4e-3]),
  fused: row([1e-12, 1e-12], [2e-6, 4e-6], [2e-2, 2e-2]),
  // A probability inherits the rounding of its logit, which is tens in size where rows are peaked.
  head: row([1e-12, 1e-12], [2e-6, 1e-5], [2e-2, 1e-2]),
  optimizer: row([1e-12, 1e-13], [1e-6, 1e-6], [4e-3, 0]),
};

/** The tolerance of a value or a gradient; what is not floating must be exact. */
export function toleranceOf(opClass: OpClass, dtype: DType, what: 'value' | 'gradient'): Tolerance {
  const table = what === 'value' ? values : gradients;
  if (dtype === 'float64' || dtype === 'float32' || dtype === 'bfloat16') return table[opClass][dtype];
  return { relative: 0, ofLargest: 0 };
}
