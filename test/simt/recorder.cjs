// An addon that is the one in KEELGRAD_SIMT_RECORDED, and writes down what is asked of the device cuda, with the answers:
// KEELGRAD_SIMT_TRACE, read by cpp/replay.cc, which asks the same without Node. Loaded through KEELGRAD_ADDON.
//
// A trace is a row of records, each: kind, number of doubles, number of bytes (doubles too), the doubles, the bytes.
const { writeFileSync } = require('node:fs');

const real = require(process.env.KEELGRAD_SIMT_RECORDED);
const records = [];
const Kind = { Label: 0, Create: 1, Retain: 2, Release: 3, Submit: 4, Upload: 5, Download: 6 };
const cuda = new Set();

/** Adds a record and returns it: a download's bytes are known later. */
function record(kind, doubles, bytes = new Uint8Array()) {
  const entry = { kind, doubles: [...doubles], bytes };
  records.push(entry);
  return entry;
}

const copyOf = (bytes) => new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength).slice();

/** The numbers of the command in the shared buffer. */
function command() {
  const p = real.commands;
  let end = 4;
  for (let i = 0; i < p[2]; i++) end += 4 + (p[end] < 0 ? 0 : 2 * p[end + 3]);
  return p.slice(0, end + p[3]);
}

const recorded = {
  openDevice(device) {
    const stream = real.openDevice(device);
    if (device.startsWith('cuda')) cuda.add(stream);
    return stream;
  },
  createStorage(stream, bytes, tag) {
    const handle = real.createStorage(stream, bytes, tag);
    if (cuda.has(stream)) record(Kind.Create, [handle, bytes, tag]);
    return handle;
  },
  retainStorage(stream, handle) {
    real.retainStorage(stream, handle);
    if (cuda.has(stream)) record(Kind.Retain, [handle]);
  },
  releaseStorage(stream, handle) {
    real.releaseStorage(stream, handle);
    if (cuda.has(stream)) record(Kind.Release, [handle]);
  },
  submit() {
    const numbers = cuda.has(real.commands[1]) ? command() : undefined;
    real.submit();
    if (numbers) record(Kind.Submit, numbers);
  },
  upload(stream, handle, offset, bytes) {
    if (cuda.has(stream)) record(Kind.Upload, [handle, offset], copyOf(bytes));
    real.upload(stream, handle, offset, bytes);
  },
  async download(stream, handle, offset, target) {
    const entry = cuda.has(stream) ? record(Kind.Download, [handle, offset, target.byteLength]) : {};
    const answer = await real.download(stream, handle, offset, target);
    entry.bytes = copyOf(target);
    return answer;
  },
  downloadSync(stream, handle, offset, target) {
    const entry = cuda.has(stream) ? record(Kind.Download, [handle, offset, target.byteLength]) : {};
    real.downloadSync(stream, handle, offset, target);
    entry.bytes = copyOf(target);
  },
};

/** Names what follows in the trace. */
globalThis.keelgradTrace = (label) => record(Kind.Label, [], new TextEncoder().encode(label));

process.on('exit', () => {
  const parts = [];
  for (const { kind, doubles, bytes } of records) {
    parts.push(Buffer.from(new Float64Array([kind, doubles.length, bytes.length, ...doubles]).buffer), bytes);
  }
  writeFileSync(process.env.KEELGRAD_SIMT_TRACE, Buffer.concat(parts));
});

module.exports = { ...real, ...recorded };
