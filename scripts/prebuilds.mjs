// Makes prebuilds/<platform>-<arch>/keelgrad.<libc>.node for this machine: prebuildify drives the same CMake build, and
// node-gyp-build finds the file in an installed package without a compiler.
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import prebuildify from 'prebuildify';

const root = fileURLToPath(new URL('..', import.meta.url));
const nodeGyp = join(root, 'scripts', 'build-native.mjs');
const options = { cwd: root, napi: true, strip: true, tagLibc: true, nodeGyp };

await promisify(prebuildify)(options);
// prebuildify moved the addon; the checkout keeps its own, whatever it is rebuilt to.
await import('./build-native.mjs');
