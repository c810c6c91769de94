// The GPU beside the CPU on whole models: logits, log-probabilities, loss and every gradient, in float32 against float64 of
// the CPU, and in bfloat16 no farther from it than twice what the CPU's bfloat16 is.
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from 'vitest';
import { loadModel } from '../../src/io/model-folder.js';
import type { Device } from '../../src/tensor/storage.js';
import { logitsOf, lossAndGradients, maxAbs, maxDifference, scoreSequence } from '../models/support.js';
import { temporaryFolder } from '../train/support.js';
import { gpu, makeAlignedModel, needsGpu, onDevice } from './device.js';

type DType = 'float32' | 'float64' | 'bfloat16';

interface Seen {
  readonly logits: Float64Array;
  readonly logProbs: Float64Array;
  readonly loss: number;
  readonly gradients: ReadonlyMap<string, Float64Array>;
}

/** Sequences of ids below `limit`, of lengths that fill no tile. */
const sequences = (limit: number): number[][] =>
  [5, 33, 70].map((length, s) => Array.from({ length }, (_, i) => 4 + ((i * i * 13 + i * 7 + s * 29) % (limit - 4))));

const look = (folder: string, device: Device, dtype: DType): Promise<Seen> =>
  onDevice(device, async () => {
    using model = await loadModel(folder, { device, dtype });
    const given = sequences(model.config.vocabSize);
    const long = given[given.length - 1];
    const { loss, gradients } = lossAndGradients(model, { sequences: given, loss_from: [1, 3, 20] });
    return { logits: logitsOf(model, long), logProbs: scoreSequence(model, long).logProbs, loss, gradients };
  });

/** How far results are from exact ones: log-probabilities absolutely, gradients relative to their largest entries. */
function distances(found: Seen, exact: Seen): Record<'logits' | 'logProbs' | 'loss' | 'gradients', number> {
  const gradients = [...exact.gradients].map(([name, g]) => maxDifference(found.gradients.get(name)!, g) / maxAbs(g));
  return {
    logits: maxDifference(found.logits, exact.logits),
    logProbs: maxDifference(found.logProbs, exact.logProbs),
    loss: Math.abs(found.loss / exact.loss - 1),
    gradients: Math.max(...gradients),
  };
}

describe.skipIf(!gpu)(`models on the GPU and on the CPU (${gpu ?? needsGpu})`, () => {
  const folder = temporaryFolder();
  const demo = fileURLToPath(new URL('../../assets/demo/model', import.meta.url));
  const models = { demo: async () => demo, 'heads of 64': () => makeAlignedModel(folder.path('model')) };

  test.each(Object.entries(models))('%s in float64 and float32', async (_, make) => {
    const path = await make();
    const exact = await look(path, 'cpu', 'float64');
    const far64 = distances(await look(path, gpu!, 'float64'), exact);
    expect(Math.max(...Object.values(far64))).toBeLessThan(1e-10);
    const far32 = distances(await look(path, gpu!, 'float32'), exact);
    expect(far32.logits).toBeLessThan(1e-4);
    expect(far32.logProbs).toBeLessThan(1e-4);
    expect(far32.loss).toBeLessThan(1e-5);
    expect(far32.gradients).toBeLessThan(1e-4);
  });

  test.each(Object.entries(models))('%s in bfloat16', async (_, make) => {
    const path = await make();
    const exact = await look(path, 'cpu', 'float64');
    const ours = distances(await look(path, gpu!, 'bfloat16'), exact);
    const usual = distances(await look(path, 'cpu', 'bfloat16'), exact);
    for (const key of ['logits', 'logProbs', 'gradients'] as const)
      expect(ours[key], key).toBeLessThan(2 * usual[key] + 1e-3);
    expect(ours.loss).toBeLessThan(2 * usual.loss + 1e-3);
  });
});
