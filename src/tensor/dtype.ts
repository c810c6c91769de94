// Element types: names, sizes, promotion, host arrays. The numbers match native/runtime/dtype.h.

export type DType = 'float32' | 'float64' | 'bfloat16' | 'float16' | 'int32' | 'uint8' | 'bool';

/** What `data()` returns: bfloat16 and float16 are widened to float32 on the way out. */
export type HostArray = Float32Array | Float64Array | Int32Array | Uint8Array;

interface DTypeInfo {
  id: number;
  size: number;
  short: string;
  floating: boolean;
  /** Position in the promotion order. */
  rank: number;
}

export const dtypes: Readonly<Record<DType, DTypeInfo>> = {
  float32: { id: 1, size: 4, short: 'f32', floating: true, rank: 5 },
  float64: { id: 2, size: 8, short: 'f64', floating: true, rank: 6 },
  bfloat16: { id: 3, size: 2, short: 'bf16', floating: true, rank: 4 },
  float16: { id: 4, size: 2, short: 'f16', floating: true, rank: 3 },
  int32: { id: 5, size: 4, short: 'i32', floating: false, rank: 2 },
  uint8: { id: 6, size: 1, short: 'u8', floating: false, rank: 1 },
  bool: { id: 7, size: 1, short: 'bool', floating: false, rank: 0 },
};

export const isFloating = (dtype: DType): boolean => dtypes[dtype].floating;

/**
 * The dtype of an operation on two tensors: the later one of bool, uint8, int32, float16, bfloat16, float32, float64;
 * float16 with bfloat16 gives float32. JavaScript numbers never promote: they take the tensor's dtype.
 */
export function promote(a: DType, b: DType): DType {
  if (a === b) return a;
  if ((a === 'float16' && b === 'bfloat16') || (a === 'bfloat16' && b === 'float16')) return 'float32';
  return dtypes[a].rank > dtypes[b].rank ? a : b;
}

/** The dtypes that models compute in. */
export type ComputeDType = 'float32' | 'float64' | 'bfloat16';

/** What is kept in which dtype while a model computes in another. */
export interface DTypePolicy {
  /** Backbone weights as the kernels read them, activations, the residual stream. */
  compute: ComputeDType;
  /** Sums inside kernels, log-probabilities, norm and attention statistics, rotary tables, losses. */
  reductions: 'float32' | 'float64';
  /** Buffers in which gradients are accumulated. */
  gradients: 'float32' | 'float64';
  /** The weights that the optimizer steps, and its moments. */
  master: 'float32' | 'float64';
  /** LoRA matrices beside the backbone. */
  adapters: 'float32' | 'float64';
  /** Saved weights, unless a cast is asked for: rounding AdamW's small updates to bfloat16 would lose most of them. */
  files: 'float32' | 'float64';
}

const wide = {
  reductions: 'float32',
  gradients: 'float32',
  master: 'float32',
  adapters: 'float32',
  files: 'float32',
} as const;
const widest = {
  reductions: 'float64',
  gradients: 'float64',
  master: 'float64',
  adapters: 'float64',
  files: 'float64',
} as const;

/** The one table of dtype decisions, by compute dtype. Everything that allocates asks it. */
export const dtypePolicies: Readonly<Record<ComputeDType, DTypePolicy>> = {
  float32: { compute: 'float32', ...wide },
  bfloat16: { compute: 'bfloat16', ...wide },
  float64: { compute: 'float64', ...widest },
};

/** The row of the table for tensors of `dtype`; dtypes that nothing computes in are treated as float32. */
export const policyOf = (dtype: DType): DTypePolicy =>
  dtype === 'float64' || dtype === 'bfloat16' ? dtypePolicies[dtype] : dtypePolicies.float32;

/** The dtype in which sums over `dtype` are kept: `reductions` of the table. */
export const accumulationDType = (dtype: DType): 'float32' | 'float64' => policyOf(dtype).reductions;

/** A zeroed host array for `count` elements. Only dtypes that JavaScript has an array for. */
export function hostArray(dtype: DType, count: number): HostArray {
  switch (dtype) {
    case 'float32':
      return new Float32Array(count);
    case 'float64':
      return new Float64Array(count);
    case 'int32':
      return new Int32Array(count);
    case 'uint8':
    case 'bool':
      return new Uint8Array(count);
    default:
      throw new TypeError(`[data] ${dtype} has no JavaScript array; cast to float32 first`);
  }
}
