// Finds and loads the native addon; the only file that touches the `.node` file. Loading is lazy: importing keelgrad
// costs nothing until the first tensor.
import { createRequire } from 'node:module';
import { KeelgradError } from '../errors.js';
import { packageRoot } from '../package-root.js';

/** One row of the kernel contract (native/ops): names of tensors and attributes, separated by spaces. */
export interface KernelSignature {
  name: string;
  outputs: string;
  inputs: string;
  attributes: string;
}

export interface CudaDevice {
  name: string;
  /** Bytes. */
  memory: number;
  /** 80, 90, ... for 8.0, 9.0, ... */
  capability: number;
  /** Why it cannot be used; absent where it can. */
  reason?: string;
}

/** What CUDA is here. Versions are 13000 for 13.0; 0 where there is no driver, or no CUDA in this build. */
export interface CudaInfo {
  /** Whether this build contains the CUDA backend. */
  built: boolean;
  available: boolean;
  reason?: string;
  remedy?: string;
  driver: number;
  runtime: number;
  /** Shapes of products so far, in this process, whose rows may have other bits than in a product of more or fewer rows. */
  unplannedProducts?: number;
  /** The file of cuBLAS. */
  cublas?: string;
  devices: CudaDevice[];
}

/** The typed boundary. Handles and streams are numbers; bytes are Uint8Arrays. */
export interface Addon {
  commands: Float64Array;
  kernels: KernelSignature[];
  openDevice(device: string): number;
  createStorage(stream: number, bytes: number, tag: number): number;
  retainStorage(stream: number, handle: number): void;
  releaseStorage(stream: number, handle: number): void;
  mapFile(stream: number, path: string): number;
  submit(): void;
  upload(stream: number, handle: number, byteOffset: number, bytes: Uint8Array): void;
  uploadMapped(
    stream: number,
    handle: number,
    byteOffset: number,
    fileStream: number,
    fileHandle: number,
    fileOffset: number,
    bytes: number,
  ): void;
  transfer(stream: number, handle: number, fromStream: number, fromHandle: number, fromOffset: number): void;
  download(stream: number, handle: number, byteOffset: number, target: Uint8Array): Promise<Uint8Array>;
  downloadSync(stream: number, handle: number, byteOffset: number, target: Uint8Array): void;
  synchronize(stream: number): void;
  setSynchronous(stream: number, on: boolean): void;
  /** What is enqueued until endGraph runs and is recorded. */
  beginGraph(stream: number): void;
  endGraph(keep: true): number;
  endGraph(keep: false): undefined;
  replayGraph(stream: number, graph: number): void;
  dropGraph(stream: number, graph: number): void;
  graphCounts(stream: number, graph: number): number[];
  setThreads(count: number): void;
  getThreads(): number;
  trim(stream: number): number;
  resetPeak(stream: number): void;
  memory(stream: number): number[];
  adjustExternal(bytes: number): void;
  describe(): {
    isa: string;
    cpuFeatures: string[];
    cuda: CudaInfo;
  };
}

interface Finder {
  path(root: string): string;
}

let loaded: Addon | undefined;
let location = '';

/** The addon, loaded on first use. Throws an error that ends in a command to run. */
export function addon(): Addon {
  if (loaded) return loaded;
  const require = createRequire(import.meta.url);
  try {
    location = process.env.KEELGRAD_ADDON ?? (require('node-gyp-build') as Finder).path(packageRoot());
    loaded = require(location) as Addon;
  } catch (cause) {
    throw new KeelgradError(
      `keelgrad's native addon could not be loaded on ${process.platform}-${process.arch}: ${(cause as Error).message}\n` +
        'Expected a prebuilt binary in prebuilds/ or one built here in build/Release. Build it (needs a C++17 compiler and ' +
        'cmake): npm run build:native',
      { cause },
    );
  }
  return loaded;
}

/** Path of the loaded addon; empty before the first use. */
export function addonPath(): string {
  return location;
}
