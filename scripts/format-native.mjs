// Formats native/ and the C++ under test/ with clang-format, or checks them (--check): part of `npm run format` and
// `npm run lint`. The version is pinned: it comes from PyPI, once, into a cache folder outside of the checkout. KEELGRAD_CLANG_FORMAT names
// another executable.
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { homedir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const version = '23.1.5';
const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const cacheRoot = process.env.XDG_CACHE_HOME ?? join(homedir(), '.cache');
const cache = join(cacheRoot, 'keelgrad', `clang-format-${version}`);

function run(command, args) {
  return spawnSync(command, args, { cwd: root, encoding: 'utf8', stdio: ['ignore', 'inherit', 'pipe'] });
}

/** The pinned clang-format, installed on first use. */
function clangFormat() {
  if (process.env.KEELGRAD_CLANG_FORMAT) return process.env.KEELGRAD_CLANG_FORMAT;
  const executable = join(cache, 'clang_format', 'data', 'bin', 'clang-format');
  if (!existsSync(executable)) {
    const pip = ['-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-deps', '--target', cache];
    const result = run('python3', [...pip, `clang-format==${version}`]);
    if (result.status !== 0) {
      console.error(
        `clang-format ${version} could not be installed with python3 -m pip: ${result.stderr ?? result.error?.message}\n` +
          'Install python3 and pip, or set KEELGRAD_CLANG_FORMAT to a clang-format of that version.',
      );
      process.exit(1);
    }
  }
  return executable;
}

// .def files are lists of macro rows that a formatter only harms.
const sources = ['native', 'test']
  .flatMap((folder) => readdirSync(join(root, folder), { recursive: true }).map((file) => join(folder, file)))
  .filter((file) => /\.(cc|h|cu|cuh)$/.test(file))
  .sort();
const mode = process.argv.includes('--check') ? ['--dry-run', '--Werror'] : ['-i'];
const result = run(clangFormat(), [...mode, '--style=file', ...sources]);
if (result.stderr) process.stderr.write(result.stderr);
if (result.status === 0) console.log(`clang-format: ${sources.length} files`);
else console.error('clang-format: C++ sources are not formatted; run: npm run format');
process.exit(result.status ?? 1);
