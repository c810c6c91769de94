// Term (b) below rounding: told of once, with the measured numbers, where it is a difference of nothing; not elsewhere.
import { beforeAll, describe, expect, it } from 'vitest';
import { loadModel } from '../../src/io/model-folder.js';
import { penaltyWarning } from '../../src/train/penalty-watch.js';
import { spo } from '../../src/train/trainers.js';
import { makeModelFolder } from '../fixtures/make.js';
import { fixturePairs, type Given, type Run, temporaryFolder, train } from './support.js';

const folder = temporaryFolder();
let model: string;
beforeAll(async () => {
  model = await makeModelFolder(folder.path('model'), 'qwen2');
});

const run = (given: Given): Promise<Run> =>
  train('spo', { model, data: folder.write('pairs.json', fixturePairs(6)), 'max-steps': 4, 'batch-size': 3, ...given });

const warnings = ({ messages }: Run): string[] => messages.filter((text) => text.includes('(term b) has norm'));

describe('a run of spo', () => {
  it.each([
    { 'lower-learning-rate': 1e-12 },
    { 'lower-learning-rate': 1e-12, lambda: 5, gamma: 0.1 },
    { 'lower-learning-rate': 1e-12, 'ld-alpha': 0.5 },
    { dtype: 'bfloat16', 'penalty-form': 'difference', 'lower-learning-rate': 1e-9 },
  ])('whose term (b) is rounding says so once: %j', async (given) => {
    const found = await run(given);
    const [warning, ...more] = warnings(found);
    expect(more).toEqual([]);
    const [first] = found.metrics;
    expect(first['spo/term_b']).toBeLessThan(first['spo/term_b_rounding']);
    const number = (x: number): string => x.toExponential(1);
    expect(warning).toContain(
      `step 1: the penalty's pull on the adapters (term b) has norm ${number(first['spo/term_b'])}`,
    );
    expect(warning).toContain(
      `below the ${number(first['spo/term_b_rounding'])} that rounding in ${given.dtype ?? 'float32'}`,
    );
    expect(warning).toContain(`term a: ${number(first['spo/term_a'])}`);
    expect(warning).toContain('raise the lower learning rate');
  });

  it.each([
    { 'lower-learning-rate': 1e-2 },
    { 'lower-learning-rate': 1e-12, 'penalty-form': 'first-order' },
    { 'lower-learning-rate': 1e-9, dtype: 'bfloat16' },
    { 'lower-learning-rate': 1e-9, dtype: 'float64' },
    { lambda: 0 },
    { 'lower-learning-rate': 1e-2, 'lambda-schedule': 'linear', 'lambda-ramp-steps': 3, gamma: 0.1 },
    { lambda: 0, gamma: 0.1 },
    { 'lower-steps': 0 },
    { 'lower-steps': 0, 'term-norms': true },
  ])('whose term (b) is more, or no difference, does not: %j', async (given) => {
    expect(warnings(await run(given))).toEqual([]);
  });

  it('called as a library says it too', async () => {
    using loaded = await loadModel(model, { lora: { r: 4, seed: 1 } });
    const messages: string[] = [];
    const hooks = { onMessage: (text: string) => messages.push(text) };
    for await (const _ of spo(loaded, fixturePairs(4), { maxSteps: 3, lower: { lr: 1e-12 }, hooks }));
    expect(messages.filter((text) => text.includes('(term b) has norm'))).toHaveLength(1);
  });
});

describe('the criterion', () => {
  const step = (metrics: Record<string, number>) =>
    penaltyWarning({ step: 3, totalSteps: 9, metrics }, { dtype: 'float32', lambda: 2 });

  it('compares measured norms, and is silent without them', () => {
    expect(step({ 'spo/term_a': 2, 'spo/term_b': 1e-7, 'spo/term_b_rounding': 1e-6 })).toMatch(/^step 3: /);
    expect(step({ 'spo/term_a': 2, 'spo/term_b': 1e-6, 'spo/term_b_rounding': 1e-6 })).toBeUndefined();
    expect(step({ 'spo/term_b': 0, 'spo/term_b_rounding': 0 })).toBeUndefined();
    expect(step({ loss: 1 })).toBeUndefined();
    expect(step({ 'spo/lambda': 1, 'spo/term_b': 1e-7, 'spo/term_b_rounding': 1e-6 })).toBeUndefined();
    expect(step({ 'spo/term_a': 2, 'spo/lambda': 2, 'spo/term_b': 1e-7, 'spo/term_b_rounding': 1e-6 })).toMatch(
      /rounding in float32/,
    );
  });
});
