// Random tensors: counter-based (Philox 4x32-10), so the same seed and offset give the same bits on every device.
import { launch } from '../native/launch.js';
import type { DType } from '../tensor/dtype.js';
import type { Device } from '../tensor/storage.js';
import { Tensor } from '../tensor/tensor.js';

export interface RandomOptions {
  seed: number | bigint;
  /** First block of four 32-bit words; two draws whose blocks do not overlap are independent. */
  offset?: number;
  dtype?: DType;
  device?: Device;
}

function draw(kernel: string, shape: readonly number[], options: RandomOptions, dtype: DType): Tensor {
  const seed = BigInt.asUintN(64, BigInt(options.seed));
  const out = Tensor.empty(shape, { dtype, device: options.device });
  const words = [Number(seed & 0xffffffffn), Number(seed >> 32n), options.offset ?? 0];
  if (out.size > 0) launch(kernel, [out], words);
  return out;
}

/** Uniform in [0, 1). */
export const randomUniform = (shape: readonly number[], options: RandomOptions): Tensor =>
  draw('randomUniform', shape, options, options.dtype ?? 'float32');

/** Standard normal (Box-Muller). */
export const randomNormal = (shape: readonly number[], options: RandomOptions): Tensor =>
  draw('randomNormal', shape, options, options.dtype ?? 'float32');

/** 32 random bits an element, as int32. */
export const randomBits = (shape: readonly number[], options: RandomOptions): Tensor =>
  draw('randomBits', shape, options, 'int32');
