// What a step costs: the loss, and the loss with all gradients, of SFT, DPO and SPO on the demo's model and on SmolLM2-135M's
// shape with fresh weights. Reference log-probabilities are given; the optimizer's update is not part of it.
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { load, root } from './build.mjs';
import { measureOnce } from './harness.mjs';
import { Peer } from './peer.mjs';
import { smollm2 } from './shapes.mjs';

/** Shapes of work: configuration, pairs, tokens of prompt and of each response. */
function shapes() {
  const demo = join(root, 'assets', 'demo', 'model', 'config.json');
  const list = [{ name: 'SmolLM2-135M', config: smollm2, pairs: 4, prompt: 128, response: 128, times: 2, peers: true }];
  if (existsSync(demo))
    list.unshift({
      name: 'demo',
      config: JSON.parse(readFileSync(demo, 'utf8')),
      pairs: 8,
      prompt: 24,
      response: 24,
      times: 10,
    });
  return list;
}

export async function modules() {
  const names = {
    initialize: 'src/models/initialize.js',
    config: 'src/models/config.js',
    storage: 'src/tensor/storage.js',
    scopes: 'src/tensor/scope.js',
    task: 'src/train/task.js',
    dpo: 'src/train/dpo-task.js',
    sft: 'src/train/sft-task.js',
    spo: 'src/train/spo-task.js',
    batches: 'src/train/preference-batch.js',
    packing: 'src/data/packing.js',
    objectives: 'src/objectives/index.js',
    lower: 'src/optim/bilevel/lower-level.js',
    folder: 'src/io/model-folder.js',
  };
  const loaded = await Promise.all(Object.entries(names).map(async ([key, path]) => [key, await load(path)]));
  return Object.fromEntries(loaded);
}

/** Random records: pairs of token ids, and the same chosen halves as sequences. */
export function examplesOf({ pairs, prompt, response, config }) {
  let state = 1;
  const ids = (count) =>
    Int32Array.from({ length: count }, () => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return state % config.vocab_size;
    });
  return Array.from({ length: pairs }, (_, index) => {
    const [promptIds, chosenIds, rejectedIds] = [ids(prompt), ids(response), ids(response)];
    const inputIds = Int32Array.of(...promptIds, ...chosenIds);
    const completionMask = Uint8Array.from(inputIds, (_, i) => (i < prompt ? 0 : 1));
    return { index, promptIds, chosenIds, rejectedIds, inputIds, completionMask };
  });
}

const dpoOptions = { beta: 0.1 };

class Bed {
  constructor(m, shape, device) {
    Object.assign(this, { m, shape, examples: examplesOf(shape) });
    this.indices = this.examples.map((e) => e.index);
    this.model = m.initialize.createModel(m.config.parseModelConfig(shape.config), { seed: 1, device });
    const table = () => new Float64Array(shape.pairs);
    this.reference = { chosen: table(), rejected: table() };
    m.storage.synchronize(device);
  }

  task(loss, gamma = 0) {
    const { m, model, examples, reference } = this;
    if (loss === 'spo' && !model.lora) m.folder.addLora(model, { r: 16, alpha: 32 });
    const trainable = new m.task.Trainable(model, loss === 'spo' ? ['backbone', 'adapters'] : ['backbone']);
    if (loss === 'sft') return new m.sft.SftTask(trainable, examples, { reduction: 'sum', dropout: 0, seed: 1 });
    if (loss === 'dpo') return new m.dpo.DpoTask(trainable, examples, reference, dpoOptions);
    const options = {
      ...dpoOptions,
      lambda: 1,
      gamma,
      lowerSteps: 1,
      lowerLearningRate: 2e-5,
      normOver: 'all',
      sftReduction: 'sum',
    };
    return new m.spo.SpoTask(trainable, examples, reference, options, () => model.backbone);
  }

  /** Loss and gradients of one step. */
  gradient(loss, gamma) {
    const task = this.task(loss, gamma);
    const run = async () => {
      task.trainable.zeroGradients();
      const { losses, metrics } = await task.accumulate({ step: 0, microBatches: [this.indices] });
      await metrics;
      for (const t of losses) t.dispose();
    };
    return { run, end: () => task.trainable.dispose() };
  }

