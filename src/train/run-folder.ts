// The output folder of a run: whether it may be used, metrics.jsonl and run.json in it, what --overwrite replaces.
// Must never delete a file that no keelgrad run writes, and writes nothing before `begin`.

import { closeSync, existsSync, mkdirSync, openSync, readFileSync, writeSync } from 'node:fs';
import { readdir, readFile, realpath, rm } from 'node:fs/promises';
import { dirname, join, resolve, sep } from 'node:path';
import { KeelgradError } from '../errors.js';
import { writeJsonAtomic } from '../io/atomic.js';
import { packageRoot } from '../package-root.js';
import type { Method, Value } from './option-spec.js';

/** Everything a run leaves in its folder. */
const runEntries = ['run.json', 'metrics.jsonl', 'adapter', 'model'];

const runFolders: Readonly<Record<string, RegExp>> = {
  adapter: /^adapter_(model\.safetensors|config\.json)$/,
  model:
    /^(model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|tokenizer\.model|chat_template\.jinja|chat_template\.json)$/,
};

/** What an atomic write leaves behind when the process is killed in the middle of it. */
const leftover = /^\.(run\.json|adapter|model)\.\d+\.[0-9a-f]+\.tmp$/;

export type RunStatus = 'running' | 'completed' | 'interrupted' | 'failed';

export interface Fingerprint {
  readonly path: string;
  readonly sha256: string;
  readonly [fact: string]: unknown;
}

/** What is known of a run before its first step. */
export interface RunFacts {
  readonly method: Method;
  /** Resolved options under the keys of a config file; see `describeOptions`. */
  readonly options: Readonly<Record<string, Value>>;
  readonly model: Fingerprint;
  readonly data: Fingerprint;
  readonly adapter?: Fingerprint;
  readonly totalSteps: number;
}

export interface OutputSettings {
  readonly overwrite: boolean;
  /** Model, adapter and data of the run: none of them may be replaced by it. */
  readonly inputs: readonly string[];
}

async function entriesOf(folder: string): Promise<string[]> {
  try {
    return await readdir(folder);
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT') return [];
    const found = code === 'ENOTDIR' ? 'found a file' : `it cannot be read (${message})`;
    throw new KeelgradError(`${folder}: expected a folder for the output, ${found}; name another --output`);
  }
}

async function isKeelgradRun(folder: string): Promise<boolean> {
  try {
    const record: unknown = JSON.parse(await readFile(join(folder, 'run.json'), 'utf8'));
    const versions = (record as { versions?: { keelgrad?: unknown } } | null)?.versions;
    return typeof versions?.keelgrad === 'string';
  } catch {
    return false;
  }
}

/** Files of others in adapter/ and model/, which are replaced as wholes. */
async function foreignFiles(output: string): Promise<string[]> {
  const found: string[] = [];
  for (const [folder, known] of Object.entries(runFolders)) {
    const names = await entriesOf(join(output, folder));
    found.push(...names.filter((name) => !known.test(name)).map((name) => `${folder}/${name}`));
  }
  return found;
}

async function checkInputs(output: string, inputs: readonly string[]): Promise<void> {
  const real = (path: string) => realpath(path).catch(() => resolve(path));
  for (const input of inputs) {
    const source = await real(input);
    for (const entry of runEntries) {
      const target = await real(join(output, entry));
      if (source !== target && !source.startsWith(target + sep)) continue;
      throw new KeelgradError(`${input}: is read by this run and would be replaced by it; name another --output`);
    }
  }
}

/**
 * Refuses an output folder in which something could be lost. Writes nothing, so it can run before any work.
 * A folder with anything in it needs `overwrite`. Then the entries of an earlier run are replaced and all else stays;
 * entries of those names that no run made are refused.
 */
