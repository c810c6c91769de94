// Measurements of memory in processes of their own, by the driver's count: the backend keeps scratch blocks and workspaces
// once they were needed, and its counters are of tensors alone.
//   child.js KIND DEVICE TINY OPTIONS
import { spawnSync } from 'node:child_process';
import { pathToFileURL } from 'node:url';
import '../../src/ops/methods.js';
import { launch } from '../../src/native/launch.js';
import { synchronize } from '../../src/tensor/storage.js';
import { headWork } from './head.mjs';
import { sizes } from './shapes.mjs';
import { stepTimes } from './steps.mjs';
import { random } from './tensors.mjs';
import { deviceBytes } from './timing.mjs';

/** What the child says of a kind of work; `bytes` is undefined where the driver cannot be asked. */
export function inChild({ device, tiny }, kind, options = {}) {
  const args = [new URL(import.meta.url).pathname, kind, device, tiny ? 'tiny' : 'full', JSON.stringify(options)];
  const { status, stdout } = spawnSync(process.execPath, args, {
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  if (status !== 0) throw new Error(`the process that measures the memory of ${kind} ended with ${status}`);
  return JSON.parse(stdout);
}

const kinds = {
  /** What a pass takes beyond inputs and results, once cuBLAS and its workspace are there. */
  head({ device, size }, { withWeight }) {
    const [a, b, out] = Array.from({ length: 3 }, () => random([64, 64], { device }));
    launch('matmul', [out, a, b, null], [1, 0]);
    const { run, dispose } = headWork({ device, size }, withWeight);
    synchronize(device);
    const before = deviceBytes();
    run();
    synchronize(device);
    const after = deviceBytes();
    dispose();
    return { bytes: after === undefined ? undefined : after - before };
  },
  async large({ device, size }, { gradientCheckpointing }, start) {
    const more = { gradientCheckpointing };
    const { seconds, peak, used } = await stepTimes(device, size.llama, size.large, undefined, more);
    return { seconds, peak, bytes: used === undefined ? undefined : used - start };
  },
};

async function main([kind, device, scale, options]) {
  const start = deviceBytes();
  const tiny = scale === 'tiny';
  console.log(JSON.stringify(await kinds[kind]({ device, size: sizes(tiny), tiny }, JSON.parse(options), start)));
}

if (import.meta.url === pathToFileURL(process.argv[1]).href)
  main(process.argv.slice(2)).catch((error) => {
    console.error(error);
    process.exitCode = 1;
  });
