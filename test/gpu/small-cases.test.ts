// The small op cases on the device, values and gradients, for runs under a memory or race checker: no finite differences.
// Skips itself where no GPU is asked for. KEELGRAD_TEST_PART (2/8: the second of eight parts): every eighth case alone.
import { describe, test } from 'vitest';
import '../../src/ops/methods.js';
import { families } from '../support/cases.js';
import { checkGradients, checkValues } from '../support/checks.js';
import { gpu, needsGpu } from './device.js';

const [part, parts] = (process.env.KEELGRAD_TEST_PART ?? '1/1').split('/').map(Number);
let count = 0;

for (const [family, cases] of Object.entries(families)) {
  const small = cases().filter(({ size }) => size === 'small' && count++ % parts === part - 1);
  if (small.length === 0) continue;
  describe.skipIf(!gpu)(`${family} on ${gpu ?? needsGpu}`, () => {
    for (const c of small)
      test(c.name, () => {
        for (const dtype of c.dtypes) {
          checkValues(c, { device: gpu!, dtype });
          if (c.differentiable) checkGradients(c, { device: gpu!, dtype });
        }
      });
  });
}
