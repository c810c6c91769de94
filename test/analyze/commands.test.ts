// The analyses as the command line runs them, small, on the demo's model: what is written, and that it holds what it says.
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import type { Chart, Point } from '../../src/analyze/charts.js';
import { makeReport, runAnalysis } from '../../src/analyze/commands.js';
import {
  assignSets,
  likeliestOutside,
  type MassShiftOptions,
  massShiftReport,
  type SampledResponse,
} from '../../src/analyze/mass-shift.js';
import { drawSvg } from '../../src/analyze/report.js';
import { toyFlow } from '../../src/analyze/toy.js';
import { assets } from '../../src/demo/settings.js';
import { type Analysis, resolveOptions } from '../../src/train/options.js';
import { train } from '../train/support.js';

const folder = mkdtempSync(join(tmpdir(), 'keelgrad-analyze-'));
afterAll(() => rmSync(folder, { recursive: true }));

/** The first pairs of the demo's file, in one of their own. */
function demoPairs(count: number): string {
  const path = join(folder, `pairs-${count}.jsonl`);
  writeFileSync(path, readFileSync(assets.pairs, 'utf8').split('\n').slice(0, count).join('\n'));
  return path;
}

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
  it('writes a page, pictures, tables and numbers', async () => {
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

/** Titles of a chart's axes, wherever they stand in its specification. */
function axisTitles({ spec }: Chart): { x: Set<string>; y: Set<string> } {
  const found = { x: new Set<string>(), y: new Set<string>() };
  const visit = (node: unknown): void => {
    if (typeof node !== 'object' || node === null) return;
    for (const [key, value] of Object.entries(node)) {
      if ((key === 'x' || key === 'y') && typeof value?.title === 'string') found[key].add(value.title);
      else if (key !== 'values') visit(value);
    }
  };
  visit(spec);
  return found;
}

/** What an axis of a quantity without a unit may be called. */
const pure =
  /^(optimizer steps|probability|change of π|share of .*|outputs, the likeliest first \(rank\)|case of Theorem 2|norm of the term|[αληKγ] \(.+\))$/;

describe.each(Object.keys(small) as Analysis[])('charts of %s', (name) => {
  it('have a title, and axes with titles and units, in the specification and in the picture', async () => {
    const report = (await makeReport(
      name,
      resolveOptions(`analyze ${name}`, { ...small[name], device: 'cpu' }) as never,
    ))!;
    expect(report.charts.length).toBeGreaterThan(1);
    expect(new Set(report.charts.map((c) => c.id)).size).toBe(report.charts.length);
    for (const chart of report.charts) {
      const { x, y } = axisTitles(chart);
      expect([chart.title.length > 10, x.size, y.size], chart.id).toEqual([true, 1, 1]);
      const texts = [...(await drawSvg(chart)).matchAll(/<text[^>]*>([^<]*)<\/text>/g)].map(([, text]) =>
        text.replaceAll('&gt;', '>').replaceAll('&amp;', '&'),
      );
      for (const title of [...x, ...y]) {
        expect(title, chart.id).toMatch(/\(nats²?\)$/.test(title) ? /./ : pure);
        expect(texts, chart.id).toContain(title);
      }
      expect(texts).toContain(chart.title);
      for (const text of texts) expect(text, chart.id).not.toMatch(/…|undefined|NaN/);
    }
    for (const { columns } of report.tables) expect(new Set(columns).size).toBe(columns.length);
  });
});

describe('what it measures', () => {
  it('terms: (b) is linear in small alpha, and the regularizer has a part on both levels', async () => {
    const { text } = await run('terms', { lowerLearningRates: [1e-6, 2e-6], dtype: 'float64' });
    const { terms } = JSON.parse(text('terms.json'));
    expect(terms.adapters[1].penalty / terms.adapters[0].penalty).toBeCloseTo(2, 1);
    expect(terms.adapters[1].gap / terms.adapters[0].gap).toBeCloseTo(2, 1);
    for (const key of ['preference', 'penalty', 'regularizer']) expect(terms.backbone[key]).toBeGreaterThan(0);
    expect(terms.sftAdapters).toBeGreaterThan(0);
  });

  it('terms: by another solver, by token, to first order; and what it says of rounding', async () => {
    const measured = async (given: object) => {
      const { outcome, text } = await run('terms', { lowerLearningRates: [1e-5], ...given });
      return { terms: JSON.parse(text('terms.json')).terms, findings: outcome!.findings.join('\n') };
    };
    const plain = await measured({});
    const adam = await measured({ lowerSolver: 'adam' });
    expect(adam.terms.adapters[0].gap).not.toBeCloseTo(plain.terms.adapters[0].gap, 6);
    expect(adam.terms.backbone).toEqual(plain.terms.backbone);
    const byToken = await measured({ normPerToken: true });
    expect(byToken.terms.backbone.regularizer).not.toBeCloseTo(plain.terms.backbone.regularizer, 3);
    expect(byToken.terms.adapters[0].penalty).toBe(plain.terms.adapters[0].penalty);
    const first = await measured({ penaltyForm: 'first-order' });
    expect([plain, first].map(({ terms }) => terms.firstOrder)).toEqual([false, true]);
    expect(first.terms.adapters[0].penalty / plain.terms.adapters[0].penalty).toBeCloseTo(1, 1);
    const tiny = { lowerLearningRates: [1e-14] };
    expect((await measured(tiny)).findings).toMatch(
      /Term \(b\) is below the rounding of float32 at .*: there it is noise/,
    );
    expect((await measured({ ...tiny, penaltyForm: 'first-order' })).findings).toMatch(
      /Term \(b\) is below the rounding of float32 at .*: only its first-order form, which was taken here/,
    );
  });

  it('runs: the lower level and the regularizer by their options', async () => {
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

  it('terms: shares are those of the trainer', async () => {
    const given = {
      lossType: 'ipo_sum',
      sftReduction: 'token-mean',
      normOver: 'adapters',
      dtype: 'float64',
      data: demoPairs(2),
    };
    const { text } = await run('terms', {
      ...given,
      lambdas: [2],
      gammas: [0.3],
      lowerLearningRates: [1e-3],
      lowerStepCounts: [2],
    });
    const [row] = JSON.parse(text('terms.json')).rows;
    const more = {
      lambda: 2,
      gamma: 0.3,
      lowerLearningRate: 1e-3,
      lowerSteps: 2,
      beta: 0.5,
      maxSteps: 1,
      batchSize: 2,
    };
    const { metrics } = await train('spo', { ...given, ...more, model: assets.model, termNorms: true, device: 'cpu' });
    for (const [group, names] of [
      ['adapters', ['a', 'b', 'e_phi']],
      ['backbone', ['c', 'd', 'e']],
    ] as const)
      names.forEach((term, i) => {
        expect(row[group].norms[i] / metrics[0][`spo/term_${term}`], term).toBeCloseTo(1, 6);
        expect(row[group].shares[i], term).toBeCloseTo(metrics[0][`spo/share_${term}`], 6);
      });
  });

  it('sensitivity: R is measured where gamma is 0, too', async () => {
    const { text } = await run('sensitivity', { lambdas: [1], pairs: 12, gradientPairs: 12 });
    const { start, runs } = JSON.parse(text('sensitivity.json'));
    expect(start.regularizer).toBeGreaterThan(0);
    for (const one of runs) expect(one.regularizer).toBeGreaterThan(0);
    expect(runs.map((one: { gamma: number }) => one.gamma)).toEqual([0, 0.01]);
  });

  it('dynamics: every curve raw and smoothed', async () => {
    const options = resolveOptions('analyze dynamics', { ...small.dynamics, emaDecay: 0.5, device: 'cpu' });
    const { charts } = (await makeReport('dynamics', options))!;
    for (const { id, spec } of charts) {
      const points = (spec as { data: { values: Point[] } }).data.values;
      const curves = new Map<string, { raw: Point[]; smooth: Point[] }>();
      for (const point of points) {
        const name = `${point.panel} ${point.series}`;
        const curve = curves.get(name) ?? { raw: [], smooth: [] };
        curves.set(name, curve);
        curve[point.raw ? 'raw' : 'smooth'].push(point);
      }
      expect(curves.size, id).toBeGreaterThan(1);
      for (const { raw, smooth } of curves.values()) {
        expect(smooth.map((p) => p.x)).toEqual(raw.map((p) => p.x));
        const kept = 0.5 ** (raw[1].x - raw[0].x);
        const second = (kept * 0.5 * raw[0].y + (1 - kept) * raw[1].y) / (kept * 0.5 + 1 - kept);
        expect(smooth[0].y).toBeCloseTo(raw[0].y, 10);
        expect(smooth[1].y).toBeCloseTo(second, 10);
      }
    }
  });

  it('mass shift: the exact flow to every output, and its first order', async () => {
    const flow = await toyFlow({ seed: 42, beta: 0.5, stepSize: 1e-6 });
    expect(flow.pairs.map((pair) => pair.case)).toEqual(['case 1', 'case 2', 'both rise']);
    const sum = (values: number[]): number => values.reduce((a, b) => a + b, 0);
    for (const { outputs, shares, moved, case: name } of flow.pairs) {
      expect(outputs).toHaveLength(125);
      expect(
        outputs
          .filter((o) => o.role !== 'other')
          .map((o) => o.role)
          .sort(),
      ).toEqual(['y*', 'y_l', 'y_w']);
      expect(sum(outputs.map((o) => o.before))).toBeCloseTo(1, 10);
      expect(sum(outputs.map((o) => o.after))).toBeCloseTo(1, 10);
      for (const o of outputs) expect(Math.abs(o.change - o.firstOrder)).toBeLessThan(0.01 * moved);
      expect(sum(Object.values(shares))).toBeCloseTo(1, 10);
      const gained = outputs.filter((o) => o.role === 'y*' && o.change > 0).map((o) => o.change / moved);
      expect(shares['y*']).toBeCloseTo(sum(gained), 10);
      const chosen = outputs.find((o) => o.role === 'y_w')!;
      expect(Math.sign(chosen.change)).toBe(name === 'case 1' ? -1 : 1);
    }
  });

  it('mass shift: shares of probability add up', async () => {
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

describe('theory', () => {
  const rows = (csv: string): string[][] =>
    csv
      .trim()
      .split('\n')
      .slice(1)
      .map((line) => line.split(','));

  it('a row for every response and step size, with its order and its bound', async () => {
    // A large step breaks bounds that are of first order.
    const { text } = await run('theory', { stepSizes: [0.01, 1e-5], pairs: 2, dtype: 'float64' });
    const { results, stepSizes } = JSON.parse(text('theory.json'));
    const table = rows(text('theory-sequences.csv'));
    expect(table).toHaveLength(2 * 3 * stepSizes.length);
    let at = 0;
    const outcomes = new Set<string>();
    for (const [pair, { sequences, corollary1 }] of results.entries())
      for (const [i, sequence] of sequences.entries())
        for (const [k, eta] of stepSizes.entries()) {
          const [ofPair, name, ...cells] = table[at++];
          const [logProb, step, predicted, measured, error, order, bound] = cells.map(Number);
          expect([Number(ofPair), name]).toEqual([pair, ['chosen', 'rejected', 'other 1'][i]]);
          expect([logProb, step, measured, error]).toEqual([
            sequence.logProb,
            eta,
            sequence.measured[k],
            sequence.error[k],
          ]);
          expect(predicted).toBe(eta * sequence.predictedPerStepSize);
          expect(measured - predicted).toBeCloseTo(error, 12);
          expect(order).toEqual(k > 0 ? sequence.order[k - 1] : Number.NaN);
          const [limit, holds] = [
            [eta * corollary1.lowerChosen, measured >= bound],
            [eta * corollary1.upperRejected, measured <= bound],
            [Number.NaN, ''],
          ][i];
          expect([bound, cells[7]]).toEqual([limit, String(holds)]);
          outcomes.add(`${name} ${holds}`);
        }
    expect(at).toBe(table.length);
    const both = ['chosen', 'rejected'].flatMap((name) => [`${name} false`, `${name} true`]);
    expect([...outcomes].sort()).toEqual([...both, 'other 1 '].sort());
  });

  it('other responses come from the file, or are those of the next record', async () => {
    const records = readFileSync(demoPairs(2), 'utf8')
      .split('\n')
      .map((line) => JSON.parse(line));
    const data = join(folder, 'others.jsonl');
    const [first, second] = records;
    const lines = [{ ...first, others: [first.rejected, first.chosen] }, second];
    writeFileSync(data, lines.map((record) => JSON.stringify(record)).join('\n'));
    const { text } = await run('theory', { data });
    const [own, next] = JSON.parse(text('theory.json')).results;
    const [chosen, rejected, ...others] = own.sequences;
    expect(others).toHaveLength(2);
    for (const [i, same] of [rejected, chosen].entries())
      for (const key of ['logProb', 'predictedPerStepSize']) expect(others[i][key] / same[key], key).toBeCloseTo(1, 10);
    expect(next.sequences.map((s: { kind: string }) => s.kind)).toEqual(['chosen', 'rejected', 'other']);
    expect(rows(text('theory-sequences.csv')).map(([, name]) => name)).toContain('other 2');
    expect(text('theory.html')).toContain(
      'Other responses: the field “others” of 1 of 2 records, else the chosen response of the next record.',
    );
    const without = await run('theory');
    expect(without.text('theory.html')).toContain('Other responses: the chosen response of the next record.');
    writeFileSync(data, JSON.stringify({ ...first, others: [] }));
    expect((await run('theory', { data, pairs: 1 })).text('theory.html')).not.toContain('Other responses');
  });
});

describe('mass shift', () => {
  it('y* is the likeliest that is not preferred; Theorem 2’s, the likeliest in no pair, may be a preferred one', () => {
    const sets = (preferred: string, perSet: number) => {
      const found = assignSets(
        [...preferred].map((letter) => ({ preferred: letter === 'p' })),
        perSet,
      );
      return [found.map(({ set }) => set), likeliestOutside(found)];
    };
    expect(sets('pddp', 1)).toEqual([['Y_w', 'y*', 'Y_l', 'others'], 1]);
    expect(sets('ppdd', 1)).toEqual([['Y_w', 'others', 'y*', 'Y_l'], 1]);
    expect(sets('ddppd', 2)).toEqual([['y*', 'Y_l', 'Y_w', 'Y_w', 'Y_l'], 0]);
    expect(sets('pdddp', 1)).toEqual([['Y_w', 'y*', 'Y_l', 'others', 'others'], 1]);
  });

  it('says whose y* it followed', async () => {
    const same = { ids: [1], preferred: false, set: 'y*', logProb: -1 } as const;
    const other = { ids: [2], preferred: true, set: 'others', logProb: -0.5 } as const;
    const options = { samples: 2, dpo: {}, spo: {} } as MassShiftOptions;
    const toy = await toyFlow({ seed: 1, beta: 0.5, stepSize: 1e-3 });
    const reportOf = (responses: SampledResponse[]) => {
      const looks = [0, 1].map((updates) => ({
        updates,
        logProbs: responses.map(({ logProb }, i) => logProb - updates * (i + 1)),
      }));
      const facts = { model: 'm', prompt: 'q', texts: responses.map(({ ids }) => `answer ${ids[0]}`) };
      return massShiftReport({ responses, runs: [{ method: 'dpo', looks }] }, options, facts, toy);
    };
    const agreeing = reportOf([same, other]);
    expect(agreeing.introduction[1]).toContain('is this one here');
    expect(agreeing.findings[0]).not.toContain('Theorem 2');
    const differing = reportOf([other, same]);
    expect(differing.introduction[1]).toContain('another one here, a preferred one: “answer 2”');
    expect(differing.findings[0]).toContain('Theorem 2’s y* -1');
  });
});

describe('bad input', () => {
  it('step sizes that do not fall, before anything is read', async () => {
    await expect(run('theory', { stepSizes: [1e-5, 1e-4], data: 'none.jsonl' })).rejects.toThrow(
      '[theory] step sizes: expected different ones in falling order, found 0.00001, 0.0001; try 0.0001, 0.00001',
    );
  });

  it('theory in bfloat16', async () => {
    await expect(run('theory', { dtype: 'bfloat16' })).rejects.toThrow(/expected a model in float32 or float64/);
  });

  it('an answer without a number, a prompt nobody answers right', async () => {
    await expect(run('mass-shift', { answer: 'many' })).rejects.toThrow(/--answer: expected a text with a number/);
    await expect(run('mass-shift', { answer: '99999' })).rejects.toThrow(/found 0 preferred and \d+ dispreferred/);
  });
});
