// Compiles what the benchmark runs: src/ and the op case list, to build/bench. Incremental; a second or two when unchanged.
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

export const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const output = join(root, 'build', 'bench');

/** Runs a command in the project and stops the benchmark where it fails. */
function run(command, args) {
  const { status } = spawnSync(command, args, { cwd: root, stdio: ['ignore', 2, 2] });
  if (status !== 0) throw new Error(`${[command, ...args].join(' ')} failed; see above`);
}

export function compile() {
  if (!existsSync(join(root, 'build', 'Release', 'keelgrad.node')) && !process.env.KEELGRAD_ADDON)
    run(process.execPath, [join(root, 'scripts', 'build-native.mjs')]);
  const tsc = join(dirname(createRequire(import.meta.url).resolve('typescript/package.json')), 'bin', 'tsc');
  try {
    run(process.execPath, [tsc, '-p', join(root, 'bench', 'tsconfig.json')]);
  } catch (error) {
    // Type errors are another check's business, as long as there is something to run.
    if (!existsSync(join(output, 'src', 'index.js'))) throw error;
  }
}

/** A compiled module, such as `src/ops/index.js`. */
export const load = (module) => import(pathToFileURL(join(output, module)).href);

/** dist/index.js, built where it is missing: what `import 'keelgrad'` loads. */
export function packageEntry() {
  const entry = join(root, 'dist', 'index.js');
  if (!existsSync(entry)) run(process.execPath, [join(root, 'scripts', 'build-ts.mjs')]);
  return entry;
}
