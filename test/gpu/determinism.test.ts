// Two runs of the same training give the same bits: of metrics, weights and adapters, wherever memory lies and whatever else
// the device does.
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { Tensor } from '../../src/tensor/tensor.js';
import { fixtureCompletions, fixturePairs, type Given, stable, temporaryFolder, train } from '../train/support.js';
import { gpu, makeAlignedModel, methods, needsGpu } from './device.js';

/** All weight files under a folder. */
function weights(folder: string): Map<string, string> {
  const files = (readdirSync(folder, { recursive: true }) as string[]).filter((f) => f.endsWith('.safetensors'));
  return new Map(files.sort().map((f) => [f, readFileSync(join(folder, f)).toString('base64')]));
}

describe.skipIf(!gpu)(`two runs, equal bits (${gpu ?? needsGpu})`, () => {
  const folder = temporaryFolder();

  async function run(method: 'sft' | 'dpo' | 'spo', given: Given) {
    const model = await makeAlignedModel(folder.path('model'));
    const data = folder.write(`${method}.json`, method === 'sft' ? fixtureCompletions(12) : fixturePairs(12));
    const options = { model, data, device: 'cuda', seed: 7, 'batch-size': 4, 'max-steps': 3, ...given };
    const { result, metrics } = await train(method, options);
    return { metrics: stable(metrics), weights: weights(result.output) };
  }

  describe.each(methods)('%s', (method, given) => {
    test.each(['bfloat16', 'float32'])('in %s', async (dtype) => {
      const first = await run(method, { ...given, dtype });
      // Odd pieces of memory that stay: the second run lies elsewhere.
      const pieces = [33, 1031, 70_001].map((length) => Tensor.empty([length], { device: gpu! }));
      const second = await run(method, { ...given, dtype });
      for (const piece of pieces) piece.dispose();
      expect(first.weights.size).toBeGreaterThan(0);
      expect(second.metrics).toEqual(first.metrics);
      for (const [name, bits] of first.weights) expect(second.weights.get(name) === bits, name).toBe(true);
    });
  });
});
