// A step of training is enqueued without waiting for the device: while its reads and those of the step before are open, with
// no blocking call from JavaScript, and none of CUDA's once memory is warm (KEELGRAD_SIMT_WAITS: where the SIMT layer tells).
import { existsSync, readFileSync } from 'node:fs';
import { afterEach, describe, expect, test, vi } from 'vitest';
import { addon } from '../../src/native/addon.js';
import { makeAlignedModel } from '../gpu/device.js';
import { testDevices } from '../support/devices.js';
import { fixtureCompletions, fixturePairs, type Given, temporaryFolder, train } from './support.js';

const steps = 8;
/** Both batches have been seen with one step under way, and graphs have been captured and replayed. */
const warm = 4;

const methods: readonly (readonly ['sft' | 'dpo' | 'spo', Given])[] = [
  ['sft', { train: 'full' }],
  ['sft', { train: 'lora', dtype: 'bfloat16' }],
  ['dpo', { train: 'lora' }],
  ['dpo', { train: 'lora', dtype: 'bfloat16', 'gradient-checkpointing': true }],
  ['spo', { gamma: 0, lambda: 0.5, 'grad-norms': 'off' }],
];

const waitsFile = process.env.KEELGRAD_SIMT_WAITS;
/** Calls of CUDA so far for which a GPU's host waits. */
const waits = (): string[] =>
  waitsFile && existsSync(waitsFile) ? readFileSync(waitsFile, 'utf8').split('\n').slice(0, -1) : [];

/** Reads that stay open until they are let through. */
class Gate {
  private readonly waiting: { step: number; open: () => void }[] = [];
  private step = -1;

  /** From now on reads belong to `step`; those of steps up to `through` end. */
  advance(step: number, through: number): void {
    this.step = step;
    for (const w of this.waiting.filter((w) => w.step <= through)) w.open();
  }

  /** Of a read that is made now: when it may end. */
  passes(): Promise<void> {
    const { step } = this;
    return step < 0 ? Promise.resolve() : new Promise((open) => this.waiting.push({ step, open }));
  }
}

describe.each(testDevices())('steps on %s', (device) => {
  const folder = temporaryFolder();
  afterEach(() => void vi.restoreAllMocks());

  test.each(methods)('%s %j', async (method, given) => {
    const model = await makeAlignedModel(folder.path('model'));
    const data = folder.write(`${method}.json`, method === 'sft' ? fixtureCompletions(8) : fixturePairs(8));
    const native = addon();
    const gate = new Gate();
    const { download } = native;
    const reads = vi.spyOn(native, 'download').mockImplementation(async (...read) => {
      const [values] = await Promise.all([download.apply(native, read), gate.passes()]);
      return values;
    });
    const blocking = (['downloadSync', 'synchronize', 'trim', 'dropGraph'] as const).map((f) => vi.spyOn(native, f));
    const calls = (): number => blocking.reduce((n, spy) => n + spy.mock.calls.length, 0);
    const found: { reads: number; blocking: number; waits: string[] }[] = [];
    const onUpdate = (_: unknown, updates: number): void => {
      found.push({ reads: reads.mock.calls.length, blocking: calls(), waits: waits() });
      // Step `updates` comes next; of those enqueued the last is the one that may be awaited no earlier than after it.
      if (updates < steps) gate.advance(updates, updates - 2);
      else gate.advance(-1, steps);
    };
    const options = { model, data, device: device === 'cpu' ? 'cpu' : 'cuda', 'max-steps': steps, 'batch-size': 4 };
    const { metrics } = await train(method, { ...options, 'no-shuffle': true, ...given }, { onUpdate });
    expect(metrics).toHaveLength(steps);
    const [first, middle, last] = [found[0], found[warm], found[steps]];
    expect(last.reads - middle.reads).toBeGreaterThanOrEqual(steps - warm);
    expect(last.blocking - first.blocking).toBe(0);
    expect(last.waits.slice(middle.waits.length)).toEqual([]);
    // What opening the device asked for is in there.
    if (waitsFile && device !== 'cpu') expect(last.waits).toContain('cudaMalloc');
  });
});
