#!/usr/bin/env node
// Builds the addon with cmake-js, incrementally: what `npm run build:native`, `prepare`, binding.gyp and prebuildify call.
// Output: build/Release/keelgrad.node; CMake keeps its own files in build/cmake, away from those of node-gyp.
// The CUDA backend is part of it where nvcc is found (cmake/cuda.cmake); KEELGRAD_CUDA=0 leaves it out, =1 makes its
// absence an error. KEELGRAD_SKIP_NATIVE=1 skips it all, CMAKE_BUILD_PARALLEL_LEVEL sets the number of jobs.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, realpathSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { delimiter, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const cmakeFolder = join(root, 'build', 'cmake');
const outputFolder = join(root, 'build', 'Release');

/** A checkout that was moved or copied with its build folder must configure anew: CMake's cache holds absolute paths. */
function forgetForeignCache() {
  const cache = join(cmakeFolder, 'CMakeCache.txt');
  if (!existsSync(cache)) return;
  const home = /^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$/m.exec(readFileSync(cache, 'utf8'))?.[1];
  if (!home || !existsSync(home) || realpathSync(home) !== realpathSync(root)) rmSync(cmakeFolder, { recursive: true });
}

/** CMake looks for nvcc when it configures: once, unless what it goes by has changed. */
function configureAnewForCuda() {
  const stamp = join(cmakeFolder, 'cuda-environment');
  const names = ['KEELGRAD_CUDA', 'CUDA_HOME', 'CUDA_PATH', 'VIRTUAL_ENV'];
  const nvcc = (process.env.PATH ?? '').split(delimiter).find((folder) => existsSync(join(folder, 'nvcc')));
  const now = [...names.map((name) => `${name}=${process.env[name] ?? ''}`), `nvcc=${nvcc ?? ''}`, ''].join('\n');
  const before = existsSync(stamp) ? readFileSync(stamp, 'utf8') : '';
  if (before !== now) rmSync(join(cmakeFolder, 'CMakeCache.txt'), { force: true });
  mkdirSync(cmakeFolder, { recursive: true });
  writeFileSync(stamp, now);
}

function build() {
  const require = createRequire(import.meta.url);
  const cmakeJs = join(dirname(require.resolve('cmake-js/package.json')), 'bin', 'cmake-js');
  const jobs = process.env.CMAKE_BUILD_PARALLEL_LEVEL ?? String(availableParallelism());
  const output = `--CDCMAKE_LIBRARY_OUTPUT_DIRECTORY=${outputFolder}`;
  const args = [cmakeJs, 'compile', '--log-level', 'warn', '--out', cmakeFolder, output, '--parallel', jobs];
  return spawnSync(process.execPath, args, { cwd: root, stdio: 'inherit' }).status ?? 1;
}

if (process.env.KEELGRAD_SKIP_NATIVE !== '1') {
  forgetForeignCache();
  configureAnewForCuda();
  const start = Date.now();
  const status = build();
  if (status !== 0) {
    console.error(
      'keelgrad: the native addon did not build. Expected: a C++17 compiler, cmake >= 3.18 and make or ninja.\n' +
        'Install them (Debian: apt-get install g++ cmake make), then run: npm run build:native',
    );
    process.exit(status);
  }
  const megabytes = (statSync(join(outputFolder, 'keelgrad.node')).size / 1e6).toFixed(1);
  console.log(`keelgrad: addon of ${megabytes} MB, built in ${Math.round((Date.now() - start) / 1000)} s`);
}
