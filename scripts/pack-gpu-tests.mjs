// Packs the GPU tests and the GPU benchmark into one folder for a machine that has a GPU, CUDA and Python 3, but neither Node
// nor npm nor a network: run.sh, the app (JavaScript, addon without symbols, recorded values, demo model) as app.tar.xz, and Node as node.xz.
// Copy the folder there and call run.sh. Values of KEELGRAD_SHARED go into that folder only.
//   node scripts/pack-gpu-tests.mjs [--out build/gpu-tests] [--addon FILE] [--with FILE]... [--open]
// --addon: another addon than the built one; --with: a file to lie beside it; --open: only the app, not compressed.
import { execFileSync } from 'node:child_process';
import { chmodSync, cpSync, existsSync, mkdirSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { basename, dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';
import { rolldown } from 'rolldown';
import { stages } from '../test/gpu/stages.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));
const mostMegabytes = 60;
/** What of KEELGRAD_SHARED the packed tests read: small models and recorded values. */
const sharedParts = ['golden', 'data/models/stories260K', 'data/configs'];
/** And what lies among that without a test of a stage that needs it: float32 runs, logs, enumerations, weights that have a summary. */
const unread =
  /\.md$|^golden\/training\/.*(\/final\.safetensors|\/final_float64run\.safetensors|\/adapter_final\/|\/log\.json|\/batches\.json)|^golden\/spo\/enumerable\//;
/** Found by Node at run time: one asks for it by name, the other brings a binary. */
const packages = { 'node-gyp-build': /./, tokenizers: /^(index\.js|package\.json|tokenizers\.linux-x64-gnu\.node)$/ };

const sources = () =>
  readdirSync(join(root, 'test'), { recursive: true })
    .map((file) => join('test', file))
    .filter((file) => file.endsWith('.test.ts'))
    .sort();

/** A file is meant by its name or by `folder/*.test.ts`. */
const isIn = (file, globs = []) =>
  globs.some((glob) => file === glob || (basename(glob) === '*.test.ts' && dirname(glob) === dirname(file)));

/** The stages with their globs replaced by files. */
function listed() {
  const files = sources();
  return stages.map(({ files: wanted, except, ...stage }) => ({
    ...stage,
    files: files.filter((file) => isIn(file, wanted) && !isIn(file, except)),
  }));
}

/** JavaScript of the tests and of all that they import, file by file, so that import.meta means what it did. */
async function bundle(app, tests) {
  const bench = ['bench/gpu/main.mjs', 'bench/gpu/child.mjs'].filter((file) => existsSync(join(root, file)));
  const build = await rolldown({
    cwd: root,
    input: [...tests, 'test/gpu/runner/main.ts', 'test/gpu/runner/worker.ts', ...bench],
    platform: 'node',
    external: Object.keys(packages),
    resolve: { extensionAlias: { '.js': ['.ts', '.js'] }, alias: { vitest: join(root, 'test/gpu/runner/vitest.ts') } },
    transform: { target: 'node20' },
    logLevel: 'silent',
  });
  const names = { entryFileNames: '[name].js', chunkFileNames: '[name].js' };
  await build.write({ dir: app, format: 'esm', preserveModules: true, preserveModulesRoot: root, ...names });
  await build.close();
}

function copyPackages(app) {
  for (const [name, wanted] of Object.entries(packages)) {
    const from = join(root, 'node_modules', name);
    for (const file of readdirSync(from).filter((f) => wanted.test(f)))
      cpSync(join(from, file), join(app, 'node_modules', name, file), { recursive: true });
  }
}

function copyData(app, recorded) {
  cpSync(join(root, 'package.json'), join(app, 'package.json'));
  cpSync(join(root, 'assets'), join(app, 'assets'), { recursive: true });
  cpSync(join(root, 'test', 'fixtures'), join(app, 'test', 'fixtures'), { recursive: true });
  const shared = resolve(root, process.env.KEELGRAD_SHARED ?? '../shared');
  const isRead = (file) => !unread.test(`${relative(shared, file)}${statSync(file).isDirectory() ? '/' : ''}`);
  for (const part of sharedParts.filter((p) => recorded && existsSync(join(shared, p))))
    cpSync(join(shared, part), join(app, 'shared', part), { recursive: true, filter: isRead });
  const python = join('bench', 'gpu', 'peer.py');
  if (existsSync(join(root, python))) cpSync(join(root, python), join(app, python));
}

function copyAddon(app, addon, more) {
  if (!existsSync(addon)) throw new Error(`${addon} is not there; build it: npm run build:native`);
  execFileSync('strip', ['-o', join(app, 'keelgrad.node'), addon]);
  for (const file of more) cpSync(file, join(app, basename(file)));
}

/** The app folder: everything but Node; without `recorded` the values of KEELGRAD_SHARED are read where they are. */
export async function packApp(app, { addon, more = [], recorded = true }) {
  rmSync(app, { recursive: true, force: true });
  mkdirSync(app, { recursive: true });
  const list = listed();
  await bundle(app, [...new Set(list.flatMap((stage) => stage.files))]);
  writeFileSync(join(app, 'stages.json'), JSON.stringify(list));
  copyPackages(app);
  copyData(app, recorded);
  copyAddon(app, addon, more);
  // Recorded files may be read-only: what was copied from them is not.
  execFileSync('chmod', ['-R', 'u+w', app]);
}

/** Machine code packs better with its jumps made absolute. */
const filter = process.arch === 'x64' ? ['--x86'] : [];

/** Node without symbols, compressed; made once a version, since it takes a minute. */
function compressedNode() {
  const kept = join(root, 'build', `node-${process.version}-${process.arch}.xz`);
  if (!existsSync(kept)) {
    const stripped = `${kept}.stripped`;
    mkdirSync(dirname(kept), { recursive: true });
    execFileSync('strip', ['-o', stripped, process.execPath]);
    execFileSync('xz', ['-T0', ...filter, '--lzma2=preset=6', stripped]);
    cpSync(`${stripped}.xz`, kept);
    rmSync(`${stripped}.xz`);
  }
  return kept;
}

const runScript = `#!/bin/sh
# Runs the GPU tests: run.sh [stage...] [--list|--collect] [--jobs N] [--deadline SECONDS], or the benchmark:
# run.sh bench [...]. Needs python3: for unpacking, once, into KEELGRAD_UNPACK (./unpacked), and for finding a cuBLAS that
# came with a package of its own. Results go to $OUT or ./results.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
to=\${KEELGRAD_UNPACK:-$here/unpacked}
if [ ! -x "$to/node" ]; then
  mkdir -p "$to"
  python3 - "$here" "$to" <<'END'
import lzma, os, shutil, sys, tarfile
here, to = sys.argv[1:]
with tarfile.open(os.path.join(here, "app.tar.xz")) as archive:
    archive.extractall(to)
part = os.path.join(to, "node.part")
with lzma.open(os.path.join(here, "node.xz")) as packed, open(part, "wb") as node:
    shutil.copyfileobj(packed, node, 1 << 20)
os.chmod(part, 0o755)
os.rename(part, os.path.join(to, "node"))
END
fi
if [ -z "\${KEELGRAD_CUBLAS:-}" ]; then
  cublas=$(python3 - <<'END'
import ctypes, glob, os, sys
names = ("libcublasLt.so.13", "libcublasLt.so.12")
def linked(name):
    try:
        return bool(ctypes.CDLL(name))
    except OSError:
        return False
homes = filter(None, [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"])
usual = [os.path.join(home, lib, name) for home in homes for lib in ("lib64", "lib") for name in names]
if not any(map(os.path.exists, usual)) and not any(map(linked, names)):
    found = [f for name in names for path in sys.path for f in glob.glob(os.path.join(path, "nvidia/*/lib", name))]
    print(os.path.dirname(found[0]) if found else "")
END
)
  [ -z "$cublas" ] || export KEELGRAD_CUBLAS="$cublas"
fi
export KEELGRAD_ADDON="\${KEELGRAD_ADDON:-$to/app/keelgrad.node}" KEELGRAD_SHARED="$to/app/shared"
results=\${OUT:-$here/results}
if [ "\${1:-}" = bench ]; then
  shift
  exec "$to/node" "$to/app/bench/gpu/main.js" --results "$results" "$@"
fi
exec "$to/node" "$to/app/test/gpu/runner/main.js" --results "$results" "$@"
`;

function archive(out, app) {
  execFileSync('tar', ['-C', out, '--owner=0', '--group=0', '-cJf', join(out, 'app.tar.xz'), 'app']);
  rmSync(app, { recursive: true });
  cpSync(compressedNode(), join(out, 'node.xz'));
  writeFileSync(join(out, 'run.sh'), runScript);
  chmodSync(join(out, 'run.sh'), 0o755);
}

const megabytes = (file) => statSync(file).size / 1e6;

function report(out) {
  const files = readdirSync(out).map((name) => [name, megabytes(join(out, name))]);
  const total = files.reduce((sum, [, size]) => sum + size, 0);
  for (const [name, size] of [...files, ['in all', total]]) console.log(`${size.toFixed(2).padStart(8)} MB  ${name}`);
  if (total > mostMegabytes) throw new Error(`expected at most ${mostMegabytes} MB, found ${total.toFixed(1)}`);
}

async function main() {
  const { values } = parseArgs({
    options: {
      out: { type: 'string', default: join(root, 'build', 'gpu-tests') },
      addon: { type: 'string', default: join(root, 'build', 'Release', 'keelgrad.node') },
      with: { type: 'string', multiple: true, default: [] },
      open: { type: 'boolean', default: false },
    },
  });
  const out = resolve(values.out);
  const app = join(out, 'app');
  rmSync(out, { recursive: true, force: true });
  await packApp(app, { addon: resolve(values.addon), more: values.with });
  if (values.open) return;
  archive(out, app);
  report(out);
}

if (import.meta.url === pathToFileURL(process.argv[1]).href)
  main().catch((error) => {
    console.error(error.message);
    process.exitCode = 1;
  });
