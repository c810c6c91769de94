// The sources compiled to JavaScript once per test file, or as they were packed, for tests that start processes and worker threads of their own.
import { execFileSync, spawn } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { runtimeInfo } from '../../src/native/info.js';

const root = resolve(import.meta.dirname, '..', '..');

export interface Finished {
  code: number | null;
  signal: string | null;
  stdout: string;
  stderr: string;
}

/** The sources as JavaScript, where the tests run from a packed folder (scripts/pack-gpu-tests.mjs). */
const packed = join(root, 'src');
const isPacked = existsSync(join(packed, 'tensor', 'tensor.js'));

/** Compiles the sources into `folder`. */
function compile(folder: string): void {
  try {
    const plain = ['--incremental', 'false', '--tsBuildInfoFile', 'null'];
    const noTypes = ['--declaration', 'false', '--declarationDir', 'null'];
    const args = ['-p', 'tsconfig.build.json', '--outDir', folder, ...plain, ...noTypes];
    execFileSync(join(root, 'node_modules', '.bin', 'tsc'), args, { cwd: root });
  } catch (error) {
    // Type errors are another check's business; without output there is nothing to run.
    if (!existsSync(join(folder, 'tensor', 'tensor.js'))) throw error;
  }
}

export class Compiled {
  private readonly folder: string;

  constructor() {
    // Inside of the project, so that node finds its packages; build/ is not under version control.
    this.folder = isPacked ? packed : mkdtempSync(join(root, 'build', 'test-'));
    if (!isPacked) compile(this.folder);
  }

  /** The URL of a compiled module of src/. */
  url(module: string): string {
    return pathToFileURL(join(this.folder, module)).href;
  }

  /** Imports that most scripts begin with. */
  get prelude(): string {
    return (
      `import '${this.url('ops/methods.js')}';\n` +
      `import { Tensor } from '${this.url('tensor/tensor.js')}';\n` +
      `import { memory, synchronize, withTag } from '${this.url('tensor/storage.js')}';\n` +
      `import { scope } from '${this.url('tensor/scope.js')}';\n`
    );
  }

  /** Runs a module of JavaScript in a child process, after shell commands such as ulimit. */
  run(script: string, options: { node?: string[]; shell?: string; prelude?: boolean } = {}): Promise<Finished> {
    const source = options.prelude === false ? script : this.prelude + script;
    const args = [...(options.node ?? []), '--input-type=module', '--eval', source];
    const env = { ...process.env, KEELGRAD_ADDON: runtimeInfo().addon };
    const child = options.shell
      ? spawn('bash', ['-c', `${options.shell} && exec "$@"`, 'bash', process.execPath, ...args], { cwd: root, env })
      : spawn(process.execPath, args, { cwd: root, env });
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

  dispose(): void {
    if (!isPacked) rmSync(this.folder, { recursive: true, force: true });
  }
}
