// How long until something runs: importing the package in a fresh process, the first op, loading a model.
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { load, packageEntry, root } from './build.mjs';
import { measureOnce } from './harness.mjs';

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
function modelFolders() {
  const asked = process.env.KEELGRAD_BENCH_MODELS?.split(',') ?? [];
  return [...asked, join(root, 'assets', 'demo', 'model')].map((f) => resolve(f)).filter((f) => existsSync(f));
}

export async function startupWork({ device }) {
  const entry = JSON.stringify(pathToFileURL(packageEntry()).href);
  const started = 'const start = performance.now();';
  const report = 'process.stdout.write(String(performance.now() - start));';
  const { loadModel } = await load('src/io/model-folder.js');
  const { synchronize } = await load('src/tensor/storage.js');
  const loading = modelFolders().map((folder) => ({
    section: 'startup',
    name: `loadModel ${folder}`,
    run: () =>
      measureOnce(async () => {
        const model = await loadModel(folder, { device });
        synchronize(device);
        model.dispose();
      }, 3),
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
    ...loading,
  ];
}
