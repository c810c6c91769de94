// Builds the addon with cmake-js, incrementally: what `npm run build:native`, `prepare` and binding.gyp call.
// KEELGRAD_SKIP_NATIVE=1 skips it. Output: build/Release/keelgrad.node.
import { spawnSync } from 'node:child_process';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const require = createRequire(import.meta.url);

if (process.env.KEELGRAD_SKIP_NATIVE !== '1') {
  const cmakeJs = join(dirname(require.resolve('cmake-js/package.json')), 'bin', 'cmake-js');
  const napi = require('node-addon-api').include.replaceAll('"', '');
  const args = [cmakeJs, 'compile', `--CDKG_NODE_ADDON_API=${napi}`, '--parallel', '2'];
  const result = spawnSync(process.execPath, args, { cwd: root, stdio: 'inherit' });
  if (result.status !== 0) {
    console.error(
      'keelgrad: the native addon did not build. Expected: a C++17 compiler, cmake >= 3.18 and make (or ninja).\n' +
        'Install them (Debian: apt-get install g++ cmake make), then run: npm run build:native',
    );
    process.exit(result.status ?? 1);
  }
}
