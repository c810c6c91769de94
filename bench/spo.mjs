// What SPO costs beside DPO: loss and gradients of a step on SmolLM2-135M's shape, backbone and adapters trained, prompts
// shared, without the optimizer's update; by what the step computes, that is by the paper's terms (a) to (e). In the same run
// PyTorch's DPO step of the same shape and trained parameters (transformers, PEFT), and of the backbone alone. All steps take
// turns; ratios are medians over the rounds, to our own DPO step of the same round. A round before them warms everybody up:
// memory is what a training run would have, its own from the step before.
import { load } from './build.mjs';
import { median } from './harness.mjs';
import { Peer } from './peer.mjs';
import { smollm2 } from './shapes.mjs';
import { examplesOf, modules } from './steps.mjs';

const shape = { name: 'SmolLM2-135M', config: smollm2, pairs: 4, prompt: 128, response: 128 };
const rounds = 3;
const rank = 16;
const dpo = { beta: 0.1 };
const common = {
  ...dpo,
  lambda: 1,
  gamma: 0,
  lowerSteps: 1,
  lowerLearningRate: 2e-5,
  normOver: 'all',
  sftReduction: 'sum',
};

/** Rows of the table: what each adds to the row it follows, and limits as ratios to the DPO step. */
const rows = [
  { name: 'DPO', terms: '(a) (c)', options: null, beside: true },
  { name: 'SPO, gamma 0, K 0', terms: '(a) (c) (d)', options: { lowerSteps: 0 }, adds: '(d)', after: 0 },
  {
    name: 'SPO, gamma 0, K 1',
    terms: '(a) to (d)',
    options: {},
    adds: '(b)',
    after: 1,
    limits: { time: 1.85, memory: 1.25 },
    beside: true,
  },
  {
    name: 'SPO, no pair active',
    terms: '(a) to (d), norms',
    options: { gamma: 0.1 },
    pairs: 'inactive',
    adds: 'the norms',
    after: 2,
    limits: { time: 2, memory: 1.6 },
  },
  {
    name: 'SPO, all pairs active',
    terms: '(a) to (e)',
    options: { gamma: 0.1 },
    pairs: 'active',
    adds: '(e)',
    after: 3,
    limits: { time: 4.2, memory: 1.6 },
  },
];

class Bed {
  constructor(m, device) {
    Object.assign(this, { m, device });
    this.model = m.initialize.createModel(m.config.parseModelConfig(shape.config), { seed: 1, device });
    m.folder.addLora(this.model, { r: rank, alpha: 2 * rank });
    this.trainable = new m.task.Trainable(this.model, ['backbone', 'adapters']);
    const table = () => new Float64Array(shape.pairs);
    this.reference = { chosen: table(), rejected: table() };
  }

  task(options, examples) {
    const { m, trainable, reference } = this;
    if (!options) return new m.dpo.DpoTask(trainable, examples, reference, dpo);
    return new m.spo.SpoTask(trainable, examples, reference, { ...common, ...options }, () => this.model.backbone);
  }

  async step(task, indices) {
    this.trainable.zeroGradients();
    const { losses, metrics } = await task.accumulate({ step: 0, microBatches: [indices] });
    const measured = await metrics;
    for (const t of losses) t.dispose();
    return measured;
  }

  /** The same pairs with chosen and rejected in the order that makes each active, or inactive. */
  async examples(kind) {
    const given = examplesOf(shape).map((e) => ({ ...e, line: e.index + 1 }));
    if (!kind) return given;
    const ordered = [];
    for (const e of given) {
      const metrics = await this.step(this.task({ gamma: 0.1 }, given), [e.index]);
      const active = metrics['spo/active_fraction'] > 0;
      const swapped = { ...e, chosenIds: e.rejectedIds, rejectedIds: e.chosenIds };
      ordered.push(active === (kind === 'active') ? e : swapped);
    }
    return ordered;
  }

  dispose() {
    this.trainable.dispose();
    this.model.dispose();
  }
}

