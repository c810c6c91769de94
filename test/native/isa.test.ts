// The build itself: code compiled for an instruction set may not leak into code that runs without it. The linker keeps
// one copy of a weak symbol (an inline function, a std template) for all callers, and may choose the AVX-512 one: so every
// weak symbol of such an object must carry its instruction set's namespace in its name.

import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';

const objects = join(import.meta.dirname, '..', '..', 'build', 'cmake', 'CMakeFiles');

function objectFiles(library: string): string[] {
  const folder = join(objects, library, 'native', 'cpu');
  if (!existsSync(folder)) return [];
  return readdirSync(folder)
    .filter((file) => file.endsWith('.o'))
    .map((file) => join(folder, file));
}

function nmWorks(): boolean {
  try {
    execFileSync('nm', ['--version']);
    return true;
  } catch {
    return false;
  }
}

/** Demangled names of the weak symbols that the object files define. */
function weakSymbols(files: string[]): string[] {
  const listing = execFileSync('nm', ['-C', '--defined-only', ...files], { encoding: 'utf8', maxBuffer: 2 ** 26 });
  return [...listing.matchAll(/^[0-9a-f]* [WVu] (.*)$/gm)].map((match) => match[1]);
}

const cases: [isa: string, files: string[]][] = [
  ['avx2', objectFiles('keelgrad_cpu_avx2.dir')],
  ['avx512', objectFiles('keelgrad_cpu_avx512.dir')],
  ['avx512bf16', objectFiles('keelgrad.dir').filter((file) => file.includes('avx512'))],
];
const able = process.platform === 'linux' && nmWorks();

describe('objects of one instruction set', () => {
  for (const [isa, files] of cases)
    it.skipIf(!able || files.length === 0)(`${isa} (needs nm and the objects of a local build)`, () => {
      const weak = weakSymbols(files);
      expect(weak.length).toBeGreaterThan(0);
      expect(weak.filter((name) => !name.includes(`kg::cpu::${isa}::`))).toEqual([]);
    });
});
