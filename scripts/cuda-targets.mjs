// What an addon holds for which GPUs: machine code (sm_90a) and PTX (compute_80) by target, out of the ELF section that nvcc
// fills, one fat binary for each .cu file. Reads the file alone: cuobjdump is in none of pip's CUDA packages that build it.
//   node scripts/cuda-targets.mjs [ADDON] [--expect compute_80,sm_80,...]
// With --expect every fat binary must hold exactly these; exits 1 where one does not.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';

const root = fileURLToPath(new URL('..', import.meta.url));
const number = (bytes, at) => Number(bytes.readBigUInt64LE(at));

/** The bytes of a section of a 64-bit little-endian ELF file; undefined where it has none of that name. */
function section(file, wanted) {
  if (file.readUInt32BE(0) !== 0x7f454c46 || file[4] !== 2) throw new Error('expected a 64-bit ELF file');
  const [table, entry, count, names] = [number(file, 0x28), ...[0x3a, 0x3c, 0x3e].map((at) => file.readUInt16LE(at))];
  const header = (i) => file.subarray(table + i * entry, table + (i + 1) * entry);
  const bytesOf = (h) => file.subarray(number(h, 0x18), number(h, 0x18) + number(h, 0x20));
  const text = bytesOf(header(names));
  for (let i = 0; i < count; i++) {
    const name = header(i).readUInt32LE(0);
    if (text.toString('latin1', name, text.indexOf(0, name)) === wanted) return bytesOf(header(i));
  }
  return undefined;
}

/** The target of an entry: its kind, its architecture, and of the flags the letter (a: this GPU alone, f: its family). */
function targetOf(entry) {
  const flags = entry.readUInt32LE(0x28);
  const letter = flags & 0x100000 ? 'a' : flags & 0x200000 ? 'f' : '';
  return `${entry.readUInt16LE(0) === 1 ? 'compute' : 'sm'}_${entry.readUInt32LE(0x1c)}${letter}`;
}

/** The fat binaries of an addon, each a map from target to bytes. */
export function fatBinaries(addon) {
  const bytes = section(readFileSync(addon), '.nv_fatbin') ?? Buffer.alloc(0);
  const found = [];
  for (let at = 0; at + 16 <= bytes.length; ) {
    if (bytes.readUInt32LE(at) !== 0xba55ed50) {
      at += 8; // between two of them
      continue;
    }
    const targets = new Map();
    const end = at + bytes.readUInt16LE(at + 6) + number(bytes, at + 8);
    for (at += bytes.readUInt16LE(at + 6); at < end; ) {
      const entry = bytes.subarray(at);
      const size = entry.readUInt32LE(4) + number(entry, 8);
      targets.set(targetOf(entry), (targets.get(targetOf(entry)) ?? 0) + size);
      at += size;
    }
    found.push(targets);
  }
  return found;
}

/** What is wrong with the fat binaries where each should hold `expected`. */
export function differences(found, expected) {
  if (found.length === 0) return ['the addon holds no CUDA kernels'];
  return found.flatMap((targets, i) => {
    const missing = expected.filter((name) => !targets.has(name));
    const more = [...targets.keys()].filter((name) => !expected.includes(name));
    const told = [...missing.map((name) => `lacks ${name}`), ...more.map((name) => `holds ${name}, too`)];
    return told.length > 0 ? [`fat binary ${i} ${told.join(', ')}`] : [];
  });
}

function main() {
  const { values, positionals } = parseArgs({ allowPositionals: true, options: { expect: { type: 'string' } } });
  const found = fatBinaries(positionals[0] ?? join(root, 'build', 'Release', 'keelgrad.node'));
  const sizes = new Map();
  for (const targets of found) for (const [name, size] of targets) sizes.set(name, (sizes.get(name) ?? 0) + size);
  console.log(
    `${found.length} fat binaries: ${[...sizes].map(([n, s]) => `${n} ${(s / 1e6).toFixed(1)} MB`).join(', ')}`,
  );
  const wrong = values.expect ? differences(found, values.expect.split(',')) : [];
  for (const line of wrong) console.error(line);
  process.exitCode = wrong.length > 0 ? 1 : 0;
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) main();
