// SHA-256 of strings, files and model folders, for run.json and for caches keyed by model and data.
// Never reads a file whole: multi-gigabyte weights are streamed.

import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { KeelgradError } from '../errors.js';

export function hashBytes(data: string | Uint8Array): string {
  return createHash('sha256').update(data).digest('hex');
}

/** Hex SHA-256 of a file's bytes. */
export async function hashFile(path: string): Promise<string> {
  const hash = createHash('sha256');
  try {
    await pipeline(createReadStream(path, { highWaterMark: 1 << 20 }), hash);
  } catch (error) {
    throw new KeelgradError(`${path}: cannot be read (${(error as Error).message})`, { cause: error });
  }
  return hash.digest('hex');
}

/** What decides a model's numbers: its configuration, its weights, an adapter's, and its tokenizer. */
const isModelFile = (name: string): boolean =>
  /^((model|adapter_model)(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json)$/.test(name) ||
  ['config.json', 'adapter_config.json'].includes(name) ||
  ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja'].includes(name);

export interface FolderHash {
  /** Hash of the sorted `name hash` lines below. */
  sha256: string;
  files: Record<string, string>;
}

/** Hash of a model or adapter folder: of the files that matter, by name, whatever else lies beside them. */
export async function hashModelFolder(folder: string): Promise<FolderHash> {
  const entries = await readdir(folder).catch((error: Error) => {
    throw new KeelgradError(`${folder}: cannot be read (${error.message})`, { cause: error });
  });
  const files: Record<string, string> = {};
  for (const name of entries.filter(isModelFile).sort()) files[name] = await hashFile(join(folder, name));
  const lines = Object.entries(files).map(([name, hash]) => `${name} ${hash}\n`);
  return { sha256: hashBytes(lines.join('')), files };
}
