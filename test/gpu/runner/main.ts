// Runs the stages of stages.mjs on one device, a process a file, and reports: a line a stage, the tests that failed, one
// line for all, and results.json with everything. `npm run test:gpu` and run.sh of a packed folder end here.
//   main.js [stage...] [--device cuda] [--jobs N] [--results FOLDER] [--deadline SECONDS] [--list] [--collect]
// --collect: each file is loaded and its tests counted as skipped; none runs. A file that does not load, or has no test, fails.
import { spawn, spawnSync } from 'node:child_process';
import { closeSync, existsSync, mkdirSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { basename, join, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { runtimeInfo } from '../../../src/native/info.js';
import type { FileRecord, TestRecord } from './worker.js';

interface PackedStage {
  readonly name: string;
  readonly about: string;
  readonly files: readonly string[];
  readonly skip?: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  readonly alone?: boolean;
  readonly sanitizer?: string;
  readonly parts?: number;
  readonly timeout: number;
}

interface FileResult extends FileRecord {
  readonly file: string;
  readonly seconds: number;
}

const app = resolve(import.meta.dirname, '..', '..', '..');
const began = performance.now();
const seconds = (): number => (performance.now() - began) / 1e3;

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    device: { type: 'string', default: 'cuda' },
    jobs: { type: 'string', default: String(Math.max(1, Math.min(4, availableParallelism() >> 1))) },
    results: { type: 'string', default: 'results' },
    deadline: { type: 'string', default: 'Infinity' },
    list: { type: 'boolean', default: false },
    collect: { type: 'boolean', default: false },
  },
});
const results = resolve(options.results);
const logs = join(app, '..', 'logs');
const deadline = Number(options.deadline);

const emptyRecord = (file: string, note: string, state: 'failed' | 'skipped'): FileResult => ({
  file,
  seconds: 0,
  tests: [{ name: file, state, seconds: 0, note }],
  errors: [],
});

/** compute-sanitizer, where the toolkit has it. */
function findSanitizer(): string | undefined {
  const folders = [process.env.CUDA_HOME, process.env.CUDA_PATH, '/usr/local/cuda'].filter(Boolean) as string[];
  const places = [...folders.map((f) => join(f, 'bin')), ...(process.env.PATH ?? '').split(':')];
  return places.map((place) => join(place, 'compute-sanitizer')).find((path) => existsSync(path));
}

/** Ends a process and what it started. */
function end(pid: number): void {
  try {
    process.kill(-pid, 'SIGKILL');
  } catch {
    // It ended by itself.
  }
}

/** Runs a command with its output in a file; resolves to its exit code, or a word for why it has none. */
function finished(command: string[], env: NodeJS.ProcessEnv, log: string, limit: number): Promise<number | string> {
  return new Promise((done) => {
    const output = openSync(log, 'w');
    const child = spawn(command[0], command.slice(1), {
      cwd: app,
      env,
      stdio: ['ignore', output, output],
      detached: true,
    });
    let stopped = false;
    const timer = setTimeout(() => {
      stopped = true;
      end(child.pid!);
    }, 1000 * limit);
    const finish = (answer: number | string): void => {
      clearTimeout(timer);
      closeSync(output);
      done(answer);
    };
    child.on('error', (error) => finish(error.message));
    child.on('close', (code, signal) => finish(stopped ? `no end after ${limit.toFixed(0)} s` : (code ?? signal!)));
  });
}

const lastLines = (path: string, count: number): string =>
  readFileSync(path, 'utf8').trimEnd().split('\n').slice(-count).join('\n');

/** A test file, or one of the parts of its cases. */
interface Piece {
  readonly file: string;
  readonly part?: string;
}

const piecesOf = ({ files, parts }: PackedStage): Piece[] =>
  files.flatMap((file) =>
    parts ? Array.from({ length: parts }, (_, i) => ({ file, part: `${i + 1}/${parts}` })) : [{ file }],
  );

async function runPiece(stage: PackedStage, piece: Piece): Promise<FileResult> {
  const left = deadline - seconds();
  const file = piece.part ? `${piece.file} ${piece.part}` : piece.file;
  if (left < 5) return emptyRecord(file, 'not run: past the deadline', 'skipped');
  const name = [stage.name, basename(piece.file).replace(/\.test\.[jt]s$/, ''), ...(piece.part?.split('/') ?? [])].join(
    '-',
  );
  const [log, answer] = [join(logs, `${name}.log`), join(logs, `${name}.json`)];
  rmSync(answer, { force: true });
  const worker = [process.execPath, join(import.meta.dirname, 'worker.js'), piece.file, answer];
  const command = stage.sanitizer ? [...sanitizing(stage.sanitizer), ...worker] : worker;
  const skip = options.collect ? [''] : stage.skip;
  const names = skip && { KEELGRAD_TEST_NAMES: `^(?!.*(${skip.join('|')}))` };
  const part = piece.part && { KEELGRAD_TEST_PART: piece.part };
  const env = { ...process.env, KEELGRAD_TEST_DEVICES: options.device, ...names, ...part, ...stage.env };
  const start = seconds();
  const code = await finished(command, env, log, Math.min(stage.timeout, left));
  const took = seconds() - start;
  const record: FileRecord = existsSync(answer)
    ? JSON.parse(readFileSync(answer, 'utf8'))
    : { tests: [], errors: ['the process left no results'] };
  const errors = [...record.errors, ...(code === 0 ? [] : [`exit ${code}\n${lastLines(log, 20)}`])];
  if (errors.length + record.tests.length === 0) errors.push('no test is in it');
  return { file, seconds: took, tests: record.tests, errors };
}

