// The command line on a GPU, or its imitation (test/simt): training, the peak that it reports, scores, and what it says
// of the machine. Beside the CPU in the same process.
import { EventEmitter } from 'node:events';
import { beforeAll, describe, expect, test } from 'vitest';
import type { CliIo } from '../../src/cli/io.js';
import { main } from '../../src/cli/program.js';
import { type Device, memory, resetPeakMemory } from '../../src/tensor/storage.js';
import { makeModelFolder } from '../fixtures/make.js';
import { testDevices } from '../support/devices.js';
import { fixturePairs, readMetrics, readRun, temporaryFolder } from '../train/support.js';

const able = testDevices().some((device) => device.startsWith('cuda'));

describe.skipIf(!able)('the command line with a GPU (needs one: KEELGRAD_TEST_DEVICES=cuda)', () => {
  const folder = temporaryFolder();
  let model: string;
  let pairs: string;

  beforeAll(async () => {
    model = await makeModelFolder(folder.path('model'), 'llama');
    pairs = folder.write('pairs.json', fixturePairs(6));
  });

  async function keelgrad(...argv: string[]): Promise<string> {
    let [out, err] = ['', ''];
    const io: CliIo = {
      stdout: { write: (text) => (out += text), columns: 100 },
      stderr: { write: (text) => (err += text) },
      env: {},
      signals: new EventEmitter(),
      exit: (code) => {
        throw new Error(`exited with ${code}`);
      },
    };
    expect([await main(argv, io), err]).toEqual([0, expect.not.stringContaining('error')]);
    return out;
  }

  const run = (device: string, name: string, ...more: string[]): Promise<string> =>
    keelgrad('dpo', '--model', model, '--data', pairs, '--output', folder.path(name), '--device', device, ...more);

  const held = (device: Device): number => memory(device).peak + memory(device).scratch;

  test('trains as on the CPU, and reports the peak of the device in use', async () => {
    const steps = ['--max-steps', '3', '--batch-size', '2', '--seed', '1'];
    await run('cpu', 'here', ...steps);
    const onCpu = held('cpu');
    resetPeakMemory('cuda');
    await run('cuda', 'there', ...steps);
    expect(memory('cuda').storages).toBe(0);
    const [here, there] = [readMetrics(folder.path('here')), readMetrics(folder.path('there'))];
    expect(there.map((m) => m.step)).toEqual(here.map((m) => m.step));
    there.forEach((m, i) => {
      expect(Number(m.loss)).toBeCloseTo(Number(here[i].loss), 4);
    });
    const peak = Number(there.at(-1)!.peak_memory);
    expect(peak).toBe(held('cuda'));
    expect(peak).toBeGreaterThan(memory('cuda').scratch);
    // The workspace of matrix products, and what kernels asked for.
    expect(memory('cuda').scratch).toBeGreaterThan(32 << 20);
    expect(Number(here.at(-1)!.peak_memory)).toBe(onCpu);
    expect(JSON.stringify(readRun(folder.path('there')))).toContain('cuda');
  });

  test('auto takes the GPU', async () => {
    resetPeakMemory('cuda');
    await run('auto', 'auto', '--max-steps', '1');
    expect(memory('cuda').peak).toBeGreaterThan(0);
  });

  test('scores as on the CPU', async () => {
    const scores = async (device: string): Promise<number[]> => {
      const out = await keelgrad('score', '--json', '--model', model, '--data', pairs, '--device', device);
      return out
        .trim()
        .split('\n')
        .map((row) => JSON.parse(row).chosen_logps);
    };
    const [here, there] = [await scores('cpu'), await scores('cuda')];
    expect(here.length).toBe(6);
    here.forEach((v, i) => {
      expect(there[i]).toBeCloseTo(v, 4);
    });
  });

  test('describes it', async () => {
    const out = await keelgrad('info');
    expect(out).toMatch(/^cuda +available\n +built with CUDA \d+\.\d+; a driver for \d+\.\d+$/m);
    expect(out).toMatch(/^cuda:0 +\S.*, [\d.]+ GiB, compute capability \d+\.\d$/m);
  });
});
