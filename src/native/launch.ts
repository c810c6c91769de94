// Enqueues kernels: writes a command into the shared buffer and submits it. What a kernel is named and takes comes from
// the native contract; nothing here grows with ops.
import { dtypes } from '../tensor/dtype.js';
import { explainFault } from '../tensor/out-of-memory.js';
import type { Tensor } from '../tensor/tensor.js';
import { type Addon, addon } from './addon.js';

let native: Addon | undefined;
let commands: Float64Array;
let ids: Map<string, number>;

function connect(): Addon {
  native = addon();
  commands = native.commands;
  ids = new Map(native.kernels.map((k, i) => [k.name, i]));
  return native;
}

/** The kernels of the contract, in order. */
export function kernelSignatures(): Addon['kernels'] {
  return (native ?? connect()).kernels;
}

/**
 * Enqueues `kernel` on the device of its tensors. Tensors stand in the order of native/ops/kernels.def, outputs first;
 * null is an absent optional one. Returns at once: errors of the arithmetic surface at the next read.
 */
export function launch(kernel: string, tensors: readonly (Tensor | null)[], attributes: readonly number[] = []): void {
  const library = native ?? connect();
  const id = ids.get(kernel);
  if (id === undefined) throw new Error(`[launch] no kernel is named ${kernel}`);
  let at = 4;
  let stream = -1;
  for (const t of tensors) {
    if (t === null) {
      commands[at] = -1;
      commands[at + 1] = 0;
      commands[at + 2] = 0;
      commands[at + 3] = 0;
      at += 4;
      continue;
    }
    t.requireLive(kernel);
    const { storage, shape, strides } = t;
    if (stream < 0) stream = storage.stream;
    else if (stream !== storage.stream) throw differentDevices(kernel, tensors);
    const n = shape.length;
    commands[at] = storage.handle;
    commands[at + 1] = dtypes[t.dtype].id;
    commands[at + 2] = t.byteOffset;
    commands[at + 3] = n;
    at += 4;
    for (let i = 0; i < n; i++) {
      commands[at + i] = shape[i];
      commands[at + n + i] = strides[i];
    }
    at += 2 * n;
  }
  for (let i = 0; i < attributes.length; i++) commands[at + i] = attributes[i];
  commands[0] = id;
  commands[1] = stream;
  commands[2] = tensors.length;
  commands[3] = attributes.length;
  try {
    library.submit();
  } catch (error) {
    const found = explainFault(error); // under KEELGRAD_SYNC=1
    if (found !== error) throw found;
    const shapes = tensors.map((t) => t?.describe() ?? 'none').join(', ');
    throw new Error(`[${kernel}] ${(error as Error).message} (${shapes})`, { cause: error });
  }
}

function differentDevices(kernel: string, tensors: readonly (Tensor | null)[]): Error {
  const found = tensors.map((t) => t?.describe() ?? 'none').join(', ');
  return new Error(`[${kernel}] expected tensors on one device, found ${found}; move them with to({ device })`);
}
