// Headers that must be believed and headers that must not; files as the Python library writes them, byte for byte.

import { readFileSync } from 'node:fs';
import { cp, mkdtemp, readdir, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { openCheckpoint, readSafetensorsHeader, readTensorBytes } from '../../src/io/safetensors.js';
import { type TensorSource, writeCheckpoint, writeSafetensors } from '../../src/io/safetensors-write.js';
import { describeWithShared, sharedPath } from '../shared.js';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'keelgrad-'));
});
afterEach(() => rm(folder, { recursive: true }));

const floats = (name: string, shape: number[], values: number[]): TensorSource => ({
  name,
  dtype: 'F32',
  shape,
  data: () => new Uint8Array(Float32Array.from(values).buffer),
});
const bytes = (name: string, values: number[]): TensorSource => ({
  name,
  dtype: 'U8',
  shape: [values.length],
  data: async () => Uint8Array.from(values),
});

/** A file of any header text and any number of data bytes. */
async function craft(header: string, dataBytes: number): Promise<string> {
  const path = join(folder, 'x.safetensors');
  const text = Buffer.from(header);
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(BigInt(text.length));
  await writeFile(path, Buffer.concat([prefix, text, Buffer.alloc(dataBytes)]));
  return path;
}
const entry = (begin: number, end: number, shape = [(end - begin) / 4], dtype = 'F32') =>
  JSON.stringify({ dtype, shape, data_offsets: [begin, end] });

describe('writeSafetensors and readSafetensorsHeader', () => {
  it('brings back what was written, wide dtypes first', async () => {
    const path = join(folder, 'a.safetensors');
    await writeSafetensors(path, [bytes('odd', [1, 2, 3]), floats('b', [2, 1], [1.5, -2]), floats('a', [], [7])]);
    const { tensors, metadata } = await readSafetensorsHeader(path);
    expect([...tensors.keys()]).toEqual(['a', 'b', 'odd']);
    expect(metadata).toEqual({ format: 'pt' });
    const b = tensors.get('b')!;
    expect(b).toMatchObject({ name: 'b', dtype: 'F32', shape: [2, 1], file: path, length: 8 });
    expect((b.begin - 4) % 8).toBe(0);
    expect(new Float32Array((await readTensorBytes(b)).buffer)).toEqual(Float32Array.from([1.5, -2]));
    expect([...(await readTensorBytes(tensors.get('odd')!))]).toEqual([1, 2, 3]);
  });

  it('leaves no trace of a write that fails', async () => {
    const path = join(folder, 'a.safetensors');
    await writeSafetensors(path, [bytes('x', [1])]);
    const before = readFileSync(path);
    const failing = { ...bytes('y', [1]), data: () => Promise.reject(new Error('no data')) };
    await expect(writeSafetensors(path, [bytes('x', [2]), failing])).rejects.toThrow('no data');
    const short = { ...bytes('y', [1]), data: () => new Uint8Array(3) };
    await expect(writeSafetensors(path, [short])).rejects.toThrow('expected 1 bytes, found 3');
    await expect(writeSafetensors(path, [bytes('x', [1]), bytes('x', [1])])).rejects.toThrow('written twice');
    expect(readFileSync(path)).toEqual(before);
    expect(await readdir(folder)).toEqual(['a.safetensors']);
    await expect(writeSafetensors(join(folder, 'no', 'a'), [])).rejects.toThrow(/cannot be written/);
  });
});

