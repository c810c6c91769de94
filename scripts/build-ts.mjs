// Compiles src/ to dist/: what `npm run build:ts` and `prepare` call. tsc checks, lowers to build/ts (incrementally) and writes
// the declarations; rolldown then joins what `import 'keelgrad'` loads into one chunk, since finding and reading 60 small files
// costs more than running them. Every module keeps a file of its own name in dist/, so nothing exists twice.
import { spawnSync } from 'node:child_process';
import { chmodSync, existsSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { rolldown } from 'rolldown';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const compiled = join(root, 'build', 'ts');
const dist = join(root, 'dist');

const sourceOf = (file) => join(root, 'src', file.replace(/(\.d\.ts|\.js)$/, '.ts'));
const filesIn = (folder, ending) =>
  existsSync(folder) ? readdirSync(folder, { recursive: true }).filter((file) => file.endsWith(ending)) : [];

function compile() {
  const compiler = join(dirname(createRequire(import.meta.url).resolve('typescript/package.json')), 'bin', 'tsc');
  const args = [compiler, '-p', join(root, 'tsconfig.build.json')];
  // Declarations that were deleted are not written again by an incremental run.
  if (!existsSync(join(dist, 'index.d.ts'))) rmSync(compiled, { recursive: true, force: true });
  const { status } = spawnSync(process.execPath, args, { cwd: root, stdio: 'inherit' });
  if (status !== 0) process.exit(status ?? 1);
  for (const [folder, ending] of [
    [compiled, '.js'],
    [dist, '.d.ts'],
  ])
    for (const file of filesIn(folder, ending)) if (!existsSync(sourceOf(file))) rmSync(join(folder, file));
}

/** The modules that an entry loads before its first line runs. */
function staticImports(entry, seen = new Set()) {
  if (seen.has(entry)) return seen;
  seen.add(entry);
  for (const [, target] of readFileSync(entry, 'utf8').matchAll(/^(?:import|export)\b[^;]*?['"](\.[^'"]+)['"];$/gm))
    staticImports(resolve(dirname(entry), target), seen);
  return seen;
}

async function bundle() {
  const core = staticImports(join(compiled, 'index.js'));
  const input = Object.fromEntries(filesIn(compiled, '.js').map((file) => [file.slice(0, -3), join(compiled, file)]));
  for (const file of filesIn(dist, '.js')) rmSync(join(dist, file));
  const build = await rolldown({ input, platform: 'node', external: /^[^./]/, treeshake: false });
  await build.write({
    dir: dist,
    format: 'esm',
    entryFileNames: '[name].js',
    chunkFileNames: 'chunks/[name].js',
    codeSplitting: { groups: [{ name: 'core', test: (id) => core.has(id) }] },
  });
  await build.close();
  chmodSync(join(dist, 'cli', 'main.js'), 0o755);
}

compile();
await bundle();
