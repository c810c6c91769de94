// Checks the package as a user gets it: packs it with a prebuild, installs the tarball in an empty project without a
// compiler, runs a tensor op and the executable there. Needs the registry for the dependencies, and dist/ to be built.
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, realpathSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const allowed = /^(dist|prebuilds|assets)\/|^(package\.json|README\.md|LICENSE|CHANGELOG\.md)$/;
const entries = ['index', 'objectives/index', 'analyze/index'].flatMap((name) => [
  `dist/${name}.js`,
  `dist/${name}.d.ts`,
]);
const required = [...entries, 'dist/cli/main.js', 'LICENSE', 'README.md'];
const program = `
  import { Tensor } from 'keelgrad';
  import { corollary1 } from 'keelgrad/analyze';
  const x = Tensor.from([[1, 2], [3, 4]]);
  console.log(Array.from(await x.matmul(x).data()).join(' '), corollary1(1, 2, 1).promises);
`;

function run(command, args, options = {}) {
  return execFileSync(command, args, { cwd: root, encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'], ...options });
}

function expect(what, found, holds) {
  if (holds) return;
  console.error(`check-package: expected ${what}, found ${found}`);
  process.exitCode = 1;
}

/** Packs into `folder`; returns the tarball, checks what is in it. */
function pack(folder) {
  const [packed] = JSON.parse(run('npm', ['pack', '--json', '--ignore-scripts', '--pack-destination', folder]));
  const files = packed.files.map((file) => file.path);
  const stray = files.filter((file) => !allowed.test(file));
  expect('no other files in the package', stray.join(', '), stray.length === 0);
  for (const file of required) expect(`${file} in the package`, 'none', files.includes(file));
  const prebuilt = files.some((file) => file.startsWith('prebuilds/') && file.endsWith('.node'));
  expect('a prebuild in the package', 'none', prebuilt);
  console.log(`${packed.filename}: ${files.length} files, ${(packed.size / 2 ** 20).toFixed(1)} MiB`);
  return join(folder, packed.filename);
}

/** A PATH with node, npm and a shell, and nothing that compiles. */
function barePath(folder) {
  const bin = join(folder, 'bin');
  mkdirSync(bin);
  for (const tool of ['node', 'npm', 'sh', 'env'])
    symlinkSync(realpathSync(run('which', [tool]).trim()), join(bin, tool));
  return bin;
}

const folder = mkdtempSync(join(tmpdir(), 'keelgrad-package-'));
try {
  run('npm', ['run', '--silent', 'prebuilds'], { stdio: ['ignore', 'ignore', 'inherit'] });
  const tarball = pack(folder);
  const project = join(folder, 'project');
  mkdirSync(project);
  writeFileSync(join(project, 'package.json'), '{ "private": true, "type": "module" }\n');
  writeFileSync(join(project, 'main.js'), program);
  const options = { cwd: project, env: { ...process.env, PATH: barePath(folder) } };
  delete options.env.KEELGRAD_ADDON;
  run('npm', ['install', '--no-audit', '--no-fund', tarball], options);
  const printed = run('node', ['main.js'], options).trim();
  expect('7 10 15 22 chosen rises', printed, printed === '7 10 15 22 chosen rises');
  const info = run(join(project, 'node_modules', '.bin', 'keelgrad'), ['info'], options);
  expect('keelgrad info to name the prebuild', info, info.includes('prebuilds'));
} finally {
  rmSync(folder, { recursive: true, force: true });
}
if (!process.exitCode) console.log('check-package: the prebuild loads and computes in an empty project');
