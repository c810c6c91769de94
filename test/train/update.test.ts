// The end of a step as captured kernels: whole runs give the bits that they give without, and stop at the same place; a
// device that has graphs of its own replays them as such, each time.
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, test, vi } from 'vitest';
import { Graph, type GraphCounts } from '../../src/native/graph.js';
import { type Device, memory, synchronize } from '../../src/tensor/storage.js';
import { makeAlignedModel, methods } from '../gpu/device.js';
import { testDevices } from '../support/devices.js';
import { fixtureCompletions, fixturePairs, type Given, stable, temporaryFolder, train } from './support.js';

const steps = 4;

/** All weight files under a folder. */
const weights = (folder: string): Record<string, string> =>
  Object.fromEntries(
    (readdirSync(folder, { recursive: true }) as string[])
      .filter((f) => f.endsWith('.safetensors'))
      .map((f) => [f, readFileSync(join(folder, f)).toString('base64')]),
  );

/** What graphs have counted when they go, in a list that grows. */
function countGraphs(device: Device): GraphCounts[] {
  const counts: GraphCounts[] = [];
  const { dispose } = Graph.prototype;
  vi.spyOn(Graph.prototype, 'dispose').mockImplementation(function (this: Graph) {
    synchronize(device);
    counts.push(this.counts());
    dispose.call(this);
  });
  return counts;
}

describe.each(testDevices())('captured updates on %s', (device) => {
  const folder = temporaryFolder();
  const { KEELGRAD_GRAPHS: before } = process.env;
  afterEach(() => {
    vi.restoreAllMocks();
    if (before === undefined) delete process.env.KEELGRAD_GRAPHS;
    else process.env.KEELGRAD_GRAPHS = before;
  });

  async function run(graphs: '0' | '1', method: 'sft' | 'dpo' | 'spo', given: Given) {
    process.env.KEELGRAD_GRAPHS = graphs;
    const model = await makeAlignedModel(folder.path('model'));
    const data = folder.write(`${method}.json`, method === 'sft' ? fixtureCompletions(12) : fixturePairs(12));
    const { storages, allocated } = memory(device);
    const options = {
      model,
      data,
      device: device === 'cpu' ? 'cpu' : 'cuda',
      'batch-size': 4,
      'max-steps': steps,
      ...given,
    };
    const { result, metrics } = await train(method, options);
    expect(memory(device)).toMatchObject({ storages, allocated });
    return { metrics: stable(metrics), weights: weights(result.output) };
  }

  test.each(methods)('%s', async (method, given) => {
    const expected = await run('0', method, given);
    expect(Object.keys(expected.weights).length).toBeGreaterThan(0);
    const graphs = countGraphs(device);
    expect(await run('1', method, given)).toEqual(expected);
    // Zeroed gradients, and clipping with the optimizer's step: captured in the first step, replayed in the others.
    const replayed = { launches: expect.any(Number), replays: steps - 1, onDevice: device === 'cpu' ? 0 : steps - 1 };
    expect(graphs).toEqual([replayed, replayed]);
    for (const { launches } of graphs) expect(launches).toBeGreaterThan(1);
  });

  test('a gradient that is not finite stops both, with the weights of the step before', async () => {
    const given = { train: 'lora', 'learning-rate': 1e30, 'max-grad-norm': 0 };
    const failure = (graphs: '0' | '1') => run(graphs, 'dpo', given).then(String, (error: Error) => error.message);
    const expected = await failure('0');
    expect(expected).toMatch(/^step [23]: (loss|grad_norm) is/);
    expect(await failure('1')).toBe(expected);
  });
});
