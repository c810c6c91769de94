// Between files and tensors: mapped safetensors into device memory in a dtype, and tensors back into file bytes.

import { statSync } from 'node:fs';
import { KeelgradError } from '../errors.js';
import { cast, clone, contiguous } from '../ops/movement.js';
import type { DType } from '../tensor/dtype.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import { type Device, Storage, withTag } from '../tensor/storage.js';
import { Tensor } from '../tensor/tensor.js';
import type { SafetensorsDtype, TensorLocation } from './safetensors.js';
import type { TensorSource } from './safetensors-write.js';

const readable: Partial<Record<SafetensorsDtype, DType>> = {
  F64: 'float64',
  F32: 'float32',
  BF16: 'bfloat16',
  F16: 'float16',
};
const fileDtypes: Partial<Record<DType, SafetensorsDtype>> = {
  float64: 'F64',
  float32: 'F32',
  bfloat16: 'BF16',
  float16: 'F16',
};

const unreadable = (location: TensorLocation): KeelgradError =>
  new KeelgradError(
    `${location.file}: tensor "${location.name}": expected F32, F64, BF16 or F16 weights, found ${location.dtype}; convert the model first`,
  );

/** Refuses tensors of integers and the like: before anything is read. */
export function checkReadable(locations: Iterable<TensorLocation>): void {
  for (const location of locations) if (!readable[location.dtype]) throw unreadable(location);
}

/** Reads tensors out of mapped files. Files stay mapped until `dispose`; what was read is a copy. */
export class WeightReader {
  private readonly files = new Map<string, Storage>();
  private latest: Tensor | null = null;

  /** The tensor at a location, converted to `dtype`, owned by the caller. */
  read(location: TensorLocation, dtype: DType, device: Device): Tensor {
    const stored = readable[location.dtype];
    if (!stored) throw unreadable(location);
    let file = this.files.get(location.file);
    if (!file) {
      file = Storage.map(location.file, statSync(location.file).size);
      this.files.set(location.file, file);
    }
    const storage = file;
    const read = device === 'cpu' ? readHere : readThere;
    const tensor = detachFromScope(
      scope(() => withTag('weights', () => read(storage, location, stored, dtype, device))),
    );
    this.latest = tensor;
    return tensor;
  }

  /** Resolves when everything that was asked for has been copied; until then `dispose` would block. */
  async settled(): Promise<void> {
    if (!this.latest) return;
    using element = this.latest.view([Math.min(1, this.latest.size)], [1]);
    await element.bytes();
  }

  dispose(): void {
    for (const file of this.files.values()) file.release();
    this.files.clear();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}

type Read = (file: Storage, location: TensorLocation, stored: DType, dtype: DType, device: Device) => Tensor;

/** On the CPU the file is memory: a tensor over it, copied or cast. */
const readHere: Read = (file, { shape, begin }, stored, dtype) => {
  const view = new Tensor({ storage: file.retain(), dtype: stored, shape, byteOffset: begin });
  return stored === dtype ? clone(view) : cast(view, dtype);
};

/** On another device the file's bytes go there as they are, and are cast there. */
const readThere: Read = (file, { shape, begin }, stored, dtype, device) => {
  const raw = Tensor.empty(shape, { dtype: stored, device });
  if (raw.storage.bytes > 0) raw.storage.readFrom(file, begin, raw.storage.bytes);
  return stored === dtype ? raw : cast(raw, dtype);
};

/** A tensor as a source for the safetensors writer, cast to `dtype` when its turn comes. */
export function tensorSource(name: string, tensor: Tensor, dtype: DType): TensorSource {
  return {
    name,
    dtype: fileDtypes[dtype]!,
    shape: tensor.shape,
    data: async () => {
      const converted = detachFromScope(scope(() => contiguous(cast(tensor, dtype))));
      try {
        return await converted.bytes();
      } finally {
        converted.dispose();
      }
    },
  };
}