/** A regular expression of the mangled names of kernels that are not ours: cuBLAS's, which races of their own are left to. */
const foreign = '^(?!.*2kg4cuda).*$';

const sanitizing = (tool: string): string[] => [
  findSanitizer()!,
  ...['--tool', tool, '--error-exitcode', '99', '--print-limit', '20'],
  ...(tool === 'racecheck' ? ['--kernel-name-exclude', `regex=${foreign}`] : []),
];

/** Results of a stage's files, some at a time. */
async function runStage(stage: PackedStage): Promise<FileResult[]> {
  if (stage.sanitizer && !findSanitizer())
    return [emptyRecord(stage.name, 'compute-sanitizer is not on this machine', 'skipped')];
  const waiting = piecesOf(stage);
  const done: FileResult[] = [];
  const lane = async (): Promise<void> => {
    for (let piece = waiting.shift(); piece; piece = waiting.shift()) done.push(await runPiece(stage, piece));
  };
  await Promise.all(Array.from({ length: stage.alone ? 1 : Number(options.jobs) }, lane));
  return done;
}

interface Counts {
  passed: number;
  failed: number;
  skipped: number;
}

/** Tests by how they ended; an error outside of tests counts as one that failed. */
function count(files: readonly FileResult[]): Counts {
  const of = (state: TestRecord['state']): number =>
    files.reduce((n, f) => n + f.tests.filter((t) => t.state === state).length, 0);
  const errors = files.filter((f) => f.errors.length > 0 && !f.tests.some((t) => t.state === 'failed')).length;
  return { passed: of('passed'), failed: of('failed') + errors, skipped: of('skipped') };
}

const tell = (c: Counts): string => `${c.passed} passed, ${c.failed} failed, ${c.skipped} skipped`;

/** The failures of a stage and the reasons for what it skipped, briefly. */
function explain(files: readonly FileResult[]): void {
  const brief = (text = ''): string => text.split('\n').slice(0, 4).join('\n      ').slice(0, 600);
  for (const { file, tests, errors } of files) {
    for (const text of errors) console.log(`    ${file}: ${brief(text)}`);
    const failed = tests.filter((t) => t.state === 'failed');
    for (const t of failed.slice(0, 5)) console.log(`    FAILED ${file}: ${t.name}\n      ${brief(t.note)}`);
    if (failed.length > 5) console.log(`    and ${failed.length - 5} more in ${file}`);
  }
}

function machine(): Record<string, unknown> {
  const query = ['--query-gpu=name,driver_version,memory.total', '--format=csv,noheader'];
  const { stdout } = spawnSync('nvidia-smi', query, { encoding: 'utf8' });
  return {
    gpu: stdout?.trim() || 'nvidia-smi says nothing',
    node: process.version,
    ...runtimeInfo(),
    addon: undefined,
  };
}

/** The stages that were asked for, or all. */
function chosen(): PackedStage[] {
  const all: PackedStage[] = JSON.parse(readFileSync(join(app, 'stages.json'), 'utf8'));
  const unknown = positionals.find((name) => !all.some((s) => s.name === name));
  if (unknown) throw new Error(`expected stages out of ${all.map((s) => s.name).join(', ')}, found ${unknown}`);
  const list = positionals.length > 0 ? all.filter((s) => positionals.includes(s.name)) : all;
  // Loading needs neither a checker nor parts.
  return options.collect ? list.map((s) => ({ ...s, sanitizer: undefined, parts: undefined })) : list;
}

async function main(): Promise<number> {
  const list = chosen();
  if (options.list) {
    for (const s of list) console.log(`${s.name}: ${s.about} (${s.files.length} files)`);
    return 0;
  }
  for (const folder of [results, logs]) mkdirSync(folder, { recursive: true });
  const about = machine();
  console.log(JSON.stringify(about));
  const { cuda } = runtimeInfo();
  if (options.device.startsWith('cuda') && !cuda.available) {
    console.log(`no GPU: ${cuda.reason}; ${cuda.remedy}\n0 passed, 1 failed, 0 skipped`);
    return 1;
  }
  const stages = [];
  for (const stage of list) {
    const start = seconds();
    const files = await runStage(stage);
    const took = seconds() - start;
    console.log(`${stage.name.padEnd(12)} ${tell(count(files))}, ${files.length} files, ${took.toFixed(0)} s`);
    explain(files);
    stages.push({ name: stage.name, ...count(files), seconds: took, files });
    writeFileSync(join(results, 'results.json'), JSON.stringify({ machine: about, stages }, null, 1));
  }
  const total = count(stages.flatMap((s) => s.files));
  console.log(tell(total));
  return total.failed > 0 ? 1 : 0;
}

main().then(
  (code) => {
    process.exitCode = code;
  },
  (error) => {
    console.error(error.message);
    process.exitCode = 1;
  },
);
