// The package calls ops as free functions: with the methods taken away from the type of a tensor, it still compiles.
import { spawnSync } from 'node:child_process';
import { cpSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';

const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');

test('no module of the package uses the fluent interface', () => {
  const copy = mkdtempSync(join(tmpdir(), 'keelgrad-methods-'));
  try {
    cpSync(join(root, 'src'), join(copy, 'src'), { recursive: true });
    for (const file of ['package.json', 'tsconfig.json']) cpSync(join(root, file), join(copy, file));
    symlinkSync(join(root, 'node_modules'), join(copy, 'node_modules'));
    const methods = join(copy, 'src', 'ops', 'methods.ts');
    const text = readFileSync(methods, 'utf8');
    expect(text).toContain('interface Tensor extends Fluent {}');
    writeFileSync(methods, text.replace('interface Tensor extends Fluent {}', ''));
    const tsc = join(dirname(createRequire(import.meta.url).resolve('typescript/package.json')), 'bin', 'tsc');
    const { stdout } = spawnSync(process.execPath, [tsc, '--noEmit', '-p', copy], { cwd: copy, encoding: 'utf8' });
    const used = stdout.split('\n').filter((line) => line.startsWith('src/') && !line.startsWith('src/ops/methods.ts'));
    expect(used).toEqual([]);
  } finally {
    rmSync(copy, { recursive: true, force: true });
  }
});