/** PyTorch's steps, each in a process of its own that keeps its model between rounds. */
class Peers {
  constructor(threads) {
    const { config, pairs, prompt, response } = shape;
    const work = { kind: 'step', op: 'dpo', loss: 'dpo', config, pairs, prompt, response, times: 1, gradient: true };
    this.entries = [
      { work: { ...work, lora: rank }, samples: [], peak: 0 },
      { work, samples: [], peak: 0 },
    ];
    for (const entry of this.entries) entry.peer = Peer.open(threads);
  }

  async round(warm) {
    for (const entry of this.entries) {
      const answer = await entry.peer.time(entry.work);
      if (!answer) continue;
      if (warm) entry.samples.push(answer.best);
      entry.peak = answer.peakBytes;
    }
  }

  /** Seconds and peaks, with the adapters and without; null for what PyTorch could not do. */
  close() {
    for (const { peer } of this.entries) peer.close();
    const found = ({ samples, peak }) => (samples.length > 0 ? { seconds: samples, peak } : null);
    const [adapters, backbone] = this.entries.map(found);
    return { adapters, backbone };
  }
}

/** One step of each row a round, PyTorch's in between: seconds and peaks by row. */
async function alternate(m, device, peers) {
  const bed = new Bed(m, device);
  const indices = Array.from({ length: shape.pairs }, (_, i) => i);
  const tasks = [];
  for (const row of rows) tasks.push(bed.task(row.options, await bed.examples(row.pairs)));
  const samples = rows.map(() => ({ seconds: [], peak: 0 }));
  for (let round = 0; round <= rounds; round++) {
    for (const [i, task] of tasks.entries()) {
      m.storage.resetPeakMemory(device);
      const start = performance.now();
      await bed.step(task, indices);
      if (round > 0) samples[i].seconds.push((performance.now() - start) / 1e3);
      samples[i].peak = Math.max(samples[i].peak, m.storage.memory(device).peak);
    }
    await peers?.round(round > 0);
  }
  bed.dispose();
  m.storage.trimMemory(device);
  return { samples, theirs: peers?.close() ?? { adapters: null, backbone: null } };
}

const summary = ({ seconds, peak }) => ({
  best: Math.min(...seconds),
  median: median(seconds),
  samples: seconds.length,
  peakBytes: peak,
});

function result(row, { samples, theirs }) {
  const own = samples[rows.indexOf(row)];
  const perRound = (seconds, other) => median(seconds.map((s, i) => s / other[i]));
  const time = perRound(own.seconds, samples[0].seconds);
  const memory = own.peak / samples[0].peak;
  const before = row.adds && perRound(samples[row.after].seconds, samples[0].seconds);
  const notes = [`${time.toFixed(2)}× time, ${memory.toFixed(2)}× memory of DPO`];
  if (row.limits) notes[0] += ` (limits ${row.limits.time}×, ${row.limits.memory}×)`;
  if (row.adds) notes.push(`${row.adds}: ${(time - before).toFixed(2)}×`);
  const beside = row.beside ? theirs : {};
  const peer = beside.adapters ? summary(beside.adapters) : undefined;
  if (peer) notes.push(`PyTorch's DPO takes ${perRound(beside.adapters.seconds, own.seconds).toFixed(2)}× this`);
  if (beside.backbone)
    notes.push(
      `without adapters ${perRound(beside.backbone.seconds, own.seconds).toFixed(2)}× (${median(beside.backbone.seconds).toFixed(2)} s)`,
    );
  return { ...summary(own), ratio: time, memoryRatio: memory, note: [row.terms, ...notes].join('; '), peer };
}

export async function spoWork({ device, peer }) {
  const m = await modules();
  const threads = peer ? (await load('src/native/info.js')).runtimeInfo().threads : 0;
  let measured;
  const tokens = `${shape.pairs} pairs of ${shape.prompt} + ${shape.response}`;
  return rows.map((row) => ({
    section: 'spo',
    name: `${shape.name} ${row.name}, ${tokens}`,
    dtype: 'float32',
    run: async () => {
      measured ??= alternate(m, device, peer ? new Peers(threads) : null);
      return result(row, await measured);
    },
  }));
}
