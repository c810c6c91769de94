// Measuring and printing. A row is { name, dtype, best, median, ... } in seconds; rates and ratios are by the best of the
// samples, which other work on the machine disturbs least.
import { Bench } from 'tinybench';

/** Samples of `run` by tinybench: at least `least`, and as many as fit into `time` milliseconds. */
export async function measure(run, { time = 200, least = 5 } = {}) {
  const bench = new Bench({ time, iterations: least, warmupTime: time / 4, warmupIterations: 1, throws: true });
  bench.add('run', run);
  const [task] = await bench.run();
  const { min, p50, samplesCount } = task.result.latency;
  return { best: min / 1e3, median: p50 / 1e3, samples: samplesCount };
}

/** One sample after one warm-up, for what takes seconds. */
export async function measureOnce(run, times = 2) {
  const samples = [];
  for (let i = 0; i < times; i++) {
    const start = performance.now();
    await run();
    samples.push((performance.now() - start) / 1e3);
  }
  samples.sort((a, b) => a - b);
  return { best: samples[0], median: samples[Math.floor(samples.length / 2)], samples: times };
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

export function formatSeconds(s) {
  if (s === undefined || Number.isNaN(s)) return '';
  if (s >= 1) return `${s.toFixed(2)} s`;
  if (s >= 1e-3) return `${(s * 1e3).toFixed(2)} ms`;
  if (s >= 1e-6) return `${(s * 1e6).toFixed(2)} µs`;
  return `${(s * 1e9).toFixed(0)} ns`;
}

const columns = [
  ['name', (r) => (r.name.length > 72 ? `${r.name.slice(0, 71)}…` : r.name), false],
  ['dtype', (r) => r.dtype ?? '', false],
  ['best', (r) => formatSeconds(r.best), true],
  ['median', (r) => formatSeconds(r.median), true],
  ['rate', (r) => rate(r), true],
  ['peak', (r) => (r.peakBytes ? `${(r.peakBytes / 2 ** 30).toFixed(2)} GiB` : ''), true],
  ['torch', (r) => formatSeconds(r.peer?.best), true],
  ['torch / ours', (r) => (r.peer?.best ? `${(r.peer.best / r.best).toFixed(2)}×` : ''), true],
  [
    '',
    (r) =>
      [r.note, r.peer?.peakBytes && `torch peak ${(r.peer.peakBytes / 2 ** 30).toFixed(2)} GiB`]
        .filter(Boolean)
        .join('; '),
    false,
  ],
];

function rate({ flops, bytes, best }) {
  if (flops) return `${(flops / best / 1e9).toFixed(flops / best < 1e10 ? 2 : 0)} GFLOP/s`;
  return bytes ? `${(bytes / best / 1e9).toFixed(1)} GB/s` : '';
}

/** Prints a table; columns that are empty in every row are left out. */
export function printTable(title, rows) {
  const shown = columns.filter(([, f]) => rows.some((r) => f(r) !== ''));
  const cells = [shown.map(([head]) => head), ...rows.map((r) => shown.map(([, f]) => f(r)))];
  const widths = shown.map((_, i) => Math.max(...cells.map((line) => line[i].length)));
  console.log(`\n${title}`);
  for (const line of cells)
    console.log(
      `  ${line.map((text, i) => (shown[i][2] ? text.padStart(widths[i]) : text.padEnd(widths[i]))).join('  ')}`.trimEnd(),
    );
}
