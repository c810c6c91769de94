// The Tensor: a strided, typed view of a storage, plus its place on the tape. Knows no op: src/ops adds the methods.
import { addon } from '../native/addon.js';
import { type DType, dtypes, type HostArray, hostArray } from './dtype.js';
import { explainAllocation, explainFault } from './out-of-memory.js';
import { adopt, defineTensorTest } from './scope.js';
import { contiguousStrides, isContiguous, sizeOf } from './shape.js';
import { type Device, defaultDevice, Storage } from './storage.js';

/** A place on the tape (autograd/tape.ts). The tensor only carries it. */
export interface TapeNode {
  /** Bit L is set when the value depends on an input of the transform at level L. */
  readonly mask: number;
}

export interface TensorOptions {
  dtype?: DType;
  device?: Device;
}

export type NestedNumbers = number | readonly NestedNumbers[];

/** Parts of a tensor, as the constructor takes them. */
export interface TensorParts {
  storage: Storage;
  dtype: DType;
  shape: readonly number[];
  strides?: readonly number[];
  byteOffset?: number;
  node?: TapeNode | null;
  output?: number;
}

function allocate(device: Device, bytes: number, dtype: DType, shape: readonly number[]): Storage {
  try {
    return Storage.create(device, bytes);
  } catch (error) {
    throw explainAllocation(error, `${dtype} [${shape}] on ${device}`);
  }
}

export class Tensor {
  readonly storage: Storage;
  readonly dtype: DType;
  readonly shape: readonly number[];
  /** In elements; 0 along broadcast axes. */
  readonly strides: readonly number[];
  readonly byteOffset: number;
  readonly node: TapeNode | null;
  /** Which output of `node` this is. */
  readonly output: number;
  private live = true;

  /** Takes over one reference to `parts.storage`. */
  constructor(parts: TensorParts) {
    this.storage = parts.storage;
    this.dtype = parts.dtype;
    this.shape = parts.shape;
    this.strides = parts.strides ?? contiguousStrides(parts.shape);
    this.byteOffset = parts.byteOffset ?? 0;
    this.node = parts.node ?? null;
    this.output = parts.output ?? 0;
    adopt(this);
  }

  /**
   * A tensor from nested arrays or a typed array (whose type is the default dtype: float32 for numbers).
   *
   * @param shape given with a typed array; its product must be the array's length
   */
  static from(values: NestedNumbers | HostArray, options: TensorOptions & { shape?: readonly number[] } = {}): Tensor {
    const typed = ArrayBuffer.isView(values);
    const shape = options.shape ?? (typed ? [values.length] : nestedShape(values as NestedNumbers));
    const dtype = options.dtype ?? (typed ? dtypeOf(values) : 'float32');
    const flat = typed ? values : flatten(values as NestedNumbers, shape);
    if (flat.length !== sizeOf(shape))
      throw new RangeError(`[Tensor.from] expected ${sizeOf(shape)} values for shape [${shape}], found ${flat.length}`);
    const t = Tensor.empty(shape, { ...options, dtype });
    t.write(flat);
    return t;
  }

  /** Uninitialized. */
  static empty(shape: readonly number[], options: TensorOptions = {}): Tensor {
    for (const n of shape)
      if (!Number.isInteger(n) || n < 0)
        throw new RangeError(`[Tensor.empty] expected non-negative integers as shape, found [${shape}]`);
    const dtype = options.dtype ?? 'float32';
    if (!Object.hasOwn(dtypes, dtype))
      throw new TypeError(`[Tensor.empty] expected a dtype out of ${Object.keys(dtypes).join(', ')}, found ${dtype}`);
    const bytes = sizeOf(shape) * dtypes[dtype].size;
    if (!Number.isSafeInteger(bytes))
      throw new RangeError(`[Tensor.empty] expected a size that can be addressed, found [${shape}] of ${dtype}`);
    const device = options.device ?? defaultDevice();
    return new Tensor({ storage: allocate(device, bytes, dtype, shape), dtype, shape: [...shape] });
  }

  get device(): Device {
    return this.storage.device;
  }

