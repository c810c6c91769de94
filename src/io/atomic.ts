// Files and folders that appear whole or not at all: written beside their target, flushed, then renamed.
// Never leaves a half-written target, and never deletes what stood there before the new one is complete.

import { randomBytes } from 'node:crypto';
import { type FileHandle, mkdir, open, rename, rm } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { KeelgradError } from '../errors.js';

const siblingName = (path: string): string =>
  join(dirname(path), `.${basename(path)}.${process.pid}.${randomBytes(4).toString('hex')}.tmp`);

/** Makes the rename itself durable. Some systems refuse to open folders; there the rename's own order has to do. */
async function syncFolder(path: string): Promise<void> {
  const folder = await open(path, 'r').catch(() => undefined);
  if (!folder) return;
  await folder.sync().catch(() => undefined);
  await folder.close();
}

/** Errors of the operating system become messages; ours, and bugs in a callback, pass as they are. */
function writeFailure(path: string, error: unknown): unknown {
  if (!(error instanceof Error) || !('syscall' in error)) return error;
  const message = `${path}: cannot be written (${error.message}); check the folder, its permissions and free space`;
  return new KeelgradError(message, { cause: error });
}

/** Runs `write` on a temporary file of the same folder, then puts it in place of `path`. The folder must exist. */
export async function writeAtomic(path: string, write: (file: FileHandle) => Promise<void>): Promise<void> {
  const target = resolve(path);
  const temporary = siblingName(target);
  try {
    const file = await open(temporary, 'wx');
    try {
      await write(file);
      await file.sync();
    } finally {
      await file.close();
    }
    await rename(temporary, target);
  } catch (error) {
    await rm(temporary, { force: true });
    throw writeFailure(path, error);
  }
  await syncFolder(dirname(target));
}

/** Replaces `path` by `data` in one step. */
export async function writeFileAtomic(path: string, data: string | Uint8Array): Promise<void> {
  await writeAtomic(path, (file) => file.writeFile(data));
}

/** JSON in two-space indentation with a last newline, as Hugging Face's own tools write it. */
export async function writeJsonAtomic(path: string, value: unknown): Promise<void> {
  await writeFileAtomic(path, `${JSON.stringify(value, null, 2)}\n`);
}

async function replaceFolder(temporary: string, target: string): Promise<void> {
  const old = siblingName(target);
  const replaced = await rename(target, old).then(
    () => true,
    (error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT') return false;
      throw error;
    },
  );
  try {
    await rename(temporary, target);
  } catch (error) {
    if (replaced) await rename(old, target);
    throw error;
  }
  if (replaced) await rm(old, { recursive: true, force: true });
}

/** Fills a temporary sibling folder by `fill`, then puts it in place of `path`, whatever stood there included. */
export async function writeFolderAtomic(path: string, fill: (folder: string) => Promise<void>): Promise<void> {
  const target = resolve(path);
  const temporary = siblingName(target);
  try {
    await mkdir(dirname(target), { recursive: true });
    await mkdir(temporary);
    await fill(temporary);
    await syncFolder(temporary);
    await replaceFolder(temporary, target);
  } catch (error) {
    await rm(temporary, { recursive: true, force: true });
    throw writeFailure(path, error);
  }
  await syncFolder(dirname(target));
}