  /** The value of L_DPO, or of L_SFT at `parameters`. */
  value(loss, parameters = this.model.parameters) {
    const { m, model } = this;
    return m.scopes.scope(() => {
      if (loss === 'dpo') {
        const batch = m.batches.preferenceBatch(model, this.examples, this.indices, this.reference);
        const { pairs } = m.batches.pairLogProbs(model, parameters, batch);
        batch.packed.layout.dispose();
        return m.objectives.preferenceLoss(pairs, dpoOptions).item();
      }
      const batch = m.packing.packSequences(this.examples);
      const tensors = m.packing.uploadBatch(batch, model.device, 'float32');
      const { logProbs } = model.logProbs(parameters, tensors.ids, batch.layout, tensors.targets);
      batch.layout.dispose();
      const sums = m.objectives.sequenceLogProbs(logProbs, tensors.sequences, batch.lengths.length);
      return m.objectives.sftLoss(sums, { reduction: 'sum', tokens: batch.targetIds.length }).item();
    });
  }

  /** F of SPO without regularizer: a lower level of one step, then three forward passes. */
  spoValue() {
    const { m, model } = this;
    if (!model.lora) m.folder.addLora(model, { r: 16, alpha: 32 });
    const { run, end, trainable } = this.lowerGradient();
    const once = async () => {
      await run();
      const buffers = trainable.gradients.get('backbone').buffers;
      const solution = m.lower.descend(model.backbone, model.backbone, () => buffers, { steps: 1, learningRate: 2e-5 });
      this.value('dpo');
      this.value('sft');
      this.value('sft', { ...model.parameters, backbone: solution.theta });
      solution.release();
    };
    return { run: once, end };
  }

  lowerGradient() {
    const { m, model, examples } = this;
    const trainable = new m.task.Trainable(model, ['backbone']);
    const task = new m.sft.SftTask(trainable, examples, { reduction: 'sum', dropout: 0, seed: 1 });
    const run = async () => {
      trainable.zeroGradients();
      const { losses, metrics } = task.accumulate({ step: 0, microBatches: [this.indices] });
      await metrics;
      for (const t of losses) t.dispose();
    };
    return { run, end: () => trainable.dispose(), trainable };
  }

  dispose() {
    this.model.dispose();
  }
}

export async function stepWork({ device, peer }) {
  const m = await modules();
  const threads = peer ? (await load('src/native/info.js')).runtimeInfo().threads : 0;

  function work(shape, loss, what, gamma = 0) {
    const tokens = `${shape.pairs} ${loss === 'sft' ? 'sequences' : 'pairs'} of ${shape.prompt} + ${shape.response}`;
    const run = async () => {
      const bed = new Bed(m, shape, device);
      const { run: step, end } =
        what === 'loss and gradient'
          ? bed.gradient(loss, gamma)
          : loss === 'spo'
            ? bed.spoValue()
            : { run: () => bed.value(loss), end: () => undefined };
      m.storage.resetPeakMemory(device);
      const measured = await measureOnce(step, shape.times);
      const { peak, reserved } = m.storage.memory(device);
      end();
      bed.dispose();
      m.storage.trimMemory(device);
      return { ...measured, peakBytes: peak, reservedBytes: reserved, peer: await theirs(shape, loss, what) };
    };
    const note = gamma > 0 ? `, gamma ${gamma}` : '';
    return { section: 'steps', name: `${shape.name} ${loss} ${what}, ${tokens}${note}`, dtype: 'float32', run };
  }

  /** The same step in PyTorch, in a process of its own: its peak is what the system saw. */
  async function theirs(shape, loss, what) {
    if (!peer || !shape.peers || loss === 'spo') return undefined;
    const own = Peer.open(threads);
    const { config, pairs, prompt, response, times } = shape;
    const answer = await own.time({
      kind: 'step',
      op: `${shape.name} ${loss}`,
      loss,
      config,
      pairs,
      prompt,
      response,
      times,
      gradient: what !== 'loss',
    });
    own.close();
    return answer ?? undefined;
  }

  return shapes().flatMap((shape) => [
    ...['sft', 'dpo', 'spo'].flatMap((loss) => ['loss', 'loss and gradient'].map((what) => work(shape, loss, what))),
    ...(shape.name === 'demo' ? [work(shape, 'spo', 'loss and gradient', 0.1)] : []),
  ]);
}
