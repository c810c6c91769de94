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

/** The dtype in which sums over `dtype` are kept: float64 for float64, float32 for other floating types. */
export const accumulationDType = (dtype: DType): 'float32' | 'float64' => (dtype === 'float64' ? 'float64' : 'float32');

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
