// Where the package lies: the nearest folder above this code with a package.json, in sources and in the build alike.
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

function find(): string {
  let folder = dirname(fileURLToPath(import.meta.url));
  while (!existsSync(join(folder, 'package.json'))) {
    const above = dirname(folder);
    if (above === folder) throw new Error('keelgrad: its package.json is missing; install the package again');
    folder = above;
  }
  return folder;
}

let found: string | undefined;

/** The package's folder. */
export function packageRoot(): string {
  found ??= find();
  return found;
}
