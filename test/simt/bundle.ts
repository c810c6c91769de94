// digests.ts as JavaScript that node runs by itself, for processes with an environment of their own.
import { join } from 'node:path';
import { rolldown } from 'rolldown';
import { root } from './support.js';

/** Bundles digests.ts into the folder; returns the file. */
export async function bundleDigests(folder: string): Promise<string> {
  const file = join(folder, 'digests.mjs');
  const build = await rolldown({
    input: join(import.meta.dirname, 'digests.ts'),
    platform: 'node',
    external: /^[^./]/,
    cwd: root,
  });
  await build.write({ file, format: 'esm' });
  await build.close();
  return file;
}
