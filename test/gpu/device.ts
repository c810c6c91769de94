// The GPU that the tests of this folder run on: the first that KEELGRAD_TEST_DEVICES names; undefined where it names none,
// and the tests skip.
import { type Device, setDefaultDevice } from '../../src/tensor/storage.js';

const asked = (process.env.KEELGRAD_TEST_DEVICES ?? '').split(',').find((name) => name.startsWith('cuda'));

export const gpu = asked as Device | undefined;

/** What a skipped suite says of itself. */
export const needsGpu = 'needs a GPU: KEELGRAD_TEST_DEVICES=cuda';

/** Runs `f` with tensors on `device` where `f` names none. */
export async function onDevice<T>(device: Device, f: () => Promise<T>): Promise<T> {
  setDefaultDevice(device);
  try {
    return await f();
  } finally {
    setDefaultDevice('cpu');
  }
}
