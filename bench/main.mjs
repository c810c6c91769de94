// npm run bench -- [--filter NAME] [--json FILE] [--sections ops,gemm,latency,startup,steps,spo] [--dtypes float32,bfloat16]
//                  [--time MS] [--threads N] [--device cpu] [--no-peer] [--list]
// Prints a table a section, PyTorch beside ours where it is there, and writes all rows as JSON. Times nothing in tests.
import { writeFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { parseArgs } from 'node:util';
import { compile, load } from './build.mjs';
import { printTable } from './harness.mjs';
import { latencyWork } from './latency.mjs';
import { opWork } from './ops.mjs';
import { Peer } from './peer.mjs';
import { spoWork } from './spo.mjs';
import { startupWork } from './startup.mjs';
import { stepWork } from './steps.mjs';

const { values: options } = parseArgs({
  options: {
    filter: { type: 'string', default: '' },
    json: { type: 'string' },
    sections: { type: 'string', default: '' },
    dtypes: { type: 'string', default: 'float32' },
    time: { type: 'string', default: '150' },
    threads: { type: 'string' },
    device: { type: 'string', default: 'cpu' },
    'no-peer': { type: 'boolean', default: false },
    list: { type: 'boolean', default: false },
  },
});

const sources = {
  latency: latencyWork,
  startup: startupWork,
  gemm: opWork,
  ops: opWork,
  steps: stepWork,
  spo: spoWork,
};

/** The pieces of work that were asked for. */
async function chosenWork(context) {
  const asked = options.sections ? options.sections.split(',') : Object.keys(sources);
  const unknown = asked.find((name) => !(name in sources));
  if (unknown) throw new Error(`--sections: expected some of ${Object.keys(sources)}, found ${unknown}`);
  const work = [];
  for (const source of new Set(asked.map((name) => sources[name]))) work.push(...(await source(context)));
  return work.filter(
    (w) =>
      asked.some((name) => w.section.startsWith(name)) &&
      `${w.section} ${w.name} ${w.dtype ?? ''}`.includes(options.filter),
  );
}

async function main() {
  compile();
  const { runtimeInfo, setThreads } = await load('src/native/info.js');
  if (options.threads) setThreads(Number(options.threads));
  const info = runtimeInfo();
  const peer = options.list ? null : Peer.open(info.threads, !options['no-peer']);
  const { device } = options;
  const work = await chosenWork({ device, dtypes: options.dtypes.split(','), time: Number(options.time), peer });
  if (work.length === 0)
    throw new Error(`--filter ${options.filter}: nothing has that in its section, name or dtype; see --list`);
  if (options.list) return console.log(work.map((w) => `${w.section}: ${w.name} ${w.dtype ?? ''}`).join('\n'));

  console.log(`${cpus()[0].model}, ${info.isa}, ${info.threads} threads, node ${process.version}`);
  const rows = [];
  for (const [i, { run, ...about }] of work.entries()) {
    if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${i + 1}/${work.length} ${about.name}`);
    rows.push({ ...about, ...(await run()) });
  }
  if (process.stderr.isTTY) process.stderr.write('\r\x1b[K');
  peer?.close();
  for (const section of new Set(rows.map((r) => r.section)))
    printTable(
      section,
      rows.filter((r) => r.section === section),
    );
  if (options.json) {
    // Results are committed: they name the machine, not where things lie on it.
    writeFileSync(
      options.json,
      `${JSON.stringify({ machine: cpus()[0].model, info: { ...info, addon: undefined }, rows }, null, 2)}\n`,
    );
  }
}

main().catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
