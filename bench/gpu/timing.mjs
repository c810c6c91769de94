// Times of work on a device, and of the same work at the peer. A sample is many runs between two synchronizations by the host's
// clock, so launches overlap with the work before them as in training; what is told is the median of samples.
import { spawnSync } from 'node:child_process';
import { performance } from 'node:perf_hooks';
import { synchronize } from '../../src/tensor/storage.js';

const now = () => performance.now() / 1e3;

/** Seconds of one run of `run(i)`; i counts runs, for those that rotate among buffers. */
export function timeDevice(device, run, { seconds = 0.2, samples = 5, warmup = 3 } = {}) {
  let i = 0;
  const sample = (count) => {
    synchronize(device);
    const start = now();
    for (let n = 0; n < count; n++) run(i++);
    synchronize(device);
    return (now() - start) / count;
  };
  for (let n = 0; n < warmup; n++) sample(1);
  const count = Math.max(1, Math.min(1000, Math.round(seconds / samples / sample(1))));
  const times = Array.from({ length: samples }, () => sample(count)).sort((a, b) => a - b);
  return times[samples >> 1];
}

/** Bytes in use on the first GPU, by whomever, as its driver counts them; undefined where there is no nvidia-smi. */
export function deviceBytes() {
  const query = ['--query-gpu=memory.used', '--format=csv,noheader,nounits', '--id=0'];
  const { status, stdout } = spawnSync('nvidia-smi', query, { encoding: 'utf8' });
  return status === 0 ? Number(stdout) * 2 ** 20 : undefined;
}

export function formatTime(s) {
  if (s === undefined || Number.isNaN(s)) return '';
  if (s >= 1) return `${s.toFixed(2)} s`;
  return s >= 1e-3 ? `${(s * 1e3).toFixed(2)} ms` : `${(s * 1e6).toFixed(1)} µs`;
}

export const formatBytes = (bytes) =>
  bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
