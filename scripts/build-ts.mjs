// Compiles src/ to dist/, incrementally: what `npm run build:ts` and `prepare` call.
// Removes outputs whose source is gone, and keeps the executable executable.
import { spawnSync } from 'node:child_process';
import { chmodSync, existsSync, readdirSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const dist = join(root, 'dist');

const compiler = join(dirname(createRequire(import.meta.url).resolve('typescript/package.json')), 'bin', 'tsc');
const args = [compiler, '-p', join(root, 'tsconfig.build.json')];
const { status } = spawnSync(process.execPath, args, { cwd: root, stdio: 'inherit' });
if (status !== 0) process.exit(status ?? 1);

for (const file of readdirSync(dist, { recursive: true })) {
  const source = file.replace(/(\.d\.ts|\.js)$/, '.ts');
  if (source !== file && !existsSync(join(root, 'src', source))) rmSync(join(dist, file));
}
chmodSync(join(dist, 'cli', 'main.js'), 0o755);
