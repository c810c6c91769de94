// The end of a step as captured kernels: whole runs give the bits that they give without, and stop at the same place.
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { memory } from '../../src/tensor/storage.js';
import { makeAlignedModel, methods } from '../gpu/device.js';
import { testDevices } from '../support/devices.js';
import { fixtureCompletions, fixturePairs, type Given, stable, temporaryFolder, train } from './support.js';

/** All weight files under a folder. */
const weights = (folder: string): Record<string, string> =>
  Object.fromEntries(
    (readdirSync(folder, { recursive: true }) as string[])
      .filter((f) => f.endsWith('.safetensors'))
      .map((f) => [f, readFileSync(join(folder, f)).toString('base64')]),
  );

describe.each(testDevices())('captured updates on %s', (device) => {
  const folder = temporaryFolder();
  const { KEELGRAD_GRAPHS: before } = process.env;
  afterEach(() => {
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
      'max-steps': 4,
      ...given,
    };
    const { result, metrics } = await train(method, options);
    expect(memory(device)).toMatchObject({ storages, allocated });
    return { metrics: stable(metrics), weights: weights(result.output) };
  }

  test.each(methods)('%s', async (method, given) => {
    const expected = await run('0', method, given);
    expect(Object.keys(expected.weights).length).toBeGreaterThan(0);
    expect(await run('1', method, given)).toEqual(expected);
  });

  test('a gradient that is not finite stops both, with the weights of the step before', async () => {
    const given = { train: 'lora', 'learning-rate': 1e30, 'max-grad-norm': 0 };
    const failure = (graphs: '0' | '1') => run(graphs, 'dpo', given).then(String, (error: Error) => error.message);
    const expected = await failure('0');
    expect(expected).toMatch(/^step [23]: (loss|grad_norm) is/);
    expect(await failure('1')).toBe(expected);
  });
});