  /** Number of elements. */
  get size(): number {
    return sizeOf(this.shape);
  }

  get ndim(): number {
    return this.shape.length;
  }

  get contiguous(): boolean {
    return isContiguous(this.shape, this.strides);
  }

  /** True once `dispose` has been called, directly or by a scope. */
  get disposed(): boolean {
    return !this.live;
  }

  /** Another tensor over the same storage: same values, own lifetime, same place on the tape. */
  alias(node: TapeNode | null = this.node, output: number = this.output): Tensor {
    this.requireLive('alias');
    const { dtype, shape, strides, byteOffset } = this;
    return new Tensor({ storage: this.storage.retain(), dtype, shape, strides, byteOffset, node, output });
  }

  /** A view with other shape and strides over the same storage; no copy, no place on the tape. Bounds are checked natively. */
  view(shape: readonly number[], strides: readonly number[], byteOffset: number = this.byteOffset): Tensor {
    this.requireLive('view');
    return new Tensor({ storage: this.storage.retain(), dtype: this.dtype, shape, strides, byteOffset });
  }

  /** The same values, cut off from the tape. */
  detach(): Tensor {
    return this.alias(null);
  }

  /** Lets go of the storage; a second call does nothing. Any later use of this tensor is an error. */
  dispose(): void {
    if (!this.live) return;
    this.live = false;
    this.storage.release();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  requireLive(op: string): void {
    if (!this.live)
      throw new Error(
        `[${op}] a tensor ${this.describe()} was used after it was disposed of; return it from its scope, or use alias()`,
      );
  }

  /** Overwrites all values of a contiguous tensor with host data (numbers are converted to the dtype). */
  write(values: ArrayLike<number>): void {
    this.requireLive('write');
    if (values.length !== this.size)
      throw new RangeError(`[write] expected ${this.size} values for ${this.describe()}, found ${values.length}`);
    if (!this.contiguous) throw new Error(`[write] expected a contiguous tensor, found strides [${this.strides}]`);
    this.storage.version++;
    const { stream, handle } = this.storage;
    addon().upload(stream, handle, this.byteOffset, encode(this.dtype, values));
  }

  /** The raw bytes of a contiguous tensor, in its own dtype; resolves when the work has run. */
  async bytes(): Promise<Uint8Array> {
    this.requireLive('bytes');
    this.requireContiguous('bytes');
    const target = new Uint8Array(this.size * dtypes[this.dtype].size);
    if (target.length === 0) return target;
    const { stream, handle } = this.storage;
    try {
      return await addon().download(stream, handle, this.byteOffset, target);
    } catch (error) {
      throw explainFault(error);
    }
  }

  /** The values, row-major; bfloat16 and float16 as float32. The event loop stays free. Rejects with a deferred error. */
  async data(): Promise<HostArray> {
    const ready = this.readable();
    try {
      return typed(ready.dtype, await ready.bytes());
    } finally {
      if (ready !== this) ready.dispose();
    }
  }

  /** The values, row-major. Blocks until the work has run; throws a deferred error. */
  dataSync(): HostArray {
    const ready = this.readable();
    const target = new Uint8Array(ready.size * dtypes[ready.dtype].size);
    const { stream, handle } = ready.storage;
    try {
      if (target.length > 0) addon().downloadSync(stream, handle, ready.byteOffset, target);
    } catch (error) {
      throw explainFault(error);
    } finally {
      if (ready !== this) ready.dispose();
    }
    return typed(ready.dtype, target);
  }

  /** The only value of a tensor of one element. Blocks. */
  item(): number {
    if (this.size !== 1) throw new RangeError(`[item] expected one element, found ${this.describe()}`);
    return this.dataSync()[0];
  }

  /** Like `f32[2,2]@cpu`. */
  toString(): string {
    return this.describe();
  }

  describe(): string {
    return `${dtypes[this.dtype].short}[${this.shape}]@${this.device}`;
  }

  private requireContiguous(op: string): void {
    if (!this.contiguous) throw new Error(`[${op}] expected a contiguous tensor, found strides [${this.strides}]`);
  }

  private readable(): Tensor {
    this.requireLive('data');
    const half = this.dtype === 'bfloat16' || this.dtype === 'float16';
    return this.contiguous && !half ? this : materialize(this, half ? 'float32' : this.dtype);
  }
}

defineTensorTest((value): value is Tensor => value instanceof Tensor);

// Set by ops/movement.ts, which knows the copy kernel: a contiguous copy in a dtype, owned by the caller.
let materialize: (t: Tensor, dtype: DType) => Tensor;
export function defineMaterialize(f: typeof materialize): void {
  materialize = f;
}

function dtypeOf(values: ArrayBufferView): DType {
  if (values instanceof Float32Array) return 'float32';
  if (values instanceof Float64Array) return 'float64';
  if (values instanceof Int32Array) return 'int32';
  if (values instanceof Uint8Array) return 'uint8';
  throw new TypeError(
    `[Tensor.from] expected a Float32Array, Float64Array, Int32Array or Uint8Array, found ${values.constructor.name}`,
  );
}

function nestedShape(values: NestedNumbers): number[] {
  const shape: number[] = [];
  for (let v: NestedNumbers = values; Array.isArray(v); v = v[0]) {
    shape.push(v.length);
    if (v.length === 0) break;
  }
  return shape;
}

function flatten(values: NestedNumbers, shape: readonly number[]): number[] {
  const flat: number[] = [];
  const walk = (v: NestedNumbers, axis: number): void => {
    if (axis === shape.length) {
      if (typeof v !== 'number')
        throw new TypeError(`[Tensor.from] expected numbers at depth ${axis}, found ${typeof v}`);
      flat.push(v);
      return;
    }
    if (!Array.isArray(v) || v.length !== shape[axis])
      throw new RangeError(`[Tensor.from] expected a rectangular array of shape [${shape}], found a ragged one`);
    for (const item of v) walk(item, axis + 1);
  };
  walk(values, 0);
  return flat;
}

function bytesOf(array: ArrayBufferView): Uint8Array {
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
}

function encode(dtype: DType, values: ArrayLike<number>): Uint8Array {
  if (dtype === 'bfloat16' || dtype === 'float16')
    return bytesOf(Uint16Array.from(values, dtype === 'bfloat16' ? toBfloat16 : toFloat16));
  const exact =
    (dtype === 'float32' && values instanceof Float32Array) ||
    (dtype === 'float64' && values instanceof Float64Array) ||
    (dtype === 'int32' && values instanceof Int32Array) ||
    (dtype === 'uint8' && values instanceof Uint8Array);
  if (exact) return bytesOf(values as Float32Array);
  const array = hostArray(dtype, values.length);
  for (let i = 0; i < values.length; i++) array[i] = dtype === 'bool' ? (values[i] ? 1 : 0) : values[i];
  return bytesOf(array);
}

const scratch32 = new Float32Array(1);
const scratchBits = new Uint32Array(scratch32.buffer);

function toBfloat16(value: number): number {
  scratch32[0] = value;
  const bits = scratchBits[0];
  if ((bits & 0x7fffffff) > 0x7f800000) return (bits >>> 16) | 0x40;
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}

function toFloat16(value: number): number {
  scratch32[0] = value;
  const bits = scratchBits[0];
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x47800000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    // Subnormal: a multiple of 2^-24, ties to even by the addition of 2^-1 in float32 arithmetic.
    scratchBits[0] = magnitude;
    scratch32[0] = scratch32[0] + 0.5;
    return sign | (scratchBits[0] - 0x3f000000);
  }
  const rounded = magnitude + 0xfff + ((magnitude >>> 13) & 1);
  return sign | ((rounded - 0x38000000) >>> 13);
}

function typed(dtype: DType, bytes: Uint8Array): HostArray {
  const { buffer } = bytes;
  if (dtype === 'float32') return new Float32Array(buffer);
  if (dtype === 'float64') return new Float64Array(buffer);
  if (dtype === 'int32') return new Int32Array(buffer);
  return bytes;
}
