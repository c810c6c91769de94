// The case list with sentinels: guard zones around every buffer, which a write out of bounds breaks, and buffers that start
// out full of the guard's byte, so that reading what nobody wrote gives wrong values.
process.env.KEELGRAD_GUARDS = '1';

import { describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { launch } from '../../src/native/launch.js';
import { zeros } from '../../src/ops/movement.js';
import { scope } from '../../src/tensor/scope.js';
import { synchronize } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { families } from '../support/cases.js';
import { checkValues, evaluate } from '../support/checks.js';
import { testDevices } from '../support/devices.js';
import { hostInputs } from '../support/op-case.js';

for (const device of testDevices()) {
  describe(`sentinels on ${device}`, () => {
    test('find a kernel that writes past its output, and name the buffer', () => {
      const x = zeros([4, 2], { device });
      const small = Tensor.empty([2, 2], { device });
      launch('softmax', [small, x]);
      small.dispose();
      expect(() => synchronize(device)).toThrow('[memory] a kernel wrote outside of a buffer of 16 bytes');
      x.dispose();
      expect(() => synchronize(device)).not.toThrow();
    });

    test('new memory holds no plausible number', () => {
      const empty = Tensor.empty([3], { device });
      expect([...empty.dataSync()].every((v) => v < -1e7)).toBe(true);
      empty.dispose();
    });
  });

  for (const [family, cases] of Object.entries(families))
    describe(`${family} within their buffers on ${device}`, () => {
      for (const c of cases().filter((c) => c.size === 'small' || c.size === 'large'))
        test(c.name, () => {
          checkValues(c, { device, dtype: c.dtypes.includes('float32') ? 'float32' : c.dtypes[0] });
          for (const dtype of c.dtypes) scope(() => void evaluate(c, { device, dtype }, hostInputs(c, dtype)));
          synchronize(device);
        });
    });
}