describe('readSafetensorsHeader refuses', () => {
  const cases: [string, string, number, RegExp][] = [
    ['broken JSON', '{"a":', 0, /x.safetensors: the header is not valid JSON/],
    ['a header that is no object', '[1]', 0, /header is not a JSON object/],
    ['an unknown dtype', `{"a":${entry(0, 4, [1], 'Q4')}}`, 4, /tensor "a": unknown dtype "Q4"; supported: BOOL/],
    ['a negative size', `{"a":${entry(0, 4, [-1])}}`, 4, /tensor "a": shape must be/],
    ['a missing field', '{"a":{"dtype":"F32"}}', 0, /tensor "a": expected dtype, shape and two data_offsets/],
    ['offsets in the wrong order', '{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', 4, /no byte range/],
    ['a fractional offset', '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0.5,4.5]}}', 8, /no byte range/],
    ['a range outside of the file', `{"a":${entry(0, 400)}}`, 4, /tensor "a".*need a file of .* truncated/],
    [
      'a range of the wrong length',
      `{"a":${entry(0, 8, [3])}}`,
      8,
      /F32 of shape \[3\] takes 12 bytes, found .* 8 bytes/,
    ],
    ['an overflowing shape', `{"a":${entry(0, 8, [2 ** 40, 2 ** 40])}}`, 8, /tensor "a": F32 of shape/],
    ['overlapping tensors', `{"a":${entry(0, 8)},"b":${entry(4, 12)}}`, 12, /tensor "b" overlaps tensor "a".* byte 8/],
    ['a hole', `{"a":${entry(0, 4)},"b":${entry(8, 12)}}`, 12, /tensor "b" leaves a hole after tensor "a"/],
    ['bytes behind the last tensor', `{"a":${entry(0, 4)}}`, 5, /expected \d+ bytes by its header, found \d+/],
    [
      'two tensors of one name',
      `{"a":${entry(0, 4)},"b":${entry(4, 8)},"a":${entry(0, 4)}}`,
      8,
      /"a" is in the header twice/,
    ],
    ['metadata that is no text', `{"__metadata__":{"a":1},"a":${entry(0, 4)}}`, 4, /__metadata__ must be/],
  ];
  it.each(cases)('%s', async (_, header, dataBytes, message) => {
    await expect(readSafetensorsHeader(await craft(header, dataBytes))).rejects.toThrow(message);
  });

  it('lengths that do not fit the file', async () => {
    const path = join(folder, 'x.safetensors');
    await writeFile(path, Buffer.alloc(5));
    await expect(readSafetensorsHeader(path)).rejects.toThrow(/header length of 8 bytes, found 5/);
    await writeFile(path, Buffer.from([40, 0, 0, 0, 0, 0, 0, 0, 123]));
    await expect(readSafetensorsHeader(path)).rejects.toThrow(/header of 40 bytes, found 1 bytes/);
    await writeFile(path, Buffer.alloc(64, 255));
    await expect(readSafetensorsHeader(path)).rejects.toThrow(/is above the limit/);
    await expect(readSafetensorsHeader(join(folder, 'none'))).rejects.toThrow(/none: cannot be opened: no such file/);
  });

  it('a file cut after its header was read', async () => {
    const path = join(folder, 'a.safetensors');
    await writeSafetensors(path, [floats('a', [2], [1, 2])]);
    const { tensors } = await readSafetensorsHeader(path);
    const { begin } = tensors.get('a')!;
    await truncate(path, begin + 4);
    await expect(readTensorBytes(tensors.get('a')!)).rejects.toThrow(/tensor "a": expected 8 bytes, found 4/);
    await expect(readSafetensorsHeader(path)).rejects.toThrow(/tensor "a".*truncated/);
  });

  it('accepts names that look like other things', async () => {
    const header = `{"__proto__":${entry(0, 4)},"7":${entry(4, 8)},"\\"{":${entry(8, 8, [0])}}`;
    const { tensors } = await readSafetensorsHeader(await craft(header, 8));
    expect([...tensors.keys()].sort()).toEqual(['"{', '7', '__proto__']);
  });
});

