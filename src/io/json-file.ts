// Reads one JSON file with errors that name it. Knows nothing of what is inside.

import { readFile } from 'node:fs/promises';
import { KeelgradError } from '../errors.js';

/** The file's text without a byte order mark, or undefined when it does not exist. */
export async function readTextFileIfPresent(path: string): Promise<string | undefined> {
  try {
    return (await readFile(path, 'utf8')).replace(/^\uFEFF/, '');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw new KeelgradError(`${path}: cannot be read: ${(error as Error).message}`, { cause: error });
  }
}

export function parseJson(text: string, path: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new KeelgradError(`${path}: not valid JSON: ${(error as Error).message}`, { cause: error });
  }
}

export async function readJsonFileIfPresent(path: string): Promise<unknown> {
  const text = await readTextFileIfPresent(path);
  return text === undefined ? undefined : parseJson(text, path);
}

export async function readJsonFile(path: string): Promise<unknown> {
  const text = await readTextFileIfPresent(path);
  if (text === undefined) throw new KeelgradError(`${path}: no such file`);
  return parseJson(text, path);
}
