// The small op cases on the device, values and gradients, for runs under a memory or race checker: one process, no finite
// differences. Skips itself where no GPU is asked for; KEELGRAD_TEST_SANITIZER names the checker it runs under.
import { describe, test } from 'vitest';
import '../../src/ops/methods.js';
import { families } from '../support/cases.js';
import { checkGradients, checkValues } from '../support/checks.js';
import { gpu, needsGpu } from './device.js';

for (const [family, cases] of Object.entries(families)) {
  const small = cases().filter(({ size }) => size === 'small');
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
