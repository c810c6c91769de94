// Checks the packed GPU tests (pack-gpu-tests.mjs) as a machine with a GPU gets them: packs, checks the size, and calls run.sh
// in an empty folder with nothing but a shell and Python on the PATH: every file of every stage is loaded, the quick stages
// and the benchmark in tiny sizes run whole. A GPU is not needed: the SIMT build (build-simt.mjs) is its device, and a
// stand-in for compute-sanitizer runs what it is given, or, for memcheck, finds something.
import { execFileSync, spawnSync } from 'node:child_process';
import {
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const simt = join(root, 'build', 'simt');
/** What is on the PATH; bash is what tests of whole processes start theirs with. */
const tools = ['sh', 'bash', 'dirname', 'mkdir'];
/** What the benchmark's tables are of. */
const sections = [
  'bf16 products of Qwen2.5-0.5B',
  'attention',
  'share of copy bandwidth',
  'vocabulary head, forward and backward',
  'DPO steps',
];
/** Stages that the SIMT layer ends in half a minute. */
const quick = ['autograd', 'runtime'];
const sanitizer = `#!/bin/sh
case "$*" in
  *'--tool memcheck '*) exit 99 ;;
  *'--tool racecheck '*'--kernel-name-exclude regex='*) ;;
  *) exit 98 ;;
esac
until [ "\${1##*/}" = node ]; do shift; done
exec "$@"
`;

function expect(what, found, holds) {
  if (holds) return;
  console.error(`check-gpu-pack: expected ${what}, found\n${found}`);
  process.exitCode = 1;
}

/** A folder for PATH: a shell, Python, the stand-in. */
function barePath(folder) {
  const bin = join(folder, 'bin');
  mkdirSync(bin);
  const output = (...command) => execFileSync(command[0], command.slice(1), { encoding: 'utf8' }).trim();
  for (const tool of tools) symlinkSync(realpathSync(output('which', tool)), join(bin, tool));
  symlinkSync(output('python3', '-c', 'import sys; print(sys.executable)'), join(bin, 'python3')); // it may be a script
  writeFileSync(join(bin, 'compute-sanitizer'), sanitizer);
  chmodSync(join(bin, 'compute-sanitizer'), 0o755);
  return bin;
}

/** The environment of a bare machine; cuBLAS lies where pip puts it, for run.sh to find. */
function environment(folder) {
  const library = join(folder, 'python', 'nvidia', 'cublas', 'lib');
  mkdirSync(library, { recursive: true });
  symlinkSync(join(simt, 'libcublasLt.so.13'), join(library, 'libcublasLt.so.13'));
  return { PATH: barePath(folder), HOME: folder, PYTHONPATH: join(folder, 'python') };
}

/** Whether the machine has a cuBLAS in the usual places: run.sh then looks no further. */
const hasCublas = ['libcublasLt.so.13', 'libcublasLt.so.12'].some(
  (name) =>
    spawnSync('python3', ['-c', `import ctypes; ctypes.CDLL('${name}')`]).status === 0 ||
    ['lib64', 'lib'].some((part) => existsSync(join('/usr/local/cuda', part, name))),
);

const imitated = {
  KEELGRAD_ADDON: join(simt, 'keelgrad.node'),
  KEELGRAD_SIMT_PROTECT: '0',
  ...(hasCublas ? { KEELGRAD_CUBLAS: simt } : {}),
};

/** Every file loads; the quick stages pass. */
function checkStages(call) {
  const loaded = call(['--collect'], imitated);
  const none = /^0 passed, 0 failed, \d{4,} skipped$/m;
  expect('every file of every stage to load', loaded.output, loaded.status === 0 && none.test(loaded.output));
  const { status, output } = call([...quick, '--jobs', '2'], imitated);
  expect(`${quick} to pass`, output, status === 0 && /^\d{3,} passed, 0 failed/m.test(output));
  console.log(output.match(/^\w+ +\d+ passed.*$/gm)?.join('\n'));
}

/** Every section of the benchmark has rows, and none failed. */
function checkBench(call, results) {
  const { status, output } = call(['bench', '--tiny', '--no-peer'], imitated);
  const report = readdirSync(results).find((file) => file.endsWith('-gpu.json'));
  expect('the benchmark to run and to report', output, status === 0 && report !== undefined);
  if (report === undefined) return;
  const { rows } = JSON.parse(readFileSync(join(results, report), 'utf8'));
  const measured = sections.filter((s) => rows.some((r) => r.section === s && r.name !== 'failed' && r.ours));
  expect(`rows of ${sections.join('; ')}`, output, measured.length === sections.length);
  expect(
    'no row that failed',
    output,
    rows.every((r) => r.name !== 'failed' && r.ours),
  );
}

function main(folder) {
  const packed = join(folder, 'packed');
  execFileSync(process.execPath, ['scripts/pack-gpu-tests.mjs', '--out', packed], { cwd: root, stdio: 'inherit' });
  const bare = environment(folder);
  const call = (args, env) => {
    const options = { cwd: folder, env: { ...bare, ...env }, encoding: 'utf8' };
    const { status, stdout, stderr } = spawnSync(join(packed, 'run.sh'), args, options);
    return { status, output: `exit ${status}\n${stdout}${stderr}` };
  };
  const { cuda } = JSON.parse(/^\{.*$/m.exec(call(['determinism'], {}).output)?.[0] ?? '{}');
  expect(
    'the packed addon to load, and to say what it finds',
    JSON.stringify(cuda),
    typeof cuda?.available === 'boolean',
  );
  const { status, output } = call(['racecheck'], imitated);
  expect('racecheck to pass', output, status === 0 && /^racecheck +\d{3,} passed, 0 failed/m.test(output));
  const results = JSON.parse(readFileSync(join(packed, 'results', 'results.json'), 'utf8'));
  expect('the stage among the results', JSON.stringify(results.stages), results.stages[0]?.passed > 100);
  checkStages(call);
  checkBench(call, join(packed, 'results'));
  const found = call(['memcheck'], imitated);
  expect('a finding to be told', found.output, found.status === 1 && /exit 99/.test(found.output));
  console.log(output.split('\n').slice(-4).join('\n').trim());
}

const folder = mkdtempSync(join(tmpdir(), 'keelgrad-gpu-'));
try {
  main(folder);
} finally {
  rmSync(folder, { recursive: true, force: true });
}
