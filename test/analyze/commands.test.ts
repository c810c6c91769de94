// The analyses as the command line runs them, small, on the demo's model: what is written, and that it holds what it says.
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { runAnalysis } from '../../src/analyze/commands.js';
import { type Analysis, resolveOptions } from '../../src/train/options.js';

const folder = mkdtempSync(join(tmpdir(), 'keelgrad-analyze-'));
afterAll(() => rmSync(folder, { recursive: true }));

const small: Readonly<Record<Analysis, object>> = {
  theory: { pairs: 2, stepSizes: [1e-4, 1e-5] },
  dynamics: { pairs: 4, maxSteps: 3, every: 2, gradientPairs: 1, gamma: 0.01 },
  'mass-shift': { samples: 30, maxSteps: 2, every: 1, perSet: 2 },
  sensitivity: { pairs: 4, maxSteps: 2, lambdas: [0, 1], gammas: [0, 0.01] },
  terms: { pairs: 2, lambdas: [1], gammas: [0.1], lowerLearningRates: [1e-3, 2e-3], lowerStepCounts: [1] },
};

async function run(name: Analysis, given: object = {}) {
  const output = join(folder, `${name}-${Object.keys(given).length}`);
  const options = resolveOptions(`analyze ${name}`, { ...small[name], output, device: 'cpu', ...given });
  const outcome = await runAnalysis(name, options as never);
  const files = outcome ? readdirSync(output) : [];
  return { outcome, files, text: (file: string) => readFileSync(join(output, file), 'utf8') };
}

describe.each(Object.keys(small) as Analysis[])('%s', (name) => {
  it('writes a page, pictures, tables and numbers', { timeout: 120_000 }, async () => {
    const { outcome, files, text } = await run(name);
    expect(outcome?.findings.length).toBeGreaterThan(0);
    for (const finding of outcome?.findings ?? []) expect(finding).not.toMatch(/NaN|undefined|Infinity/);
    expect(files).toEqual(expect.arrayContaining([`${name}.html`, `${name}.json`]));
    const page = text(`${name}.html`);
    expect(page).not.toMatch(/(src|href)\s*=\s*["']https?:/); // needs nothing but itself
    for (const svg of files.filter((file) => file.endsWith('.svg'))) {
      expect(text(svg)).toMatch(/^<svg[\s\S]*<path[\s\S]*<\/svg>$/);
      expect(page).toContain(text(svg));
    }
    const tables = files.filter((file) => file.endsWith('.csv'));
    expect(tables.length).toBeGreaterThan(0);
    for (const table of tables) {
      const [header, ...rows] = text(table).trim().split('\n');
      expect(rows.length).toBeGreaterThan(0);
      if (!text(table).includes('"'))
        for (const row of rows) expect(row.split(',')).toHaveLength(header.split(',').length);
    }
    expect(JSON.parse(text(`${name}.json`))).toHaveProperty('model');
  });
});

describe('what it measures', () => {
  it('terms: (b) is linear in small alpha, and the regularizer has a part on both levels', {
    timeout: 60_000,
  }, async () => {
    const { text } = await run('terms', { lowerLearningRates: [1e-6, 2e-6], dtype: 'float64' });
    const { terms } = JSON.parse(text('terms.json'));
    expect(terms.b[1].b / terms.b[0].b).toBeCloseTo(2, 1);
    expect(terms.b[1].gap / terms.b[0].gap).toBeCloseTo(2, 1);
    for (const key of ['a', 'c', 'd', 'sftAdapters']) expect(terms[key]).toBeGreaterThan(0);
  });

  it('terms: by another solver, by token, to first order; and what it says of rounding', {
    timeout: 60_000,
  }, async () => {
    const measured = async (given: object) => {
      const { outcome, text } = await run('terms', { lowerLearningRates: [1e-5], ...given });
      return { terms: JSON.parse(text('terms.json')).terms, findings: outcome!.findings.join('\n') };
    };
    const plain = await measured({});
    const adam = await measured({ lowerSolver: 'adam' });
    expect(adam.terms.b[0].gap).not.toBeCloseTo(plain.terms.b[0].gap, 6);
    expect(adam.terms.e).toBe(plain.terms.e);
    const byToken = await measured({ normPerToken: true });
    expect(byToken.terms.e).not.toBeCloseTo(plain.terms.e, 3);
    expect(byToken.terms.b).toEqual(plain.terms.b);
    const first = await measured({ penaltyForm: 'first-order' });
    expect([plain, first].map(({ terms }) => terms.firstOrder)).toEqual([false, true]);
    expect(first.terms.b[0].b / plain.terms.b[0].b).toBeCloseTo(1, 1);
    const tiny = { lowerLearningRates: [1e-14] };
    expect((await measured(tiny)).findings).toMatch(
      /Term \(b\) is below the rounding of float32 at .*: there it is noise/,
    );
    expect((await measured({ ...tiny, penaltyForm: 'first-order' })).findings).toMatch(
      /Term \(b\) is below the rounding of float32 at .*: only its first-order form, which was taken here/,
    );
  });

  it('runs: the lower level and the regularizer by their options', { timeout: 60_000 }, async () => {
    const changes = async (name: 'dynamics' | 'sensitivity', given: object): Promise<string> => {
      const { text } = await run(name, given);
      const { options: _, ...found } = JSON.parse(text(`${name}.json`));
      return JSON.stringify(found, (key, value) => (key === 'seconds' ? undefined : value));
    };
    const lower = { lowerSteps: 2, lowerLearningRate: 1e-2, learningRate: 1e-3 };
    for (const name of ['dynamics', 'sensitivity'] as const) {
      const found = [await changes(name, lower)];
      for (const given of [{ lowerSolver: 'momentum' }, { lowerWarmStart: true }, { normPerToken: true }])
        found.push(await changes(name, { ...lower, ...given }));
      expect(new Set(found).size).toBe(4);
      expect(await changes(name, lower)).toBe(found[0]);
    }
  });

  it('mass shift: shares of probability add up', { timeout: 60_000 }, async () => {
    const { text } = await run('mass-shift', { seed: 3 });
    const { responses, runs, toy } = JSON.parse(text('mass-shift.json'));
    const total = responses.reduce((sum: number, r: { logProb: number }) => sum + Math.exp(r.logProb), 0);
    expect(total).toBeGreaterThan(0);
    expect(total).toBeLessThanOrEqual(1);
    expect(runs.map((r: { looks: unknown[] }) => r.looks.length)).toEqual([3, 3]);
    const cases = Object.values(toy.statistics) as { pairs: number }[];
    expect(cases.reduce((n, c) => n + c.pairs, 0)).toBe(125 * 124);
  });
});

describe('bad input', () => {
  it('theory in bfloat16', async () => {
    await expect(run('theory', { dtype: 'bfloat16' })).rejects.toThrow(/expected a model in float32 or float64/);
  });

  it('an answer without a number, a prompt nobody answers right', async () => {
    await expect(run('mass-shift', { answer: 'many' })).rejects.toThrow(/--answer: expected a text with a number/);
    await expect(run('mass-shift', { answer: '99999' })).rejects.toThrow(/found 0 preferred and \d+ dispreferred/);
  });
});
