// npm run test:gpu -- [stage...] [--device cuda] [--jobs N] [--results FOLDER] [--deadline SECONDS] [--list|--collect]
// The GPU tests on this machine: exactly what a packed folder runs elsewhere (pack-gpu-tests.mjs), from this checkout.
// With `bench` as the first argument the GPU benchmark (`npm run bench:gpu`), into bench/results. KEELGRAD_ADDON names another addon.
import { spawnSync } from 'node:child_process';
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { packApp } from './pack-gpu-tests.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));
const [first, ...rest] = process.argv.slice(2);
const bench = first === 'bench';
const args = bench || first === undefined ? rest : [first, ...rest];
const app = join(root, 'build', 'gpu', 'app');
const addon = resolve(root, process.env.KEELGRAD_ADDON ?? 'build/Release/keelgrad.node');
const shared = resolve(root, process.env.KEELGRAD_SHARED ?? '../shared');
// Tables of real sizes are kept: they lie beside those of the CPU.
const kept = bench && !args.includes('--tiny');
const results = ['--results', kept ? join(root, 'bench', 'results') : join(root, 'build', 'gpu', 'results')];

await packApp(app, { addon, recorded: false });
const entry = join(app, bench ? 'bench/gpu/main.js' : 'test/gpu/runner/main.js');
const env = { ...process.env, KEELGRAD_ADDON: addon, KEELGRAD_SHARED: shared };
process.exitCode = spawnSync(process.execPath, [entry, ...results, ...args], { stdio: 'inherit', env }).status ?? 1;
