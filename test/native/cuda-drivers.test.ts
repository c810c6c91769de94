// Why CUDA is not available, and what to do: NVIDIA's own runtime library over drivers that a test makes.
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

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
