// The kernels that were enqueued, seen at the boundary to the addon: on every device, and without another module in between.
import { vi } from 'vitest';
import { addon } from '../../src/native/addon.js';

/** From the call on: names in order, in a list that grows. Once a file, before the tests. */
export function recordLaunches(): string[] {
  const names: string[] = [];
  const native = addon();
  const { submit } = native;
  vi.spyOn(native, 'submit').mockImplementation(() => {
    names.push(native.kernels[native.commands[0]].name);
    submit.call(native);
  });
  return names;
}
