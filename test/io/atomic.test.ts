// Files and folders appear whole or not at all; hashes name contents, not places.

import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { writeAtomic, writeFileAtomic, writeFolderAtomic, writeJsonAtomic } from '../../src/io/atomic.js';
import { hashBytes, hashFile, hashModelFolder } from '../../src/io/hash.js';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'keelgrad-'));
});
afterEach(() => rm(folder, { recursive: true }));
const text = (name: string) => readFile(join(folder, name), 'utf8');

describe('writeFileAtomic', () => {
  it('writes and replaces', async () => {
    const path = join(folder, 'a.json');
    await writeFileAtomic(path, 'one');
    await writeFileAtomic(path, Uint8Array.of(50));
    expect(await text('a.json')).toBe('2');
    await writeJsonAtomic(path, { a: 1 });
    expect(await text('a.json')).toBe('{\n  "a": 1\n}\n');
    expect(await readdir(folder)).toEqual(['a.json']);
  });

  it('leaves the old file and nothing else where writing fails', async () => {
    const path = join(folder, 'a');
    await writeFileAtomic(path, 'one');
    const broken = writeAtomic(path, async (file) => {
      await file.write('tw');
      throw new Error('half way');
    });
    await expect(broken).rejects.toThrow(/^half way$/);
    expect(await text('a')).toBe('one');
    expect(await readdir(folder)).toEqual(['a']);
    await expect(writeFileAtomic(join(folder, 'no', 'a'), '')).rejects.toThrow(/no\/a: cannot be written \(ENOENT/);
  });
});

describe('writeFolderAtomic', () => {
  const fill = (content: string) => (inside: string) => writeFile(join(inside, 'x'), content);

  it('puts a whole folder in place, of an older one too', async () => {
    const path = join(folder, 'deep', 'model');
    await writeFolderAtomic(path, fill('1'));
    await writeFile(join(path, 'stale'), '');
    await writeFolderAtomic(path, fill('2'));
    expect(await readdir(path)).toEqual(['x']);
    expect(await text('deep/model/x')).toBe('2');
    expect(await readdir(join(folder, 'deep'))).toEqual(['model']);
  });

  it('keeps the old folder where filling fails', async () => {
    const path = join(folder, 'model');
    await writeFolderAtomic(path, fill('1'));
    await expect(writeFolderAtomic(path, () => Promise.reject(new Error('stop')))).rejects.toThrow(/^stop$/);
    expect(await text('model/x')).toBe('1');
    expect(await readdir(folder)).toEqual(['model']);
  });
});

describe('hashes', () => {
  it('are SHA-256', async () => {
    const abc = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad';
    await writeFile(join(folder, 'f'), 'abc');
    expect(hashBytes('abc')).toBe(abc);
    expect(await hashFile(join(folder, 'f'))).toBe(abc);
    await expect(hashFile(join(folder, 'none'))).rejects.toThrow(/none: cannot be read/);
  });

  it('of a model folder cover the files that decide its numbers', async () => {
    for (const copy of ['a', 'b']) {
      await mkdir(join(folder, copy));
      await writeFile(join(folder, copy, 'config.json'), '{}');
      await writeFile(join(folder, copy, 'model.safetensors'), 'w');
      await writeFile(join(folder, copy, 'README.md'), copy);
    }
    const [a, b] = [await hashModelFolder(join(folder, 'a')), await hashModelFolder(join(folder, 'b'))];
    expect(a).toEqual(b);
    expect(Object.keys(a.files)).toEqual(['config.json', 'model.safetensors']);
    await writeFile(join(folder, 'b', 'model.safetensors'), 'v');
    expect((await hashModelFolder(join(folder, 'b'))).sha256).not.toBe(a.sha256);
    await expect(hashModelFolder(join(folder, 'c'))).rejects.toThrow(/c: cannot be read/);
  });
});
