// npm run bench:gpu -- [--sections products,attention,memory,head,steps] [--device cuda] [--tiny] [--no-peer] [--results FOLDER]
// The tables of the GPU backend beside PyTorch in the same run. Writes <date>-gpu.md and .json into the results folder; those that
// are kept lie in bench/results. --tiny: sizes for a look at the harness, where times mean nothing.
import { spawnSync } from 'node:child_process';
import { parseArgs } from 'node:util';
import '../../src/ops/methods.js';
import { runtimeInfo } from '../../src/native/info.js';
import { attention } from './attention.mjs';
import { head } from './head.mjs';
import { memoryBound } from './memory-bound.mjs';
import { Peer } from './peer.mjs';
import { products } from './products.mjs';
import { printSection, writeReport } from './report.mjs';
import { sizes } from './shapes.mjs';
import { steps } from './steps.mjs';

const sections = { products, attention, memory: memoryBound, head, steps };

const { values: options } = parseArgs({
  options: {
    sections: { type: 'string', default: Object.keys(sections).join(',') },
    device: { type: 'string', default: 'cuda' },
    tiny: { type: 'boolean', default: false },
    'no-peer': { type: 'boolean', default: false },
    results: { type: 'string', default: 'results' },
  },
});

function chosen() {
  const names = options.sections.split(',');
  const unknown = names.find((name) => !(name in sections));
  if (unknown) throw new Error(`--sections: expected some of ${Object.keys(sections)}, found ${unknown}`);
  return names;
}

async function machine(peer) {
  const query = ['--query-gpu=name,driver_version,memory.total', '--format=csv,noheader'];
  const gpu = spawnSync('nvidia-smi', query, { encoding: 'utf8' }).stdout?.trim();
  const { torch } = await peer.measure('version');
  return {
    gpu: gpu || `${options.device}, which nvidia-smi does not know`,
    node: process.version,
    PyTorch: torch ?? 'none',
    ...(options.tiny && { sizes: 'tiny: times mean nothing' }),
  };
}

async function main() {
  const names = chosen();
  const { cuda } = runtimeInfo();
  if (options.device.startsWith('cuda') && !cuda.available) throw new Error(`no GPU: ${cuda.reason}; ${cuda.remedy}`);
  // Only where PyTorch sees the same GPU does it stand beside us; --tiny looks at the harness on any machine.
  const peer = Peer.open(options.tiny ? 'any' : options.device, !options['no-peer']);
  const rows = [];
  const context = { device: options.device, size: sizes(options.tiny), tiny: options.tiny, peer, rows };
  const about = await machine(peer);
  console.log(Object.values(about).join(', '));
  for (const name of names) {
    const before = rows.length;
    try {
      await sections[name](context);
    } catch (error) {
      process.exitCode = 1;
      rows.push({ section: name, name: 'failed', ours: '', met: false, note: error.message.split('\n')[0] });
      console.error(error);
    }
    // Tiny sizes reach and miss no goals.
    if (options.tiny) for (const row of rows.slice(before)) if (row.name !== 'failed') row.met = undefined;
    for (const section of new Set(rows.slice(before).map((r) => r.section)))
      printSection(
        section,
        rows.filter((r) => r.section === section),
      );
  }
  peer.close();
  const date = new Date().toISOString().slice(0, 10);
  const command = `bench:gpu ${process.argv
    .slice(2)
    .filter((a, i, all) => a !== '--results' && all[i - 1] !== '--results')
    .join(' ')}`.trim();
  console.log(`\n${writeReport(options.results, { rows, machine: about, command, date })}`);
}

main().catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
