#!/usr/bin/env node
// Builds the engine with its CUDA backend over the SIMT layer (test/simt): the same kernel sources, run by the host.
// Output: <folder>/keelgrad.node, libkeelgrad-simt.so and the stand-in cuBLAS, for KEELGRAD_ADDON and tests in C++.
//   node scripts/build-simt.mjs [--out <folder>] [--sanitize address,undefined|thread] [--target <name>]
// --out: default build/simt, with -asan or -tsan for sanitizers.
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync, realpathSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const source = join(root, 'test', 'simt');
const suffixes = { '': '', 'address,undefined': '-asan', thread: '-tsan' };

const { values } = parseArgs({
  options: {
    out: { type: 'string' },
    sanitize: { type: 'string', default: '' },
    target: { type: 'string' },
  },
});
if (!(values.sanitize in suffixes)) {
  console.error(`build-simt: expected --sanitize address,undefined or thread, found ${values.sanitize}`);
  process.exit(1);
}
const out = resolve(values.out ?? join(root, 'build', `simt${suffixes[values.sanitize]}`));
const cmakeFolder = join(out, 'cmake');

/** A folder that was moved or copied must configure anew: CMake's cache holds absolute paths. */
function forgetForeignCache() {
  const cache = join(cmakeFolder, 'CMakeCache.txt');
  if (!existsSync(cache)) return;
  const home = /^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$/m.exec(readFileSync(cache, 'utf8'))?.[1];
  if (!home || !existsSync(home) || realpathSync(home) !== realpathSync(source))
    rmSync(cmakeFolder, { recursive: true });
}

/** cmake-js brings the headers of Node-API with it. */
function headers() {
  const fromRoot = createRequire(import.meta.url);
  const fromCmakeJs = createRequire(fromRoot.resolve('cmake-js/package.json'));
  return [fromCmakeJs('node-api-headers').include_dir, dirname(fromRoot.resolve('node-addon-api/package.json'))];
}

function cmake(args) {
  const { status, error } = spawnSync('cmake', args, { cwd: root, stdio: ['ignore', 'inherit', 'inherit'] });
  if (status === 0) return;
  console.error(`build-simt: failed: cmake ${args.join(' ')}${error ? `: ${error.message}` : ''}`);
  console.error(
    'Expected: a C++17 compiler, cmake >= 3.18 and make or ninja (Debian: apt-get install g++ cmake make).',
  );
  process.exit(status ?? 1);
}

forgetForeignCache();
const defines = {
  SIMT_OUTPUT: out,
  SIMT_SANITIZE: values.sanitize,
  NODE_HEADERS: headers().join(';'),
};
const generator = spawnSync('ninja', ['--version']).status === 0 ? ['-G', 'Ninja'] : [];
const define = Object.entries(defines).map(([name, value]) => `-D${name}=${value}`);
cmake(['-S', source, '-B', cmakeFolder, ...generator, ...define, '--log-level=WARNING']);
const jobs = process.env.CMAKE_BUILD_PARALLEL_LEVEL ?? String(availableParallelism());
cmake(['--build', cmakeFolder, '--parallel', jobs, ...(values.target ? ['--target', values.target] : [])]);
