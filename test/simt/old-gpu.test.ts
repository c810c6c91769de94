// A machine whose first GPU is too old: the second one is used, and the first is refused by name.
import { expect, test } from 'vitest';
import { runtimeInfo } from '../../src/native/info.js';
import { type Device, memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { resolveDevice } from '../../src/train/setup.js';
import { describeOnSimt } from './support.js';

const env = { KEELGRAD_SIMT_OLD_DEVICES: '1', KEELGRAD_TEST_DEVICES: 'cuda:1' };

describeOnSimt('an old GPU beside another', env, async () => {
  test('is not used', () => {
    const { cuda } = runtimeInfo();
    expect(cuda).toMatchObject({ available: true });
    expect(cuda.devices.map((gpu) => gpu.capability)).toEqual([75, 86]);
    expect(cuda.devices[0].reason).toContain('compute capability 7.5, expected 8.0 (Ampere) or later');
    expect(resolveDevice('auto')).toBe('cuda:1');
    expect(resolveDevice('cuda')).toBe('cuda:1');
  });

  test('is refused where it is named, and the other one works', () => {
    expect(() => Tensor.from([1], { device: 'cuda:0' })).toThrow(
      'device cuda:0 is not available: old GPU has compute capability 7.5, expected 8.0 (Ampere) or later; use another GPU',
    );
    const device: Device = 'cuda:1';
    using x = Tensor.from([1, 2, 3], { device });
    expect([...x.dataSync()]).toEqual([1, 2, 3]);
    expect(memory(device).allocated).toBeGreaterThan(0);
  });
});
