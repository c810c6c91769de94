// Tables of the rotary position embedding, computed in float64.
import { KeelgradError } from '../errors.js';
import type { DType } from '../tensor/dtype.js';
import { detachFromScope } from '../tensor/scope.js';
import { type Device, withTag } from '../tensor/storage.js';
import { Tensor } from '../tensor/tensor.js';
import type { Llama3RopeScaling, ModelConfig } from './config.js';

/** Llama 3's scaling of one frequency: long wavelengths are stretched by `factor`, short ones kept, those between mixed. */
function scaled(frequency: number, s: Llama3RopeScaling): number {
  const wavelength = (2 * Math.PI) / frequency;
  if (wavelength < s.originalMaxPositions / s.highFreqFactor) return frequency;
  if (wavelength > s.originalMaxPositions / s.lowFreqFactor) return frequency / s.factor;
  const smooth = (s.originalMaxPositions / wavelength - s.lowFreqFactor) / (s.highFreqFactor - s.lowFreqFactor);
  return ((1 - smooth) * frequency) / s.factor + smooth * frequency;
}

/** `headDim / 2` inverse frequencies (Su et al. 2021, Eq. 15, with the configuration's scaling). */
export function inverseFrequencies(config: ModelConfig): Float64Array {
  return Float64Array.from({ length: config.headDim / 2 }, (_, i) => {
    const frequency = config.ropeTheta ** ((-2 * i) / config.headDim);
    return config.ropeScaling ? scaled(frequency, config.ropeScaling) : frequency;
  });
}

/** Cosines and sines by position, made for as many positions as were asked for and kept. */
export class RopeTable {
  private readonly config: ModelConfig;
  private table: Tensor | null = null;

  constructor(config: ModelConfig) {
    this.config = config;
  }

  /** `[P, headDim]` with P >= positions: cosines, then sines, in `dtype`. */
  get(positions: number, dtype: DType, device: Device): Tensor {
    const { maxPositions } = this.config;
    if (positions > maxPositions)
      throw new KeelgradError(
        `a sequence of ${positions} tokens is longer than the model's ${maxPositions} positions; set a smaller max length`,
      );
    const present = this.table;
    if (present && present.shape[0] >= positions && present.dtype === dtype && present.device === device)
      return present;
    present?.dispose();
    const rows = Math.min(maxPositions, 2 ** Math.ceil(Math.log2(Math.max(positions, 64))));
    this.table = withTag('cache', () => detachFromScope(this.make(rows, dtype, device)));
    return this.table;
  }

  private make(rows: number, dtype: DType, device: Device): Tensor {
    const frequencies = inverseFrequencies(this.config);
    const half = frequencies.length;
    const values = new Float64Array(rows * 2 * half);
    for (let p = 0; p < rows; p++)
      for (let i = 0; i < half; i++) {
        values[p * 2 * half + i] = Math.cos(p * frequencies[i]);
        values[p * 2 * half + half + i] = Math.sin(p * frequencies[i]);
      }
    return Tensor.from(values, { shape: [rows, 2 * half], dtype, device });
  }

  dispose(): void {
    this.table?.dispose();
    this.table = null;
  }
}
