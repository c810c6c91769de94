// Writes safetensors files and sharded checkpoints, byte for byte as the Python library orders and pads them.
// Never holds more than one tensor's bytes, and never replaces a file before the new one is complete.

import type { FileHandle } from 'node:fs/promises';
import { mkdir, readdir, rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { KeelgradError } from '../errors.js';
import { writeAtomic, writeJsonAtomic } from './atomic.js';
import { byteLength, DTYPE_BYTES, INDEX_FILE, type SafetensorsDtype, SINGLE_FILE } from './safetensors.js';

/** A tensor to be written. `data` is called once, when its turn comes, and gives exactly the bytes of the shape. */
export interface TensorSource {
  readonly name: string;
  readonly dtype: SafetensorsDtype;
  readonly shape: readonly number[];
  readonly data: () => Uint8Array | Promise<Uint8Array>;
}

const DTYPE_ORDER = Object.keys(DTYPE_BYTES);

/** Widest alignment first, then by name: the library's order. */
const inFileOrder = (a: TensorSource, b: TensorSource): number =>
  DTYPE_ORDER.indexOf(b.dtype) - DTYPE_ORDER.indexOf(a.dtype) || (a.name < b.name ? -1 : 1);

function sizeOf(source: TensorSource): number {
  const bytes = byteLength(source.dtype, source.shape);
  if (bytes === undefined) throw new Error(`tensor "${source.name}": [${source.shape}] is no valid shape`);
  return bytes;
}

function encodeHeader(sources: readonly TensorSource[], metadata: Readonly<Record<string, string>> | null): Buffer {
  const entries: [string, unknown][] = metadata ? [['__metadata__', metadata]] : [];
  const names = new Set(['__metadata__']);
  let position = 0;
  for (const source of sources) {
    if (names.has(source.name)) throw new Error(`tensor "${source.name}" is to be written twice`);
    names.add(source.name);
    const end = position + sizeOf(source);
    entries.push([source.name, { dtype: source.dtype, shape: source.shape, data_offsets: [position, end] }]);
    position = end;
  }
  // Entries are joined by hand: an object would move names that look like numbers to the front.
  const text = `{${entries.map(([name, entry]) => `${JSON.stringify(name)}:${JSON.stringify(entry)}`).join(',')}}`;
  const length = Math.ceil(Buffer.byteLength(text) / 8) * 8;
  const header = Buffer.alloc(8 + length, ' ');
  header.writeBigUInt64LE(BigInt(length));
  header.write(text, 8);
  return header;
}

async function writeAll(file: FileHandle, bytes: Uint8Array): Promise<void> {
  for (let done = 0; done < bytes.length; ) {
    const { bytesWritten } = await file.write(bytes, done, Math.min(bytes.length - done, 1 << 30));
    done += bytesWritten;
  }
}

/** Writes one file. `metadata` defaults to the `{"format": "pt"}` that transformers and PEFT ask for; null: none. */
export async function writeSafetensors(
  path: string,
  tensors: Iterable<TensorSource>,
  metadata: Readonly<Record<string, string>> | null = { format: 'pt' },
): Promise<void> {
  const sources = [...tensors].sort(inFileOrder);
  const header = encodeHeader(sources, metadata);
  await writeAtomic(path, async (file) => {
    await writeAll(file, header);
    for (const source of sources) {
      const bytes = await source.data();
      if (bytes.byteLength !== sizeOf(source)) {
        throw new Error(`tensor "${source.name}": expected ${sizeOf(source)} bytes, found ${bytes.byteLength}`);
      }
      await writeAll(file, bytes);
    }
  });
}

/** Greedy split in the given order, as transformers does it; a tensor above the limit has a shard of its own. */
function splitIntoShards(sources: readonly TensorSource[], maxShardBytes: number): TensorSource[][] {
  const shards: TensorSource[][] = [[]];
  let bytes = 0;
  for (const source of sources) {
    const size = sizeOf(source);
    if (bytes + size > maxShardBytes && shards[shards.length - 1].length > 0) {
      shards.push([]);
      bytes = 0;
    }
    shards[shards.length - 1].push(source);
    bytes += size;
  }
  return shards;
}

const shardName = (index: number, count: number): string =>
  `model-${String(index + 1).padStart(5, '0')}-of-${String(count).padStart(5, '0')}.safetensors`;

const isWeightFile = (name: string): boolean =>
  name === SINGLE_FILE || name === INDEX_FILE || /^model-\d{5}-of-\d{5}\.safetensors$/.test(name);

function buildIndex(shards: readonly TensorSource[][]): unknown {
  const sources = shards.flat();
  const place = shards.flatMap((shard, i) => shard.map((source) => [source.name, shardName(i, shards.length)]));
  const elements = (source: TensorSource) => source.shape.reduce((product, size) => product * size, 1);
  return {
    metadata: {
      total_parameters: sources.reduce((sum, source) => sum + elements(source), 0),
      total_size: sources.reduce((sum, source) => sum + sizeOf(source), 0),
    },
    weight_map: Object.fromEntries(place.sort(([a], [b]) => (a < b ? -1 : 1))),
  };
}

/**
 * Writes a model's weights into `folder`: one `model.safetensors`, or shards with an index when they are larger than
 * `maxShardBytes` (5 GB). Weight files of an older save are removed once the new ones stand.
 */
export async function writeCheckpoint(
  folder: string,
  tensors: Iterable<TensorSource>,
  options: { maxShardBytes?: number; metadata?: Readonly<Record<string, string>> } = {},
): Promise<string[]> {
  const { maxShardBytes = 5e9, metadata } = options;
  if (!(maxShardBytes > 0)) throw new KeelgradError(`maxShardBytes must be positive, found ${maxShardBytes}`);
  const shards = splitIntoShards([...tensors], maxShardBytes);
  const names = shards.length === 1 ? [SINGLE_FILE] : shards.map((_, i) => shardName(i, shards.length));
  await mkdir(folder, { recursive: true });
  const pending = (name: string) => join(folder, `.${name}.new`);
  for (const [i, shard] of shards.entries()) await writeSafetensors(pending(names[i]), shard, metadata);
  for (const name of names) await rename(pending(name), join(folder, name));
  if (shards.length > 1) {
    await writeJsonAtomic(join(folder, INDEX_FILE), buildIndex(shards));
    names.push(INDEX_FILE);
  }
  const stale = (await readdir(folder)).filter((name) => isWeightFile(name) && !names.includes(name));
  for (const name of stale) await rm(join(folder, name));
  return names;
}
