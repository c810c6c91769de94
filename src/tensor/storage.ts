// Storages: reference-counted device memory, and the devices it lives on.
//
// A Storage is freed when its last owner lets go (Tensor.dispose, scope, the tape); a finalizer is only the safety net.
import { type Addon, addon } from '../native/addon.js';
import { explainFault } from './out-of-memory.js';

/** `cpu`, or a CUDA device such as `cuda:0`; `cuda` means `cuda:0`. */
export type Device = 'cpu' | 'cuda' | `cuda:${number}`;

/** What memory is held for; memory reports are by tag. The order is that of native/runtime/storage.h. */
export const memoryTags = ['activations', 'weights', 'gradients', 'optimizer', 'cache'] as const;
export type MemoryTag = (typeof memoryTags)[number];

/** One name a device, so that whoever compares devices or looks them up finds one: `cuda` is `cuda:0`. */
export const canonicalDevice = (device: Device): Device => (device === 'cuda' ? 'cuda:0' : device);

let standard: Device = 'cpu';

/** Where tensors and models are made that name no device. */
export const defaultDevice = (): Device => standard;

/** Sets the default device. It is opened at its first use, and that throws where it is not available. */
export function setDefaultDevice(device: Device): void {
  standard = canonicalDevice(device);
}

const streams = new Map<Device, number>();

/** The stream of a device, opened on first use. Throws where the device is not available. */
export function streamOf(named: Device): number {
  const device = canonicalDevice(named);
  let stream = streams.get(device);
  if (stream === undefined) {
    stream = addon().openDevice(device);
    streams.set(device, stream);
    if (process.env.KEELGRAD_SYNC === '1') addon().setSynchronous(stream, true);
  }
  return stream;
}

/** Devices that have been used, with their streams. */
export const openDevices = (): ReadonlyMap<Device, number> => streams;

// V8 is told of external memory in steps of this size: a call for every tensor would cost more than the tensor.
const reportStep = 64 << 20;
let unreported = 0;
function reportExternal(bytes: number): void {
  unreported += bytes;
  if (Math.abs(unreported) < reportStep) return;
  addon().adjustExternal(unreported);
  unreported = 0;
}

interface Held {
  native: Addon;
  stream: number;
  handle: number;
  bytes: number;
}

const abandoned = new FinalizationRegistry<Held>((held) => {
  held.native.releaseStorage(held.stream, held.handle);
  reportExternal(-held.bytes);
});

let currentTag: MemoryTag = 'activations';

/** Runs `f` with new storages accounted under `tag`. */
export function withTag<T>(tag: MemoryTag, f: () => T): T {
  const saved = currentTag;
  currentTag = tag;
  try {
    return f();
  } finally {
    currentTag = saved;
  }
}

let written: Set<Storage> | undefined;

/** Runs `f`; the storages that it writes in place. */
export function recordWrites<T>(f: () => T): { result: T; written: ReadonlySet<Storage> } {
  const outer = written;
  const inside = new Set<Storage>();
  written = inside;
  try {
    return { result: f(), written: inside };
  } finally {
    written = outer;
  }
}

export class Storage {
  readonly device: Device;
  readonly stream: number;
  readonly handle: number;
  readonly bytes: number;
  private writes = 0;
  private references = 1;

  private constructor(device: Device, stream: number, handle: number, bytes: number) {
    this.device = device;
    this.stream = stream;
    this.handle = handle;
    this.bytes = bytes;
    abandoned.register(this, { native: addon(), stream, handle, bytes }, this);
    reportExternal(bytes);
  }

  /** Uninitialized memory. Throws `out of memory` with what is held by whom. */
  static create(device: Device, bytes: number): Storage {
    const stream = streamOf(device);
    const handle = addon().createStorage(stream, bytes, memoryTags.indexOf(currentTag));
    return new Storage(canonicalDevice(device), stream, handle, bytes);
  }

  /** A file, mapped read-only. `bytes` is its size. */
  static map(path: string, bytes: number): Storage {
    const stream = streamOf('cpu');
    return new Storage('cpu', stream, addon().mapFile(stream, path), bytes);
  }

  /** Copies bytes of a mapped file here, to the start; without a copy on the host in between. Returns at once. */
  readFrom(file: Storage, byteOffset: number, bytes: number): void {
    addon().uploadMapped(this.stream, this.handle, 0, file.stream, file.handle, byteOffset, bytes);
  }

  /** Fills this storage from one of another device, from a byte offset on. Returns at once. */
  copyFrom(source: Storage, byteOffset: number): void {
    addon().transfer(this.stream, this.handle, source.stream, source.handle, byteOffset);
  }

  /** Advances with every write in place; saved tensors remember it, so that a stale one is an error. */
  get version(): number {
    return this.writes;
  }
  set version(value: number) {
    this.writes = value;
    written?.add(this);
  }

  get live(): boolean {
    return this.references > 0;
  }

  /** True while nobody else holds this storage: it may then be written in place. */
  get exclusive(): boolean {
    return this.references === 1;
  }

  retain(): this {
    this.references++;
    return this;
  }

  release(): void {
    if (--this.references > 0) return;
    abandoned.unregister(this);
    reportExternal(-this.bytes);
    addon().releaseStorage(this.stream, this.handle);
  }
}

/** Counters of one device's memory, in bytes; `storages` is a number of live storages. */
export interface MemoryReport {
  storages: number;
  allocated: number;
  /** The most that was ever allocated at once, since the start or `resetPeakMemory`. */
  peak: number;
  /** Held from the system: allocated, or cached for reuse. */
  reserved: number;
  /** Held besides by kernels: intermediate results, the workspace of matrix products. Grows with the largest that was asked for. */
  scratch: number;
  byTag: Record<MemoryTag, number>;
}

/** Exact counters of what is allocated now. They count what JavaScript holds, whether or not the work has run. */
export function memory(device: Device = standard): MemoryReport {
  const [storages, allocated, peak, reserved, scratch, ...tags] = addon().memory(streamOf(device));
  const byTag = Object.fromEntries(memoryTags.map((tag, i) => [tag, tags[i]])) as Record<MemoryTag, number>;
  return { storages, allocated, peak, reserved, scratch, byTag };
}

export function resetPeakMemory(device: Device = standard): void {
  addon().resetPeak(streamOf(device));
}

/** Gives cached memory back to the system; returns the number of bytes. Waits for pending work. */
export function trimMemory(device: Device = standard): number {
  return addon().trim(streamOf(device));
}

/** Waits for all work that was enqueued on a device; throws its first unreported error. Blocks. */
export function synchronize(device: Device = standard): void {
  try {
    addon().synchronize(streamOf(device));
  } catch (error) {
    throw explainFault(error);
  }
}
