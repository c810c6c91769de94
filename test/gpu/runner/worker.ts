// Runs one test file in this process and writes its results: worker.js FILE RESULTS. KEELGRAD_TEST_DEVICES names the device
// that tensors are on where a test names none. Exits 0 whatever the tests say; the results say it.
import { writeFileSync } from 'node:fs';
import { resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { type File, type Suite, startTests, type Task, type Test, type VitestRunner } from '@vitest/runner';
import { type Device, setDefaultDevice } from '../../../src/tensor/storage.js';

export interface TestRecord {
  readonly name: string;
  readonly state: 'passed' | 'failed' | 'skipped';
  readonly seconds: number;
  readonly note?: string;
}

export interface FileRecord {
  readonly tests: readonly TestRecord[];
  /** What went wrong outside of any test: an import, a hook. */
  readonly errors: readonly string[];
}

const timeout = 1000 * Number(process.env.KEELGRAD_TEST_TIMEOUT ?? 120);

const runner: VitestRunner = {
  config: {
    root: process.cwd(),
    setupFiles: [],
    name: undefined,
    passWithNoTests: true,
    testNamePattern: process.env.KEELGRAD_TEST_NAMES ? new RegExp(process.env.KEELGRAD_TEST_NAMES) : undefined,
    allowOnly: false,
    sequence: { seed: 0, hooks: 'stack', setupFiles: 'list' },
    chaiConfig: undefined,
    maxConcurrency: 1,
    testTimeout: timeout,
    hookTimeout: timeout,
    retry: 0,
    includeTaskLocation: false,
    tags: [],
    tagsFilter: undefined,
    strictTags: false,
  },
  importFile: (path) => import(pathToFileURL(path.replace(/\.ts$/, '.js')).href),
};

const messages = (task: Task): string[] => (task.result?.errors ?? []).map((e) => e.stack ?? e.message);

function recordOf(task: Test): TestRecord {
  const names: string[] = [task.name];
  for (let at: Suite | undefined = task.suite; at; at = at.suite) names.unshift(at.name);
  const state = task.result?.state === 'pass' ? 'passed' : task.result?.state === 'fail' ? 'failed' : 'skipped';
  const note = state === 'failed' ? messages(task).join('\n') : (task.result as { note?: string } | undefined)?.note;
  return { name: names.join(' > '), state, seconds: (task.result?.duration ?? 0) / 1e3, ...(note ? { note } : {}) };
}

function collect(suite: Suite, tests: TestRecord[], errors: string[]): void {
  if (suite.result?.state === 'fail') errors.push(...messages(suite).map((text) => `${suite.name}: ${text}`));
  for (const task of suite.tasks) {
    if (task.type === 'suite') collect(task, tests, errors);
    else tests.push(recordOf(task));
  }
}

async function main([file, results]: string[]): Promise<void> {
  const device = process.env.KEELGRAD_TEST_DEVICES?.split(',')[0];
  if (device) setDefaultDevice(device as Device);
  const files: File[] = await startTests([resolve(file)], runner);
  const record = { tests: [] as TestRecord[], errors: [] as string[] };
  for (const each of files) collect(each, record.tests, record.errors);
  writeFileSync(results, JSON.stringify(record));
}

main(process.argv.slice(2)).then(
  () => process.exit(0),
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
