// The safetensors format: reading and checking headers, single and sharded checkpoints, raw bytes of one tensor.
// Never reads tensor data while opening, and never trusts a header: every offset is checked against the file.

import { type FileHandle, open, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { didYouMean, KeelgradError, show } from '../errors.js';
import { isRecord } from './fields.js';
import { readJsonFile } from './json-file.js';

/** Bytes per element of every dtype of the format that fills whole bytes, in the format's own order. */
export const DTYPE_BYTES = {
  BOOL: 1,
  U8: 1,
  I8: 1,
  F8_E5M2: 1,
  F8_E4M3: 1,
  I16: 2,
  U16: 2,
  F16: 2,
  BF16: 2,
  I32: 4,
  U32: 4,
  F32: 4,
  C64: 8,
  F64: 8,
  I64: 8,
  U64: 8,
} as const;
export type SafetensorsDtype = keyof typeof DTYPE_BYTES;

/** Where one tensor lies: `length` bytes from the absolute offset `begin` of `file`, row-major, little endian. */
export interface TensorLocation {
  readonly name: string;
  readonly dtype: SafetensorsDtype;
  readonly shape: readonly number[];
  readonly file: string;
  readonly begin: number;
  readonly length: number;
}

export interface SafetensorsHeader {
  readonly tensors: Map<string, TensorLocation>;
  readonly metadata: Readonly<Record<string, string>>;
}

const MAX_HEADER_BYTES = 100_000_000;

const isCount = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0;

/** Bytes of a tensor, or undefined where they do not fit an exact number. */
export function byteLength(dtype: SafetensorsDtype, shape: readonly number[]): number | undefined {
  let bytes: number = DTYPE_BYTES[dtype];
  for (const size of shape) bytes *= size;
  return Number.isSafeInteger(bytes) ? bytes : undefined;
}

async function readExactly(file: FileHandle, target: Uint8Array, position: number): Promise<number> {
  let done = 0;
  while (done < target.length) {
    const length = Math.min(target.length - done, 1 << 30);
    const { bytesRead } = await file.read(target, done, length, position + done);
    if (bytesRead === 0) break;
    done += bytesRead;
  }
  return done;
}

async function openForReading(path: string): Promise<FileHandle> {
  return open(path, 'r').catch((error: NodeJS.ErrnoException) => {
    const reason = error.code === 'ENOENT' ? 'no such file' : error.message;
    throw new KeelgradError(`${path}: cannot be opened: ${reason}`, { cause: error });
  });
}

/** JSON.parse keeps the last of two equal keys; a header with two tensors of one name has to be an error. */
function findDuplicateKey(text: string): string | undefined {
  const seen = new Set<string>();
  let depth = 0;
  for (const { 0: token, index } of text.matchAll(/"(?:[^"\\]|\\.)*"|[{}[\]]/g)) {
    if (token === '{' || token === '[') depth++;
    else if (token === '}' || token === ']') depth--;
    else if (depth === 1 && /^\s*:/.test(text.slice(index + token.length, index + token.length + 16))) {
      const key = JSON.parse(token) as string;
      if (seen.has(key)) return key;
      seen.add(key);
    }
  }
  return undefined;
}

/** The header's text; checks the two lengths that frame it. */
async function readHeaderText(file: FileHandle, path: string, size: number): Promise<string> {
  const fail = (what: string) =>
    new KeelgradError(`${path}: ${what}; the file is truncated or not in safetensors format, fetch it again`);
  const prefix = Buffer.alloc(8);
  if ((await readExactly(file, prefix, 0)) < 8) throw fail(`expected a header length of 8 bytes, found ${size} bytes`);
  const length = prefix.readBigUInt64LE();
  if (length > MAX_HEADER_BYTES) throw fail(`header length ${length} is above the limit of ${MAX_HEADER_BYTES} bytes`);
  const bytes = Buffer.alloc(Number(length));
  if ((await readExactly(file, bytes, 8)) < bytes.length) {
    throw fail(`expected a header of ${length} bytes, found ${Math.max(0, size - 8)} bytes behind its length`);
  }
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch {
    throw fail('the header is not UTF-8 text');
  }
}

