// The devices that op cases run on: the CPU always; others where they are there, or where KEELGRAD_TEST_DEVICES
// (comma-separated) asks for them.
import { runtimeInfo } from '../../src/native/info.js';
import type { Device } from '../../src/tensor/storage.js';

export function testDevices(): Device[] {
  const asked = process.env.KEELGRAD_TEST_DEVICES;
  if (asked) return asked.split(',') as Device[];
  return runtimeInfo().cuda.available ? ['cpu', 'cuda'] : ['cpu'];
}