describe('writeCheckpoint and openCheckpoint', () => {
  const model = [floats('a', [2], [1, 2]), floats('b', [2], [3, 4]), floats('c', [6], [5, 6, 7, 8, 9, 10])];

  it('splits at the limit and reads the shards back', async () => {
    const names = await writeCheckpoint(folder, model, { maxShardBytes: 16 });
    const shards = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'];
    expect(names).toEqual([...shards, 'model.safetensors.index.json']);
    const index = JSON.parse(readFileSync(join(folder, 'model.safetensors.index.json'), 'utf8'));
    expect(index.metadata).toEqual({ total_parameters: 10, total_size: 40 });
    expect(index.weight_map).toEqual({ a: shards[0], b: shards[0], c: shards[1] });
    const { tensors, files, metadata } = await openCheckpoint(folder);
    expect(files).toEqual(shards.map((shard) => join(folder, shard)));
    expect(metadata).toEqual({ format: 'pt' });
    expect(new Float32Array((await readTensorBytes(tensors.get('c')!)).buffer)[5]).toBe(10);
  });

  it('clears the weights of an older save, and nothing else', async () => {
    await writeFile(join(folder, 'config.json'), '{}');
    await writeCheckpoint(folder, model, { maxShardBytes: 16 });
    await writeCheckpoint(folder, model);
    expect((await readdir(folder)).sort()).toEqual(['config.json', 'model.safetensors']);
  });

  it('prefers the single file', async () => {
    await writeCheckpoint(folder, model);
    await writeFile(join(folder, 'model.safetensors.index.json'), '{"weight_map":{"a":"missing.safetensors"}}');
    expect((await openCheckpoint(folder)).files).toEqual([join(folder, 'model.safetensors')]);
  });

  it('names what is missing or in the wrong place', async () => {
    await expect(openCheckpoint(join(folder, 'x'))).rejects.toThrow(/x: no such folder/);
    await expect(openCheckpoint(folder)).rejects.toThrow(/expected model.safetensors or .* found neither/);
    await writeFile(join(folder, 'pytorch_model.bin'), '');
    await expect(openCheckpoint(folder)).rejects.toThrow(/safe_serialization/);
    await writeCheckpoint(folder, model, { maxShardBytes: 16 });
    const indexPath = join(folder, 'model.safetensors.index.json');
    const index = JSON.parse(readFileSync(indexPath, 'utf8'));
    const withMap = (map: object) => writeFile(indexPath, JSON.stringify({ weight_map: map }));
    const [one, two] = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'];
    await withMap({ ...index.weight_map, aa: one });
    await expect(openCheckpoint(folder)).rejects.toThrow(/tensor "aa" should be in .*00001.*not found/);
    await withMap({ ...index.weight_map, a: two });
    await expect(openCheckpoint(folder)).rejects.toThrow(/tensor "a" should be in .*00002.*found in .*00001/);
    await withMap({ a: '../elsewhere.safetensors' });
    await expect(openCheckpoint(folder)).rejects.toThrow(/must name a file of this folder/);
    await writeFile(indexPath, '{}');
    await expect(openCheckpoint(folder)).rejects.toThrow(/expected an object "weight_map", found nothing/);
    await withMap(index.weight_map);
    await cp(join(folder, one), join(folder, two));
    await expect(openCheckpoint(folder)).rejects.toThrow(/tensor "a" is both in/);
    await rm(join(folder, two));
    await expect(openCheckpoint(folder)).rejects.toThrow(/1 of 2 shards missing: model-00002-of-00002/);
  });
});

describeWithShared('recorded safetensors', 'golden/models', () => {
  const files = [
    'golden/models/qwen2-tiny/model.safetensors',
    'golden/models/llama-tiny-bf16/model.safetensors',
    'golden/models/llama-tiny/model-00002-of-00003.safetensors',
    'golden/models/llama-tiny-bf16/expected.safetensors',
    'golden/models/lora-llama-tiny/adapter_model.safetensors',
    'golden/training/dpo_lora_zero/adapter_final_float64/adapter_model.safetensors',
  ];
  it.each(files)('%s is rewritten to the same bytes', async (name) => {
    const { tensors, metadata } = await readSafetensorsHeader(sharedPath(name));
    const sources = [...tensors.values()]
      .reverse()
      .map((tensor) => ({ ...tensor, data: () => readTensorBytes(tensor) }));
    const copy = join(folder, 'copy.safetensors');
    await writeSafetensors(copy, sources, Object.keys(metadata).length > 0 ? metadata : null);
    expect(readFileSync(copy).equals(readFileSync(sharedPath(name)))).toBe(true);
  });

  it('opens the sharded model', async () => {
    const checkpoint = await openCheckpoint(sharedPath('golden/models/llama-tiny'));
    expect(checkpoint.files).toHaveLength(3);
    expect(checkpoint.tensors.get('model.embed_tokens.weight')!.shape).toEqual([301, 48]);
    expect(checkpoint.tensors.size).toBe(3 * 9 + 3);
  });
});