function parseHeaderJson(text: string, path: string): Record<string, unknown> {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new KeelgradError(
      `${path}: the header is not valid JSON (${(error as Error).message}); fetch the file again`,
    );
  }
  if (!isRecord(value)) throw new KeelgradError(`${path}: the header is not a JSON object; fetch the file again`);
  const duplicate = findDuplicateKey(text);
  if (duplicate !== undefined) throw new KeelgradError(`${path}: tensor "${duplicate}" is in the header twice`);
  return value;
}

function parseMetadata(value: unknown, path: string): Record<string, string> {
  if (value === undefined) return {};
  if (isRecord(value) && Object.values(value).every((entry) => typeof entry === 'string')) {
    return value as Record<string, string>;
  }
  throw new KeelgradError(`${path}: __metadata__ must be an object of strings, found ${show(value)}`);
}

/** Reads one tensor's entry; its offsets count from `dataBegin`, the first byte behind the header. */
function parseEntry(name: string, value: unknown, path: string, dataBegin: number, fileSize: number): TensorLocation {
  const fail = (what: string) => new KeelgradError(`${path}: tensor "${name}": ${what}`);
  const { dtype, shape, data_offsets: offsets } = isRecord(value) ? value : {};
  if (typeof dtype !== 'string' || !Array.isArray(shape) || !Array.isArray(offsets) || offsets.length !== 2) {
    throw fail(`expected dtype, shape and two data_offsets, found ${show(value)}`);
  }
  if (!Object.hasOwn(DTYPE_BYTES, dtype)) {
    throw fail(`unknown dtype ${show(dtype)}; supported: ${Object.keys(DTYPE_BYTES).join(', ')}`);
  }
  if (!shape.every(isCount)) throw fail(`shape must be a list of sizes, found ${show(shape)}`);
  const [begin, end] = offsets as unknown[];
  if (!isCount(begin) || !isCount(end) || begin > end) throw fail(`data_offsets ${show(offsets)} are no byte range`);
  if (dataBegin + end > fileSize) {
    const needed = `data_offsets [${begin}, ${end}] need a file of ${dataBegin + end} bytes`;
    throw fail(`${needed}, found ${fileSize}; the file is truncated, fetch it again`);
  }
  const expected = byteLength(dtype as SafetensorsDtype, shape);
  if (end - begin !== expected) {
    throw fail(`${dtype} of shape [${shape}] takes ${expected} bytes, found data_offsets of ${end - begin} bytes`);
  }
  return { name, dtype: dtype as SafetensorsDtype, shape, file: path, begin: dataBegin + begin, length: end - begin };
}

/** The format wants the data region covered exactly: no overlaps, no holes, nothing behind the last tensor. */
function checkCoverage(tensors: Iterable<TensorLocation>, path: string, dataBegin: number, fileSize: number): void {
  let position = dataBegin;
  let previous = 'the header';
  for (const tensor of [...tensors].sort((a, b) => a.begin - b.begin || a.length - b.length)) {
    if (tensor.begin !== position) {
      const kind = tensor.begin < position ? 'overlaps' : 'leaves a hole after';
      const where = `expected to begin at byte ${position - dataBegin}, found ${tensor.begin - dataBegin}`;
      throw new KeelgradError(`${path}: tensor "${tensor.name}" ${kind} ${previous}: ${where}`);
    }
    position += tensor.length;
    previous = `tensor "${tensor.name}"`;
  }
  if (position !== fileSize) {
    throw new KeelgradError(`${path}: expected ${position} bytes by its header, found ${fileSize}; fetch it again`);
  }
}

/** Reads and checks a file's header; the data itself is not touched. */
export async function readSafetensorsHeader(path: string): Promise<SafetensorsHeader> {
  const file = await openForReading(path);
  try {
    const { size } = await file.stat();
    const text = await readHeaderText(file, path, size);
    const { __metadata__: rawMetadata, ...entries } = parseHeaderJson(text, path);
    const dataBegin = 8 + Buffer.byteLength(text);
    const tensors = new Map<string, TensorLocation>();
    for (const [name, value] of Object.entries(entries)) {
      tensors.set(name, parseEntry(name, value, path, dataBegin, size));
    }
    checkCoverage(tensors.values(), path, dataBegin, size);
    return { tensors, metadata: parseMetadata(rawMetadata, path) };
  } finally {
    await file.close();
  }
}

