// Whole training steps: DPO with LoRA at Qwen2.5-0.5B's shape beside two PyTorch steps, what launches cost of it, and the memory
// of the same at Llama-3.2-3B's shape. Random weights; a step is gradients, clipping, AdamW and metrics, through the trainer.
import { performance } from 'node:perf_hooks';
import { addLora } from '../../src/io/model-folder.js';
import { parseModelConfig } from '../../src/models/config.js';
import { launch } from '../../src/native/launch.js';
import { memory, resetPeakMemory, synchronize, trimMemory } from '../../src/tensor/storage.js';
import { resolveOptions } from '../../src/train/options.js';
import { openSession } from '../../src/train/session.js';
import { inChild } from './child.mjs';
import { draws, empty, random, randomModel } from './tensors.mjs';
import { deviceBytes, formatBytes, formatTime, timeDevice } from './timing.mjs';

const lora = { r: 16, alpha: 32 };
const median = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];

/** Records as the trainer has them after tokenizing. */
function dataOf({ pairs, prompt, response }, vocabulary) {
  const ids = Int32Array.from(draws(pairs * (prompt + 2 * response), vocabulary));
  let at = 0;
  const take = (count) => {
    at += count;
    return ids.slice(at - count, at);
  };
  const examples = Array.from({ length: pairs }, (_, index) => ({
    index,
    line: index + 1,
    promptIds: take(prompt),
    chosenIds: take(response),
    rejectedIds: take(response),
  }));
  return { examples, dropped: { promptTooLong: 0, noTarget: 0 }, truncated: 0, warnings: [] };
}

/** Seconds of each step after the first two; `between` runs after each update has been enqueued. */
export async function stepTimes(device, config, work, between = () => {}, more = {}) {
  trimMemory(device);
  const model = randomModel(parseModelConfig(config), device);
  addLora(model, lora);
  const data = dataOf(work, config.vocab_size);
  const options = resolveOptions(
    'dpo',
    {
      batchSize: work.pairs,
      maxSteps: work.steps + 2,
      maxLength: work.prompt + work.response,
      shuffle: false,
      ...more,
    },
    { requirePaths: false },
  );
  const enqueued = [];
  let began = performance.now();
  const onUpdate = (_model, updates) => {
    if (updates > 0) enqueued.push((performance.now() - began) / 1e3);
    between();
    began = performance.now();
  };
  const session = await openSession(model, data, options, { onUpdate });
  resetPeakMemory(device);
  const ends = [];
  for await (const _ of session.steps()) ends.push(performance.now() / 1e3);
  synchronize(device);
  const { peak } = memory(device);
  const used = deviceBytes();
  session.dispose();
  model.dispose();
  trimMemory(device);
  const times = ends.slice(2).map((t, i) => t - ends[i + 1]);
  return { seconds: median(times), host: median(enqueued.slice(2)), peak, used };
}

/** Work on the device that takes about `seconds`, as a function, and what it takes. */
function blocker(device, seconds, width) {
  const [a, b, out] = [
    random([width, width], { device }),
    random([width, width], { device }),
    empty([width, width], { device }),
  ];
  const product = () => launch('matmul', [out, a, b, null], [1, 0]);
  const one = timeDevice(device, product);
  const count = Math.max(1, Math.ceil(seconds / one));
  return {
    takes: count * one,
    run: () => Array.from({ length: count }, product),
    end: () => [a, b, out].forEach((t) => void t.dispose()),
  };
}

function tellPeer(rows, name, goal, ours, theirs, need) {
  rows.push({
    section: 'DPO steps',
    name,
    goal,
    ours: `${formatTime(ours.seconds)}, peak ${formatBytes(ours.peak)}`,
    ...(theirs.seconds && {
      peer: `${formatTime(theirs.seconds)}, peak ${formatBytes(theirs.bytes)}`,
      ratio: (theirs.seconds / ours.seconds).toFixed(2),
      met: theirs.seconds / ours.seconds >= need,
    }),
  });
}

/** The share of a step that is lost because launches come late: against steps whose launches wait behind other work. */
async function launchOverhead({ device, size, rows, tiny }, ours) {
  const blocking = blocker(device, 1.2 * ours.host, tiny ? 32 : 8192);
  const queued = await stepTimes(device, size.qwen, size.dpo, blocking.run);
  blocking.end();
  const busy = queued.seconds - blocking.takes;
  const share = Math.max(0, 1 - busy / ours.seconds);
  const sound = busy > 0; // else the blocking work did not run before the step: nothing was measured
  rows.push({
    section: 'DPO steps',
    name: 'launch overhead of that step',
    goal: '< 5 %',
    ours: sound ? `${(100 * share).toFixed(1)} %` : 'not measured',
    ...(sound && { met: share < 0.05 }),
    note: `the host enqueues a step in ${formatTime(ours.host)}${sound ? `; with all launches queued it takes ${formatTime(busy)}` : ''}`,
  });
}

/** In a process of its own: all that it takes of the GPU counts, context, scratch and workspaces too. */
function largeModel(context, gradientCheckpointing) {
  const { pairs, prompt, response } = context.size.large;
  const { seconds, peak, bytes } = inChild(context, 'large', { gradientCheckpointing });
  const all = bytes === undefined ? 'process not measured: no nvidia-smi' : `${formatBytes(bytes)} of the process`;
  context.rows.push({
    section: 'DPO steps',
    name: `Llama-3.2-3B, LoRA r${lora.r}, ${pairs} pairs x ${prompt + response}, ${gradientCheckpointing ? 'gradient checkpointing' : 'no recomputation'}`,
    goal: '<= 24 GB',
    ours: `${all}, peak of tensors ${formatBytes(peak)}, ${formatTime(seconds)} a step`,
    ...(bytes !== undefined && { met: bytes <= 24e9 }),
  });
}

export async function steps(context) {
  const { device, size, peer, rows } = context;
  const { pairs, prompt, response } = size.dpo;
  const ours = await stepTimes(device, size.qwen, size.dpo);
  const name = `Qwen2.5-0.5B, LoRA r${lora.r}, ${pairs} pairs x ${prompt + response} (prompt ${prompt})`;
  const told = { config: size.qwen, ...size.dpo, rank: lora.r, alpha: lora.alpha };
  tellPeer(rows, `${name}; TRL's defaults`, '>= 3', ours, await peer.measure('dpo', { ...told, variant: 'trl' }), 3);
  tellPeer(rows, `${name}; tuned`, '>= 1.5', ours, await peer.measure('dpo', { ...told, variant: 'tuned' }), 1.5);
  await launchOverhead(context, ours);
  largeModel(context, true);
  largeModel(context, false);
}