export async function checkOutput(output: string, { overwrite, inputs }: OutputSettings): Promise<void> {
  const entries = await entriesOf(output);
  if (entries.length === 0) return;
  if (!overwrite) {
    const found = entries.slice(0, 3).join(', ') + (entries.length > 3 ? ', ...' : '');
    throw new KeelgradError(
      `${output}: expected a new or empty folder, found ${found}; name another --output, or use --overwrite`,
    );
  }
  await checkInputs(output, inputs);
  const clashes = entries.filter((name) => runEntries.includes(name));
  const foreign = (await isKeelgradRun(output)) ? await foreignFiles(output) : clashes;
  if (foreign.length === 0) return;
  throw new KeelgradError(
    `${output}: found ${foreign.join(', ')}, not written by keelgrad, where the run would write; ` +
      'move it away, or name another --output',
  );
}

async function removeEarlierRun(output: string): Promise<void> {
  for (const name of await entriesOf(output)) {
    if (name === 'run.json' || !(runEntries.includes(name) || leftover.test(name))) continue;
    await rm(join(output, name), { recursive: true, force: true });
  }
}

/** This package's version. */
export function packageVersion(): string {
  const manifest = readFileSync(join(packageRoot(), 'package.json'), 'utf8');
  return (JSON.parse(manifest) as { version: string }).version;
}

function createFolder(output: string): void {
  try {
    // One by one: where a file system refuses (as /proc does), Node's recursive mkdir never returns.
    const missing: string[] = [];
    for (let at = resolve(output); !existsSync(at); at = dirname(at)) missing.unshift(at);
    for (const folder of missing) mkdirSync(folder);
  } catch (error) {
    throw new KeelgradError(`${output}: cannot be created (${(error as Error).message}); name another --output`, {
      cause: error,
    });
  }
}

/** A run's folder while it is being written. Every file in it is complete at any time, the last metrics line included. */
export class RunFolder {
  readonly path: string;
  readonly adapterPath: string;
  readonly modelPath: string;
  readonly #facts: RunFacts;
  readonly #startedAt = new Date();
  #metrics = -1;

  private constructor(path: string, facts: RunFacts) {
    this.path = path;
    this.adapterPath = join(path, 'adapter');
    this.modelPath = join(path, 'model');
    this.#facts = facts;
  }

  /** Takes the folder over: an earlier run goes, run.json says `running`. Call it once all inputs are known good. */
  static async begin(output: string, facts: RunFacts, settings: OutputSettings): Promise<RunFolder> {
    await checkOutput(output, settings);
    createFolder(output);
    const folder = new RunFolder(output, facts);
    // run.json comes first: killed at any point from here on, the folder is known as a run's.
    await folder.#writeRun('running', 0);
    await removeEarlierRun(output);
    folder.#metrics = openSync(join(output, 'metrics.jsonl'), 'a');
    return folder;
  }

  /**
   * Appends one step as one line of JSON, unrounded, handed to the system before it returns.
   * JSON has no NaN or infinity: they become null.
   */
  appendMetrics(metrics: Readonly<Record<string, number | string>>): void {
    const line = `${JSON.stringify(metrics)}\n`;
    try {
      writeSync(this.#metrics, line);
    } catch (error) {
      const reason = (error as Error).message;
      throw new KeelgradError(`${join(this.path, 'metrics.jsonl')}: cannot be written (${reason}); check free space`, {
        cause: error,
      });
    }
  }

  /** Closes metrics.jsonl and completes run.json. Saved weights should be in place by then. */
  async finish(status: Exclude<RunStatus, 'running'>, steps: number, error?: string): Promise<void> {
    closeSync(this.#metrics);
    await this.#writeRun(status, steps, error);
  }

  async #writeRun(status: RunStatus, steps: number, error?: string): Promise<void> {
    const { method, options, model, adapter, data, totalSteps } = this.#facts;
    await writeJsonAtomic(join(this.path, 'run.json'), {
      method,
      status,
      ...(error !== undefined && { error }),
      started_at: this.#startedAt.toISOString(),
      ...(status !== 'running' && { ended_at: new Date().toISOString() }),
      steps,
      total_steps: totalSteps,
      options,
      versions: {
        keelgrad: packageVersion(),
        node: process.versions.node,
        platform: process.platform,
        arch: process.arch,
      },
      model,
      ...(adapter && { adapter }),
      data,
    });
  }
}
