// How long until something runs: importing the package in a fresh process, the first op, loading a model.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, relative, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { load, packageEntry, root } from './build.mjs';
import { measureOnce } from './harness.mjs';
import { smollm2 } from './shapes.mjs';

/** Milliseconds that a fresh process reports for the body of a module. */
function fresh(body) {
  const args = ['--input-type=module', '--eval', body];
  const { stdout, stderr, status } = spawnSync(process.execPath, args, { cwd: root, encoding: 'utf8' });
  if (status !== 0) throw new Error(stderr);
  return Number(stdout) / 1e3;
}

function repeated(body, times = 7) {
  const samples = Array.from({ length: times }, () => fresh(body)).sort((a, b) => a - b);
  return { best: samples[0], median: samples[times >> 1], samples: times };
}

/** Model folders to load: KEELGRAD_BENCH_MODELS (comma-separated), and the demo's. */
const modelFolders = () =>
  [...(process.env.KEELGRAD_BENCH_MODELS?.split(',') ?? []), join(root, 'assets', 'demo', 'model')]
    .map((folder) => resolve(folder))
    .filter((folder) => existsSync(join(folder, 'config.json')));

/** Loads a folder several times; everything is read and converted before the clock stops. */
async function timeLoading(folder, device) {
  const { loadModel } = await load('src/io/model-folder.js');
  const { synchronize } = await load('src/tensor/storage.js');
  const run = async () => {
    const model = await loadModel(folder, { device });
    synchronize(device);
    model.dispose();
  };
  return measureOnce(run, 5);
}

/** A folder of SmolLM2-135M's shape with fresh bfloat16 weights (269 MB), made, loaded and removed. */
async function timeSmolLM2(device) {
  const { createModel } = await load('src/models/initialize.js');
  const { parseModelConfig } = await load('src/models/config.js');
  const { saveModel } = await load('src/io/model-folder.js');
  const folder = mkdtempSync(join(tmpdir(), 'keelgrad-bench-'));
  try {
    const model = createModel(parseModelConfig(smollm2), { seed: 1, device });
    await saveModel(model, folder, { dtype: 'bfloat16' });
    model.dispose();
    return await timeLoading(folder, device);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

export async function startupWork({ device }) {
  const entry = JSON.stringify(pathToFileURL(packageEntry()).href);
  const started = 'const start = performance.now();';
  const report = 'process.stdout.write(String(performance.now() - start));';
  const loading = modelFolders().map((folder) => ({
    section: 'startup',
    name: `loadModel ${relative(root, folder)}`,
    run: () => timeLoading(folder, device),
  }));
  return [
    {
      section: 'startup',
      name: "import 'keelgrad'",
      run: async () => repeated(`${started} await import(${entry}); ${report}`),
    },
    {
      section: 'startup',
      name: 'import and first op',
      run: async () =>
        repeated(`${started} const { Tensor } = await import(${entry}); Tensor.from([1, 2]).sum().item(); ${report}`),
    },
    {
      section: 'startup',
      name: 'loadModel, shape of SmolLM2-135M, bfloat16 to float32',
      run: () => timeSmolLM2(device),
    },
    ...loading,
  ];
}
