// Likelihood displacement: told of once, with numbers, where it happens and lasts; not where it does not.
import { beforeAll, describe, expect, it } from 'vitest';
import { loadModel } from '../../src/io/model-folder.js';
import { DisplacementWatch } from '../../src/train/displacement.js';
import type { Metrics } from '../../src/train/hooks.js';
import { dpo } from '../../src/train/trainers.js';
import { makeModelFolder } from '../fixtures/make.js';
import { fixturePairs, type Given, type Run, temporaryFolder, train } from './support.js';

const folder = temporaryFolder();
let model: string;
beforeAll(async () => {
  model = await makeModelFolder(folder.path('model'), 'qwen2');
});

/** A rejected response that says the chosen one over and over: its gradient is the longer, along the chosen one's. */
const repeated = Array.from({ length: 4 }, (_, i) => ({
  prompt_ids: [5 + i, 9],
  chosen_ids: Array(2).fill(20 + i),
  rejected_ids: Array(8).fill(20 + i),
}));

const common = { 'batch-size': 4, 'learning-rate': 1e-4, 'max-steps': 24 };
const run = (method: 'dpo' | 'spo', given: Given = {}, pairs: object[] = repeated): Promise<Run> =>
  train(method, { model, data: folder.write('pairs.json', pairs), ...common, ...given });

const warnings = ({ messages }: Run): string[] => messages.filter((text) => text.includes('isplacement'));
const last = ({ metrics }: Run): Metrics => metrics[metrics.length - 1];

describe('a run of dpo', () => {
  it('that lowers chosen answers says so once, with numbers and the remedy', async () => {
    const found = await run('dpo', { train: 'both' });
    expect(last(found)['logps/chosen_delta']).toBeLessThan(-3);
    expect(last(found)['rewards/margins']).toBeGreaterThan(1);
    const [warning, ...more] = warnings(found);
    expect(more).toEqual([]);
    const lines = warning.split('\n');
    expect(lines).toHaveLength(3);
    const [, step, chosen, rejected] = /^step (\d+): .*log-probability (-\d+\.\d\d), rejected (-\d+\.\d\d)/.exec(
      lines[0],
    )!;
    expect(Number(step)).toBe(11); // the first one is untouched
    expect(Number(chosen)).toBeGreaterThan(found.metrics[10]['logps/chosen_delta']);
    expect(Number(chosen)).toBeLessThan(0);
    expect(Number(rejected)).toBeLessThan(Number(chosen));
    expect(lines[2]).toMatch(/^keelgrad spo /);
  });

  it('that raises them does not', async () => {
    for (const found of [
      await run('dpo', { train: 'both', 'nll-weight': 1 }),
      await run('dpo', { train: 'both' }, fixturePairs(4)),
    ]) {
      expect(last(found)['logps/chosen_delta']).toBeGreaterThan(1);
      expect(warnings(found)).toEqual([]);
    }
  });

  it('without a reference has nothing to compare with', async () => {
    expect(warnings(await run('dpo', { train: 'both', reference: 'none' }))).toEqual([]);
  });

  it('tells callers of the library as well', async () => {
    using policy = await loadModel(model);
    const messages: string[] = [];
    const options = {
      batchSize: 4,
      learningRate: 1e-4,
      maxSteps: 24,
      hooks: { onMessage: (text: string) => messages.push(text) },
    };
    for await (const _ of dpo(policy, repeated, options));
    expect(messages).toHaveLength(1);
  });
});

it('spo keeps the same chosen answers likely, and does not warn', async () => {
  const found = await run('spo');
  expect(last(found)['logps/chosen_delta']).toBeGreaterThan(1);
  expect(warnings(found)).toEqual([]);
});

describe('the watch', () => {
  /** The step at which it warns of these changes of chosen answers. */
  function warnsAt(changes: readonly number[]): number | undefined {
    const watch = new DisplacementWatch();
    const at = changes.flatMap((change, i) => {
      const metrics = { 'logps/chosen_delta': change, 'logps/rejected_delta': 2 * change };
      return watch.next({ step: i + 1, totalSteps: changes.length, metrics }) === undefined ? [] : [i + 1];
    });
    expect(at.length).toBeLessThanOrEqual(1);
    return at[0];
  }
  const times = (count: number, value: number): number[] => Array(count).fill(value);

  it('waits for ten steps in a row', () => {
    expect(warnsAt(times(9, -1))).toBeUndefined();
    expect(warnsAt(times(40, -1))).toBe(10);
    expect(warnsAt([...times(9, -1), 50, ...times(40, -1)])).toBeGreaterThan(30);
  });

  it('looks over noise, and over what rounding leaves', () => {
    expect(warnsAt(Array.from({ length: 200 }, (_, i) => (i % 2 === 0 ? -1 : 1.5)))).toBeUndefined();
    expect(warnsAt(times(100, -1e-4))).toBeUndefined();
  });
});
