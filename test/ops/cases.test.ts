// The case list against its definitions: values, first and second derivatives, gradients in every dtype.
import { afterAll, describe, test } from 'vitest';
import '../../src/ops/methods.js';
import { families } from '../support/cases.js';
import { checkDefinition, checkDerivative, checkGradients, checkValues, worstRatios } from '../support/checks.js';
import { testDevices } from '../support/devices.js';

for (const device of testDevices())
  for (const [family, cases] of Object.entries(families))
    describe(`${family} on ${device}`, () => {
      for (const c of cases()) {
        if (c.size === 'bench') continue;
        test(`${c.name}: values`, () => {
          for (const dtype of c.dtypes) checkValues(c, { device, dtype });
          if (c.definition) checkDefinition(c, device);
        });
        if (!c.differentiable || c.size === 'threads') continue;
        test(`${c.name}: gradients`, () => {
          for (const dtype of c.dtypes) checkGradients(c, { device, dtype });
        });
        if (c.size !== 'small') continue;
        test(`${c.name}: gradcheck`, () => {
          checkDerivative(c, device, 1);
          checkDerivative(c, device, 2);
        });
      }
    });

afterAll(() => {
  if (!process.env.KEELGRAD_TEST_ERRORS) return;
  const rows = [...worstRatios].sort(([a], [b]) => a.localeCompare(b));
  console.log(rows.map(([key, { ratio, name }]) => `${key}: ${ratio.toFixed(3)} (${name})`).join('\n'));
});