/** Reads one tensor's bytes whole: for tests, adapters and other small things. Weights are mapped instead. */
export async function readTensorBytes(tensor: TensorLocation): Promise<Uint8Array> {
  const bytes = new Uint8Array(tensor.length);
  const file = await openForReading(tensor.file);
  try {
    const read = await readExactly(file, bytes, tensor.begin);
    if (read === bytes.length) return bytes;
    throw new KeelgradError(
      `${tensor.file}: tensor "${tensor.name}": expected ${bytes.length} bytes, found ${read}; the file was truncated`,
    );
  } finally {
    await file.close();
  }
}

export interface Checkpoint extends SafetensorsHeader {
  /** The safetensors files the tensors lie in, as absolute or caller-relative paths. */
  readonly files: readonly string[];
}

export const SINGLE_FILE = 'model.safetensors';
export const INDEX_FILE = 'model.safetensors.index.json';

const exists = (path: string): Promise<boolean> =>
  stat(path).then(
    () => true,
    () => false,
  );

async function readWeightMap(path: string): Promise<Map<string, string>> {
  const index = await readJsonFile(path);
  const weightMap = isRecord(index) ? index.weight_map : undefined;
  if (!isRecord(weightMap))
    throw new KeelgradError(`${path}: expected an object "weight_map", found ${show(weightMap)}`);
  for (const [name, shard] of Object.entries(weightMap)) {
    if (typeof shard !== 'string' || shard !== basename(shard) || shard.includes('\\')) {
      throw new KeelgradError(`${path}: weight_map of "${name}" must name a file of this folder, found ${show(shard)}`);
    }
  }
  return new Map(Object.entries(weightMap as Record<string, string>));
}

async function openShards(folder: string): Promise<Checkpoint> {
  const indexPath = join(folder, INDEX_FILE);
  const weightMap = await readWeightMap(indexPath);
  const shards = [...new Set(weightMap.values())].sort();
  const present = await Promise.all(shards.map((shard) => exists(join(folder, shard))));
  const missing = shards.filter((_, i) => !present[i]);
  if (missing.length > 0) {
    const count = `${missing.length} of ${shards.length} shards missing`;
    throw new KeelgradError(`${folder}: ${count}: ${missing.join(', ')}; fetch them, or ${INDEX_FILE} that fits`);
  }
  const tensors = new Map<string, TensorLocation>();
  let metadata: Readonly<Record<string, string>> = {};
  for (const shard of shards) {
    const header = await readSafetensorsHeader(join(folder, shard));
    metadata = { ...header.metadata, ...metadata };
    for (const [name, tensor] of header.tensors) {
      const other = tensors.get(name);
      if (other) throw new KeelgradError(`${folder}: tensor "${name}" is both in ${basename(other.file)} and ${shard}`);
      tensors.set(name, tensor);
    }
  }
  checkWeightMap(weightMap, tensors, indexPath);
  return { files: shards.map((shard) => join(folder, shard)), tensors, metadata };
}

function checkWeightMap(weightMap: Map<string, string>, tensors: Map<string, TensorLocation>, path: string): void {
  for (const [name, shard] of weightMap) {
    const found = tensors.get(name);
    if (found && basename(found.file) === shard) continue;
    const instead = found ? `found in ${basename(found.file)}` : `not found${didYouMean(name, tensors.keys())}`;
    throw new KeelgradError(`${path}: tensor "${name}" should be in ${shard}, ${instead}`);
  }
}

/**
 * Opens the weights of a model folder: `model.safetensors`, or else the shards of `model.safetensors.index.json`
 * (the order in which transformers looks for them). Reads headers only.
 */
export async function openCheckpoint(folder: string): Promise<Checkpoint> {
  const single = join(folder, SINGLE_FILE);
  if (await exists(single)) return { ...(await readSafetensorsHeader(single)), files: [single] };
  if (await exists(join(folder, INDEX_FILE))) return openShards(folder);
  if (!(await exists(folder))) throw new KeelgradError(`${folder}: no such folder`);
  const pickled = await exists(join(folder, 'pytorch_model.bin'));
  const remedy = pickled ? '; pytorch_model.bin is not read, save the model with safe_serialization=True' : '';
  throw new KeelgradError(`${folder}: expected ${SINGLE_FILE} or ${INDEX_FILE}, found neither${remedy}`);
}
