// Why CUDA is not available, and what to do, as the addon at hand says it. Over drivers of all kinds: cuda-drivers.test.ts.
import { describe, expect, it } from 'vitest';
import '../../src/ops/methods.js';
import { runtimeInfo } from '../../src/native/info.js';
import type { Device } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { resolveDevice } from '../../src/train/setup.js';

describe('the addon at hand', () => {
  // Loaded by the tests and not before: it may still have to be built.
  const status = (): ReturnType<typeof runtimeInfo>['cuda'] => runtimeInfo().cuda;

  it('says whether it contains CUDA, and why it cannot be used', () => {
    const cuda = status();
    expect(cuda.available ? cuda.built : true).toBe(true);
    expect(Boolean(cuda.reason && cuda.remedy)).toBe(!cuda.available);
    expect(cuda.runtime > 0).toBe(cuda.built);
  });

  it('refuses the device at the first use, with reason and remedy', ({ skip }) => {
    const { available, reason, remedy } = status();
    skip(available, 'CUDA is available');
    for (const device of ['cuda', 'cuda:0'] as Device[])
      expect(() => Tensor.from([1], { device })).toThrow(`device cuda:0 is not available: ${reason}; ${remedy}`);
    expect(() => resolveDevice('cuda')).toThrow(`--device cuda: not available: ${reason}; ${remedy}`);
  });

  it('falls back for auto, and says so once', ({ skip }) => {
    const { available, reason } = status();
    skip(available, 'CUDA is available');
    const messages: string[] = [];
    expect(resolveDevice('auto', (text) => messages.push(text))).toBe('cpu');
    expect(messages).toEqual([`running on the CPU (CUDA: ${reason})`]);
  });

  it('describes its GPUs', ({ skip }) => {
    const cuda = status();
    skip(!cuda.available, 'needs a GPU');
    expect(cuda.devices.length).toBeGreaterThan(0);
    expect(cuda.devices[0]).toMatchObject({ memory: expect.any(Number), capability: expect.any(Number) });
    expect(cuda.cublas).toBeTruthy();
    const usable = cuda.devices.findIndex((gpu) => gpu.reason === undefined);
    expect(resolveDevice('auto')).toBe(`cuda:${usable}`);
    const none = `cuda:${cuda.devices.length}` as Device;
    expect(() => Tensor.from([1], { device: none })).toThrow(/^device cuda:\d+ is not available: this machine has/);
  });

  it('knows the names of devices', () => {
    for (const name of ['gpu', 'cuda:', 'cuda:x', 'cuda:-1'])
      expect(() => Tensor.from([1], { device: name as Device })).toThrow(
        `expected the device cpu, cuda or cuda:<number>, found ${name}`,
      );
  });
});
