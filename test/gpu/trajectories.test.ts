// Training on the GPU beside training on the CPU: every metric of every step, and where the weights end.
import { describe, expect, test } from 'vitest';
import {
  errorOfMove,
  fixtureCompletions,
  fixturePairs,
  type Given,
  type Run,
  readTensors,
  savedAdapter,
  savedModel,
  stable,
  temporaryFolder,
  train,
} from '../train/support.js';
import { gpu, makeAlignedModel, methods, needsGpu } from './device.js';

/** Of metrics by dtype, relative to max(1, |value|); of weights, relative to how far they moved. */
const limits = { float64: { metrics: 1e-9, move: 1e-7 }, float32: { metrics: 1e-4, move: 1e-2 } } as const;

describe.skipIf(!gpu)(`trajectories on the GPU and on the CPU (${gpu ?? needsGpu})`, () => {
  const folder = temporaryFolder();

  async function run(method: 'sft' | 'dpo' | 'spo', device: string, given: Given): Promise<Run> {
    const model = await makeAlignedModel(folder.path('model'));
    const data = folder.write(`${method}.json`, method === 'sft' ? fixtureCompletions(8) : fixturePairs(8));
    return train(method, { model, data, device, 'no-shuffle': true, 'batch-size': 4, 'max-steps': 4, ...given });
  }

  /** The largest difference of a metric over all steps. */
  function metricError(found: Run, expected: Run): number {
    const [a, b] = [stable(found.metrics), stable(expected.metrics)];
    expect(a).toHaveLength(b.length);
    const errors = b.flatMap((step, i) =>
      Object.entries(step).map(([name, x]) => Math.abs(a[i][name] - x) / Math.max(1, Math.abs(x))),
    );
    return Math.max(...errors.map((e) => (Number.isNaN(e) ? Number.POSITIVE_INFINITY : e)));
  }

  describe.each(methods)('%s', (method, given) => {
    test.each(['float64', 'float32'] as const)('in %s', async (dtype) => {
      const [found, expected] = [
        await run(method, 'cuda', { ...given, dtype }),
        await run(method, 'cpu', { ...given, dtype }),
      ];
      expect(metricError(found, expected)).toBeLessThan(limits[dtype].metrics);
      const whole = given.train !== 'lora';
      const saved = whole ? savedModel : savedAdapter;
      const start = whole
        ? await readTensors(folder.path('model', 'model.safetensors'))
        : new Map([...(await saved(expected.result.output))].map(([name, v]) => [name, new Float64Array(v.length)]));
      const end = await saved(expected.result.output);
      expect(errorOfMove(await saved(found.result.output), end, start)).toBeLessThan(limits[dtype].move);
    });
  });
});
