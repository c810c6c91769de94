// The project's own small models against what transformers computes on them, recorded in fixtures/expected.json.
// KEELGRAD_RECORD=1 with KEELGRAD_PEER_PYTHON records it anew.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { loadModel } from '../../src/io/model-folder.js';
import { fixtureInputs, fixtureNames, makeModelFolder } from '../fixtures/make.js';
import { askPeers, describeWithPeers } from './peer.js';
import { logitsOf, lossAndGradients, maxDifference } from './support.js';

interface Expected {
  readonly loss: number;
  readonly last_logits: readonly (readonly number[])[];
  readonly gradients: Readonly<Record<string, { readonly norm: number; readonly projection: number }>>;
}

const expectedPath = join(import.meta.dirname, '..', 'fixtures', 'expected.json');
const readExpected = (): Record<string, Expected> => JSON.parse(readFileSync(expectedPath, 'utf8'));

let root = '';
beforeAll(async () => {
  root = mkdtempSync(join(tmpdir(), 'keelgrad-fixtures-'));
  for (const name of fixtureNames) await makeModelFolder(join(root, name), name);
});
afterAll(() => rmSync(root, { recursive: true }));

describeWithPeers('transformers on the fixtures', () => {
  it('gives what is recorded', async () => {
    const inputs = join(root, 'inputs.json');
    await writeFile(inputs, JSON.stringify(fixtureInputs));
    const fresh: Record<string, Expected> = {};
    for (const name of fixtureNames) fresh[name] = await askPeers(['values', join(root, name), inputs]);
    if (process.env.KEELGRAD_RECORD === '1') await writeFile(expectedPath, `${JSON.stringify(fresh, null, 1)}\n`);
    const recorded = readExpected();
    for (const name of fixtureNames) expect(Math.abs(fresh[name].loss - recorded[name].loss)).toBeLessThan(1e-12);
  });
});

describe.each(fixtureNames)('fixture %s', (name) => {
  it.each([
    ['float64', 1e-10, 1e-11],
    ['float32', 1e-4, 1e-4],
  ] as const)('%s: logits, loss and the gradient of every parameter', async (dtype, absolute, relative) => {
    const expected = readExpected()[name];
    using model = await loadModel(join(root, name), { dtype });
    fixtureInputs.sequences.forEach((ids, i) => {
      const last = logitsOf(model, ids).subarray(-model.config.vocabSize);
      expect(maxDifference(last, expected.last_logits[i])).toBeLessThan(absolute);
    });
    const { loss, gradients } = lossAndGradients(model, fixtureInputs);
    expect(Math.abs(loss / expected.loss - 1)).toBeLessThan(relative);
    expect([...gradients.keys()].sort()).toEqual(Object.keys(expected.gradients).sort());
    for (const [parameter, g] of gradients) {
      const { norm, projection } = expected.gradients[parameter];
      const limit = Math.max(absolute, relative * norm);
      expect(Math.abs(Math.hypot(...g) - norm), parameter).toBeLessThan(limit);
      const found = g.reduce((sum, x, i) => sum + x * Math.cos(0.7 * i), 0);
      expect(Math.abs(found - projection), parameter).toBeLessThan(limit * 10);
    }
  });
});
