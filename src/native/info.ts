// What this machine and this build can do: the facts behind `keelgrad info`.
import { availableParallelism } from 'node:os';
import { addon, addonPath, type CudaInfo } from './addon.js';

export interface RuntimeInfo {
  addon: string;
  isa: string;
  cpuFeatures: string[];
  threads: number;
  hardwareThreads: number;
  cuda: CudaInfo;
}

/** Facts about the loaded native layer. */
export function runtimeInfo(): RuntimeInfo {
  const native = addon();
  return {
    addon: addonPath(),
    ...native.describe(),
    threads: native.getThreads(),
    hardwareThreads: availableParallelism(),
  };
}

/** Sets the number of compute threads of this process, shared by all worker threads of Node (1 to 256). */
export function setThreads(count: number): void {
  if (!Number.isInteger(count) || count < 1 || count > 256)
    throw new RangeError(`[setThreads] expected an integer from 1 to 256, found ${count}`);
  addon().setThreads(count);
}
