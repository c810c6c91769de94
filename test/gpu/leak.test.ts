// A long run holds no more at its end than near its beginning: tensors, bytes of the device, bytes of the process.
import { describe, expect, test } from 'vitest';
import { memory } from '../../src/tensor/storage.js';
import { fixturePairs, temporaryFolder, train } from '../train/support.js';
import { gpu, makeAlignedModel, needsGpu, stepsOr } from './device.js';

const steps = stepsOr(2000);

interface Sample {
  readonly storages: number;
  readonly allocated: number;
  readonly reserved: number;
  readonly scratch: number;
  readonly resident: number;
}

const most = (samples: readonly Sample[]): Sample =>
  samples.reduce((a, b) => ({
    storages: Math.max(a.storages, b.storages),
    allocated: Math.max(a.allocated, b.allocated),
    reserved: Math.max(a.reserved, b.reserved),
    scratch: Math.max(a.scratch, b.scratch),
    resident: Math.max(a.resident, b.resident),
  }));

describe.skipIf(!gpu)(`${steps} steps without a leak (${gpu ?? needsGpu})`, () => {
  const folder = temporaryFolder();

  test.each(['dpo', 'spo'] as const)(
    '%s',
    async (method) => {
      const model = await makeAlignedModel(folder.path('model'));
      const data = folder.write('pairs.json', fixturePairs(8));
      const before = memory(gpu!).storages;
      const samples: Sample[] = [];
      const sample = (): void => {
        const { storages, allocated, reserved, scratch } = memory(gpu!);
        samples.push({ storages, allocated, reserved, scratch, resident: process.memoryUsage.rss() });
      };
      const options = { model, data, device: 'cuda', 'batch-size': 4, 'max-steps': steps, 'no-shuffle': true };
      await train(method, { ...options, dtype: 'bfloat16' }, { onUpdate: sample });
      const early = most(samples.slice(Math.floor(steps / 5), Math.floor((2 * steps) / 5)));
      const late = most(samples.slice(-Math.floor(steps / 5)));
      expect(late.storages).toBeLessThanOrEqual(early.storages);
      expect(late.allocated).toBeLessThanOrEqual(early.allocated);
      expect(late.reserved).toBeLessThanOrEqual(1.1 * early.reserved);
      expect(late.scratch).toBe(early.scratch);
      expect(late.resident - early.resident).toBeLessThan(64 << 20);
      expect(memory(gpu!).storages).toBe(before);
    },
    900_000,
  );
});
