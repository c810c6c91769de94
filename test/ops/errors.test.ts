// What ops refuse: the message, at once or at the next read; nothing leaks, and later work is unharmed.
import { describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { sum } from '../../src/ops/reduce.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import type { Tensor } from '../../src/tensor/tensor.js';
import { errorCases, makeOn } from '../support/cases/errors.js';
import { testDevices } from '../support/devices.js';

for (const device of testDevices())
  describe(`errors on ${device}`, () => {
    const make = makeOn(device);
    for (const { op, name, run, message, later } of errorCases)
      test(`${op}: ${name}`, () => {
        const before = memory(device).storages;
        if (later) scope(() => expect(() => (run(make) as Tensor).dataSync()).toThrow(message));
        else expect(() => scope(() => void run(make))).toThrow(message);
        expect(memory(device).storages).toBe(before);
        expect(scope(() => sum(make([3])).item())).toBe(6);
      });
  });
