// `keelgrad info`: versions, native layer, CPU and CUDA, or why one of them is not there and what to do.
// Must print what it can when the native layer does not load: that is when people run it.

import { cpus, totalmem } from 'node:os';
import type { RuntimeInfo } from '../native/info.js';
import type { InfoOptions } from '../train/options.js';
import { packageVersion } from '../train/run-folder.js';
import type { CliIo, Work } from './io.js';

interface Report {
  readonly keelgrad: string;
  readonly node: string;
  readonly platform: string;
  readonly cpu: string;
  readonly memory_gib: number;
  readonly native: RuntimeInfo | { readonly error: string };
}

async function gather(work: Work): Promise<Report> {
  const native = await work.runtimeInfo().catch((error: Error) => ({ error: error.message }));
  return {
    keelgrad: packageVersion(),
    node: process.versions.node,
    platform: `${process.platform}-${process.arch}`,
    cpu: cpus()[0]?.model.trim() || 'unknown',
    memory_gib: Math.round((totalmem() / 2 ** 30) * 10) / 10,
    native,
  };
}

function nativeRows(native: Report['native']): [string, string][] {
  if ('error' in native) return [['native', `not loaded: ${native.error}`]];
  const { cuda } = native;
  const rows: [string, string][] = [
    ['native', native.addon],
    ['kernels', native.isa],
    ['features', native.cpuFeatures.join(' ') || 'none'],
    ['threads', `${native.threads} of ${native.hardwareThreads}`],
  ];
  return rows.concat(cudaRows(cuda));
}

const version = (number: number): string => `${Math.floor(number / 1000)}.${Math.floor((number % 1000) / 10)}`;

function cudaRows(cuda: RuntimeInfo['cuda']): [string, string][] {
  const rows: [string, string][] = [['cuda', cuda.available ? 'available' : `not available: ${cuda.reason}`]];
  if (!cuda.available && cuda.remedy) rows.push(['', cuda.remedy]);
  if (cuda.built) {
    const driver = cuda.driver > 0 ? `a driver for ${version(cuda.driver)}` : 'no driver';
    rows.push(['', `built with CUDA ${version(cuda.runtime)}; ${driver}`]);
  }
  if (cuda.cublas) rows.push(['cublas', cuda.cublas]);
  cuda.devices.forEach((gpu, i) => {
    const facts = [
      `${(gpu.memory / 2 ** 30).toFixed(1)} GiB`,
      `compute capability ${(gpu.capability / 10).toFixed(1)}`,
    ];
    rows.push([`cuda:${i}`, [gpu.name, ...facts, ...(gpu.reason ? [`not usable: ${gpu.reason}`] : [])].join(', ')]);
  });
  return rows;
}

function table(report: Report): string {
  const rows: [string, string][] = [
    ['keelgrad', report.keelgrad],
    ['node', report.node],
    ['platform', report.platform],
    ['cpu', report.cpu],
    ['memory', `${report.memory_gib} GiB`],
    ...nativeRows(report.native),
  ];
  const indent = ' '.repeat(12);
  return rows.map(([name, text]) => `${name.padEnd(12)}${text.replaceAll('\n', `\n${indent}`)}\n`).join('');
}

/** Returns the exit code: 1 when the native layer does not load. */
export async function infoCommand(options: InfoOptions, io: CliIo, work: Work): Promise<number> {
  const report = await gather(work);
  io.stdout.write(options.json ? `${JSON.stringify(report, null, 2)}\n` : table(report));
  return 'error' in report.native ? 1 : 0;
}
