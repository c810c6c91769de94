// What SPO costs beside DPO: loss and gradients of a step on SmolLM2-135M's shape, backbone and adapters trained, prompts
// shared, without the optimizer's update; by what the step computes, that is by the paper's terms (a) to (e). In the same run
// PyTorch's DPO step on the same shape. Ratios are to our own DPO step.
import { load } from './build.mjs';
import { measureOnce } from './harness.mjs';
import { Peer } from './peer.mjs';
import { smollm2 } from './shapes.mjs';
import { examplesOf, modules } from './steps.mjs';

const shape = { name: 'SmolLM2-135M', config: smollm2, pairs: 4, prompt: 128, response: 128, times: 3 };
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

/** Rows of the table; limits are ratios to the DPO step. */
const rows = [
  { name: 'DPO', terms: '(a) (c)', options: null },
  { name: 'SPO, gamma 0, K 0', terms: '(a) (c) (d)', options: { lowerSteps: 0 } },
  { name: 'SPO, gamma 0, K 1', terms: '(a) to (d)', options: {}, limits: { time: 1.85, memory: 1.25 } },
  {
    name: 'SPO, no pair active',
    terms: '(a) to (d), norms',
    options: { gamma: 0.1 },
    pairs: 'inactive',
    limits: { time: 2, memory: 1.6 },
  },
  {
    name: 'SPO, all pairs active',
    terms: '(a) to (e)',
    options: { gamma: 0.1 },
    pairs: 'active',
    limits: { time: 4.2, memory: 1.6 },
  },
];

class Bed {
  constructor(m, device) {
    Object.assign(this, { m, device });
    this.model = m.initialize.createModel(m.config.parseModelConfig(shape.config), { seed: 1, device });
    m.folder.addLora(this.model, { r: 16, alpha: 32 });
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

export async function spoWork({ device, peer }) {
  const m = await modules();
  const threads = peer ? (await load('src/native/info.js')).runtimeInfo().threads : 0;
  const indices = Array.from({ length: shape.pairs }, (_, i) => i);
  let base = null;

  async function run(row) {
    const bed = new Bed(m, device);
    const task = bed.task(row.options, await bed.examples(row.pairs));
    m.storage.trimMemory(device);
    m.storage.resetPeakMemory(device);
    const measured = await measureOnce(() => bed.step(task, indices), shape.times);
    const { peak } = m.storage.memory(device);
    bed.dispose();
    m.storage.trimMemory(device);
    base ??= { best: measured.best, peak };
    const time = measured.best / base.best;
    const memory = peak / base.peak;
    const limits = row.limits ? ` (limits ${row.limits.time}×, ${row.limits.memory}×)` : '';
    const note = `${row.terms}; ${time.toFixed(2)}× time, ${memory.toFixed(2)}× memory of DPO${limits}`;
    return {
      ...measured,
      peakBytes: peak,
      ratio: time,
      memoryRatio: memory,
      note,
      peer: row.options ? undefined : await theirs(),
    };
  }

  /** PyTorch's DPO step, in a process of its own. */
  async function theirs() {
    if (!peer) return undefined;
    const own = Peer.open(threads);
    const { config, pairs, prompt, response, times } = shape;
    const work = { kind: 'step', op: 'dpo', loss: 'dpo', config, pairs, prompt, response, times, gradient: true };
    const answer = await own.time(work);
    own.close();
    return answer ?? undefined;
  }

  const tokens = `${shape.pairs} pairs of ${shape.prompt} + ${shape.response}`;
  return rows.map((row) => ({
    section: 'spo',
    name: `${shape.name} ${row.name}, ${tokens}`,
    dtype: 'float32',
    run: () => run(row),
  }));
}
