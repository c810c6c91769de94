// The SIMT build for tests: made once, by whichever test file comes first, and told to the process by the environment that
// the native layer reads when it is loaded. Without a C++ compiler there is none, and the tests skip.
import { spawn, spawnSync } from 'node:child_process';
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { beforeAll, describe } from 'vitest';

export const root = resolve(import.meta.dirname, '..', '..');

export type Sanitizer = '' | 'address,undefined' | 'thread';

const folders: Readonly<Record<Sanitizer, string>> = {
  '': 'simt',
  'address,undefined': 'simt-asan',
  thread: 'simt-tsan',
};

/** Milliseconds that a build may take on two busy cores. */
export const BUILD_TIMEOUT = 900_000;

/** Why nothing can be built here; undefined where it can. */
export const missingCompiler: string | undefined = ['c++', 'cmake']
  .filter((tool) => spawnSync(tool, ['--version']).status !== 0)
  .map((tool) => `the SIMT layer needs ${tool}`)
  .at(0);

const sleep = (milliseconds: number): Promise<void> => new Promise((done) => setTimeout(done, milliseconds));

const alive = (pid: number): boolean => {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
};

/** Who holds a lock; 0 where it was let go of, or is not written down yet. */
function ownerOf(lock: string): number {
  try {
    return Number(readFileSync(join(lock, 'pid'), 'utf8'));
  } catch {
    return 0;
  }
}

/** Runs `f` while no other process of this checkout does. */
async function exclusively<T>(lock: string, f: () => Promise<T>): Promise<T> {
  for (;;) {
    try {
      mkdirSync(lock);
      break;
    } catch {
      await sleep(200);
      const owner = ownerOf(lock);
      if (owner > 0 && !alive(owner)) rmSync(lock, { recursive: true, force: true });
    }
  }
  try {
    writeFileSync(join(lock, 'pid'), String(process.pid));
    return await f();
  } finally {
    rmSync(lock, { recursive: true, force: true });
  }
}

/** A build that is taken as it is, and those for sanitizers beside it, with -asan and -tsan in their names. */
const given = process.env.KEELGRAD_SIMT_BUILD;

const folderOf = (sanitizer: Sanitizer): string =>
  given ? resolve(given + folders[sanitizer].replace('simt', '')) : join(root, 'build', folders[sanitizer]);

/** Brings the build up to date; returns its folder. */
export async function simtBuild(sanitizer: Sanitizer = ''): Promise<string> {
  const folder = folderOf(sanitizer);
  if (given) return folder;
  mkdirSync(join(root, 'build'), { recursive: true });
  const args = [join(root, 'scripts', 'build-simt.mjs'), '--out', folder, '--sanitize', sanitizer];
  // One build at a time: two would only share the cores.
  const lock = join(root, 'build', 'simt.lock');
  const { code, stdout, stderr } = await exclusively(lock, () => run(process.execPath, args));
  if (code !== 0) throw new Error(`build-simt failed\n${stdout.slice(-4000)}${stderr.slice(-4000)}`);
  return folder;
}

export type Environment = Readonly<Record<string, string>>;

/** What makes a process see the SIMT layer as its device cuda, with allocations of their own for all tensors. */
export const simtEnvironment = (folder: string): Environment => ({
  KEELGRAD_ADDON: join(folder, 'keelgrad.node'),
  KEELGRAD_CUBLAS: folder,
  KEELGRAD_TEST_DEVICES: 'cuda',
  KEELGRAD_DIRECT_ALLOCATION: '1',
});

/** A suite on the SIMT layer in this process: other test files, imported by `body`. Call once a file, before anything else. */
export function describeOnSimt(name: string, env: Environment, body: () => Promise<unknown>): void {
  Object.assign(process.env, simtEnvironment(folderOf('')), env);
  describe.skipIf(missingCompiler)(`${name} (${missingCompiler ?? 'SIMT layer'})`, async () => {
    beforeAll(async () => {
      await simtBuild();
    }, BUILD_TIMEOUT);
    if (!missingCompiler) await body();
  });
}

export interface Finished {
  readonly code: number | null;
  readonly signal: string | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs a program to its end. */
export function run(command: string, args: readonly string[], env: Environment = {}): Promise<Finished> {
  const child = spawn(command, args, { cwd: root, env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'pipe'] });
  let [stdout, stderr] = ['', ''];
  child.stdout.on('data', (d) => {
    stdout += d;
  });
  child.stderr.on('data', (d) => {
    stderr += d;
  });
  return new Promise((done, fail) => {
    child.on('error', fail);
    child.on('close', (code, signal) => done({ code, signal, stdout, stderr }));
  });
}
