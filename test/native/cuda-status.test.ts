// Why CUDA is not available, and what to do: with NVIDIA's own runtime library over drivers that a test makes, and with the
// addon at hand.
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import '../../src/ops/methods.js';
import { runtimeInfo } from '../../src/native/info.js';
import type { Device } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { resolveDevice } from '../../src/train/setup.js';

const native = resolve(import.meta.dirname, '..', '..', 'native');
const sources = join(import.meta.dirname, 'cuda');
const compiler = process.env.CXX ?? 'c++';
const cudaHome = process.env.CUDA_HOME ?? process.env.CUDA_PATH ?? '';
const cudart = ['lib', 'lib64', 'targets/x86_64-linux/lib']
  .map((folder) => join(cudaHome, folder, 'libcudart_static.a'))
  .find((file) => existsSync(file));
/** In CI nothing is left out for want of it (.ci/run installs or finds it). */
const inCi = process.env.CI === 'true';
const able = process.platform === 'linux' && spawnSync(compiler, ['--version']).status === 0;

describe.skipIf(!able || !(cudart || inCi))(
  "drivers as NVIDIA's runtime meets them (needs a compiler and CUDA_HOME)",
  () => {
    let folder: string;

    beforeAll(() => {
      if (!cudart) throw new Error(`expected lib/libcudart_static.a in CUDA_HOME, found none in "${cudaHome}"`);
      folder = mkdtempSync(join(tmpdir(), 'keelgrad-driver-'));
      const driver = ['-x', 'c', join(sources, 'driver.c'), '-shared', '-fPIC', '-o', join(folder, 'libcuda.so.1')];
      execFileSync(compiler, driver);
      const files = [
        join(sources, 'status.cc'),
        ...['cuda/status.cc', 'cuda/cublas.cc', 'runtime/error.cc'].map((f) => join(native, f)),
      ];
      const flags = [
        '-std=c++17',
        `-I${native}`,
        '-isystem',
        join(cudaHome, 'include'),
        cudart,
        '-ldl',
        '-lrt',
        '-pthread',
      ];
      execFileSync(compiler, [...files, ...flags, '-o', join(folder, 'status')]);
    });
    afterAll(() => rmSync(folder, { recursive: true, force: true }));

    interface Status {
      available: boolean;
      reason: string;
      remedy: string;
      driver: number;
      runtime: number;
    }

    function statusWith(env: Record<string, string>): Status {
      const output = execFileSync(join(folder, 'status'), {
        env: { LD_LIBRARY_PATH: folder, ...env },
        encoding: 'utf8',
      });
      const [available, reason, remedy, driver, runtime] = output.split('\n');
      return { available: available === '1', reason, remedy, driver: Number(driver), runtime: Number(runtime) };
    }

    it('none', () => {
      // A folder without the stub; where the system has a driver, there is nothing to see.
      const status = statusWith({ LD_LIBRARY_PATH: '/nonexistent' });
      if (status.driver > 0) return;
      expect(status).toMatchObject({ available: false, reason: 'no NVIDIA driver was found (libcuda.so.1)' });
      expect(status.remedy).toMatch(/^install NVIDIA's driver for CUDA \d+.*or use --device cpu$/);
      expect(status.runtime).toBeGreaterThan(12000);
    });

    it('too old', () => {
      const { available, reason, remedy, driver } = statusWith({ TEST_DRIVER_VERSION: '11040' });
      expect(available).toBe(false);
      expect(reason).toMatch(/^the NVIDIA driver is too old: it supports CUDA 11\.4, this build needs 1[23]\.0$/);
      expect(remedy).toMatch(/^install NVIDIA's driver for CUDA 1[23]/);
      expect(driver).toBe(11040);
    });

    it('without a GPU', () => {
      const { reason, remedy } = statusWith({ TEST_DRIVER_INIT: '100' });
      expect(reason).toBe('the NVIDIA driver sees no GPU');
      expect(remedy).toContain('CUDA_VISIBLE_DEVICES');
    });

    it('that do not start', () => {
      const { reason, remedy } = statusWith({ TEST_DRIVER_INIT: '999' });
      expect(reason).toMatch(/^the NVIDIA driver does not start: /);
      expect(remedy).toContain('nvidia-smi');
    });
  },
);

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
