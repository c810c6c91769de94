// The demo: its committed model and data, a run of a few steps into files, curves against the saved models, what it says.
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { runDemo } from '../../src/cli/demo.js';
import { Choices } from '../../src/data/random.js';
import { preparePreferenceData } from '../../src/data/tokenize.js';
import { curveOf, type MethodResult } from '../../src/demo/curves.js';
import { HeldOutPairs } from '../../src/demo/held-out.js';
import { agrees, drawProblem, finalNumber, rightAnswers } from '../../src/demo/language.js';
import { conclude, findings, judge, type Results } from '../../src/demo/report.js';
import { assets, assetsFolder, type DemoSettings, demoMethods } from '../../src/demo/settings.js';
import { drawSvg } from '../../src/demo/svg.js';
import { arrange, drawChart, roundLimits } from '../../src/demo/terminal-chart.js';
import { sampleAnswers } from '../../src/generate/sampling.js';
import { loadModel } from '../../src/io/model-folder.js';
import { loadTokenizer } from '../../src/io/tokenizer.js';
import { memory } from '../../src/tensor/storage.js';

const settings: DemoSettings = { steps: 3, batchSize: 2, evaluateEvery: 1, heldOut: 6, rateFactor: 10 };

let folder = '';
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'keelgrad-demo-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

interface Outcome {
  out: string;
  err: string;
}

async function demo(output: string, overrides: Partial<DemoSettings> = {}, signal?: AbortSignal): Promise<Outcome> {
  const outcome = { out: '', err: '' };
  const stream = (name: keyof Outcome) => ({
    write: (text: string) => {
      outcome[name] += text;
    },
    columns: 100,
  });
  const context = { stdout: stream('out'), stderr: stream('err'), signal: signal ?? new AbortController().signal };
  await runDemo({ method: 'demo', output, seed: 42, threads: undefined }, context, { ...settings, ...overrides });
  return outcome;
}

const readRecords = (path: string): Record<string, { content: string }[]>[] =>
  readFileSync(path, 'utf8')
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line));

/** Rows of demo.csv by method, numbers by column. */
function readCurves(output: string): Record<string, Record<string, number>[]> {
  const [header, ...rows] = readFileSync(join(output, 'demo.csv'), 'utf8').trimEnd().split('\n');
  const names = header.split(',').slice(1);
  const curves: Record<string, Record<string, number>[]> = {};
  for (const row of rows) {
    const [method, ...cells] = row.split(',');
    curves[method] ??= [];
    curves[method].push(Object.fromEntries(names.map((name, i) => [name, Number(cells[i])])));
  }
  return curves;
}

describe('assets of the demo', () => {
  it('take at most 3 MB', () => {
    const sizes = readdirSync(assetsFolder, { recursive: true, encoding: 'utf8' }).map((path) =>
      statSync(join(assetsFolder, path)),
    );
    expect(sizes.filter((entry) => entry.isFile()).reduce((sum, { size }) => sum + size, 0)).toBeLessThan(3e6);
  });

  it('hold right chosen and wrong rejected answers, and no held-out problem in the training data', () => {
    const [train, heldOut] = [readRecords(assets.pairs), readRecords(assets.heldOut)];
    for (const { chosen, rejected } of [...train, ...heldOut]) {
      expect(finalNumber(chosen[0].content)).not.toBeNull();
      expect(agrees(rejected[0].content, chosen[0].content)).toBe(false);
    }
    const seen = new Set(train.map(({ prompt }) => prompt[0].content));
    for (const { messages } of readRecords(join(assetsFolder, 'sft_train.jsonl'))) seen.add(messages[0].content);
    expect(heldOut.filter(({ prompt }) => seen.has(prompt[0].content))).toEqual([]);
  });

  it('tokenize the language without an unknown piece, and back', async () => {
    const tokenizer = await loadTokenizer(assets.model);
    const c = new Choices(7, 0);
    for (let i = 0; i < 200; i++) {
      const problem = drawProblem(c);
      for (const text of [problem.question, ...rightAnswers(problem)]) {
        const ids = await tokenizer.encode(text);
        expect(ids).not.toContain(tokenizer.tokenToId('<|unk|>'));
        expect(await tokenizer.decode(ids)).toBe(text);
      }
    }
  });

  it('score the answer and its end token, under the chat template', async () => {
    const tokenizer = await loadTokenizer(assets.model);
    const { examples, boundaryShifts } = await preparePreferenceData(assets.heldOut, {
      tokenizer: async () => tokenizer,
    });
    const [first] = readRecords(assets.heldOut);
    expect(boundaryShifts).toBe(0);
    expect(await tokenizer.decode(examples[0].promptIds)).toBe(
      `<|user|>${first.prompt[0].content}<|end|><|assistant|>`,
    );
    expect(await tokenizer.decode(examples[0].chosenIds)).toBe(`${first.chosen[0].content}<|end|>`);
  });
});

describe('sampleAnswers', () => {
  it('does not depend on the batch, ends where the model ends, and follows the seed', async () => {
    const tokenizer = await loadTokenizer(assets.model);
    const { examples } = await preparePreferenceData(assets.heldOut, { tokenizer: async () => tokenizer });
    const prompts = examples.slice(0, 5).map((pair) => pair.promptIds);
    const endId = tokenizer.eosToken!.id;
    using model = await loadModel(assets.model);
    const sample = (temperature: number, batchSize: number, seed = 1) =>
      sampleAnswers(model, prompts, { temperature, endId, maxTokens: 48, batchSize, seed });
    const greedy = await sample(0, 5);
    expect(await sample(0, 2)).toEqual(greedy);
    expect(await sample(1, 2)).toEqual(await sample(1, 5));
    expect(await sample(1, 5, 2)).not.toEqual(await sample(1, 5));
    for (const ids of greedy) expect(ids.indexOf(endId)).toBe(ids.length - 1);
  });
});

describe('keelgrad demo', () => {
  it('writes runs, curves and chart, and gives all memory back', async () => {
    const output = join(folder, 'first');
    await demo(output, { steps: 1 });
    const before = memory();
    const { out, err } = await demo(output);
    expect(memory().storages).toBe(before.storages);
    expect(memory().allocated).toBe(before.allocated);

    for (const method of demoMethods) {
      for (const name of ['run.json', 'metrics.jsonl', 'model/model.safetensors', 'adapter/adapter_model.safetensors'])
        expect(existsSync(join(output, method, name)), `${method}/${name}`).toBe(true);
      expect(
        readFileSync(join(output, method, 'metrics.jsonl'), 'utf8')
          .trimEnd()
          .split('\n'),
      ).toHaveLength(3);
    }
    const record = JSON.parse(readFileSync(join(output, 'demo.json'), 'utf8'));
    expect(record).toMatchObject({ status: 'completed', held_out_pairs: 6 });
    expect(record.runs.map((run: { method: string }) => run.method)).toEqual(['dpo', 'spo']);
    expect(record.findings).toHaveLength(8);
    expect(readFileSync(join(output, 'demo.svg'), 'utf8')).toMatch(/^<svg [\s\S]*<\/svg>\n$/);
    expect(out).toContain('right answers');
    expect(out).toContain('What the paper reports');
    expect(err.match(/[\d,]+ trained parameters/g)).toHaveLength(2);
  });

  it('starts both curves at the same point, with changes of exactly 0', async () => {
    const { dpo, spo } = readCurves(join(folder, 'first'));
    expect(dpo.map((point) => point.step)).toEqual([0, 1, 2, 3]);
    expect(spo.map((point) => point.step)).toEqual([0, 1, 2, 3]);
    expect(dpo[0]).toEqual(spo[0]);
    expect(dpo[0]).toMatchObject({ logps_chosen_delta: 0, logps_rejected_delta: 0 });
    expect(dpo[3].logps_chosen_delta).not.toBe(0);
    expect(dpo[3]).not.toEqual(spo[3]);
  });

  it('trains the same parameters by both methods, on the same batches', () => {
    const read = (method: string) => JSON.parse(readFileSync(join(folder, 'first', method, 'run.json'), 'utf8'));
    const [dpo, spo] = [read('dpo').options, read('spo').options];
    const shared = Object.keys(dpo).filter((key) => key in spo && key !== 'output');
    for (const key of shared) expect(spo[key], key).toEqual(dpo[key]);
    expect(shared).toEqual(
      expect.arrayContaining(['seed', 'batch-size', 'beta', 'learning-rate', 'lora-r', 'max-steps']),
    );
    expect(dpo.train).toBe('both');
  });

  it('ends its curves at the models it saved, and numbers points by updates', async () => {
    const heldOut = await HeldOutPairs.load(settings.heldOut);
    const curves = readCurves(join(folder, 'first'));
    for (const method of demoMethods) {
      const run = join(folder, 'first', method);
      using model = await loadModel(join(run, 'model'), { adapter: join(run, 'adapter') });
      const saved = curveOf({ points: [await heldOut.measure(model, 3)] })[0];
      expect([saved.chosen, saved.rejected]).toEqual([
        curves[method][3].logps_chosen,
        curves[method][3].logps_rejected,
      ]);
    }
    // The first step does not depend on how many follow.
    await demo(join(folder, 'one'), { steps: 1 });
    for (const method of demoMethods) expect(readCurves(join(folder, 'one'))[method][1]).toEqual(curves[method][1]);
  });

  it('refuses the folder of something else, and writes nothing into it', async () => {
    const output = join(folder, 'foreign');
    mkdirSync(output);
    writeFileSync(join(output, 'notes.txt'), 'mine');
    await expect(demo(output)).rejects.toThrow(
      /foreign: expected a new or empty folder, or an earlier demo's, found notes\.txt/,
    );
    expect(readdirSync(output)).toEqual(['notes.txt']);
  });

  it("keeps what is not its own in an earlier demo's folder", async () => {
    const output = join(folder, 'one');
    writeFileSync(join(output, 'notes.txt'), 'mine');
    await demo(output, { steps: 1, heldOut: 2 });
    expect(readFileSync(join(output, 'notes.txt'), 'utf8')).toBe('mine');
    expect(JSON.parse(readFileSync(join(output, 'demo.json'), 'utf8')).held_out_pairs).toBe(2);
  });

  it('stops when interrupted, and says so', async () => {
    const output = join(folder, 'stopped');
    const { out } = await demo(output, {}, AbortSignal.abort());
    expect(out).toContain('stopped early');
    expect(JSON.parse(readFileSync(join(output, 'demo.json'), 'utf8')).status).toBe('interrupted');
    expect(existsSync(join(output, 'demo.svg'))).toBe(false);
  });
});

/** A result whose pairs all move by the given amounts, with some spread. */
function result(method: 'dpo' | 'spo', chosen: number, rejected: number, right: boolean[]): MethodResult {
  const spread = (change: number) => Float64Array.from([-0.1, 0, 0.1, 0.05], (noise) => -5 + change + noise);
  const start = { step: 0, chosen: new Float64Array(4).fill(-5), rejected: new Float64Array(4).fill(-5) };
  const end = { step: 10, chosen: spread(chosen), rejected: spread(rejected) };
  return { method, points: [start, end], rightBefore: [true, false, true, false], rightAfter: right, seconds: 1 };
}

describe('report of the demo', () => {
  it('judges by sign and two standard errors', () => {
    expect(judge({ mean: 1, error: 0.4 }, 1)).toBe('as reported');
    expect(judge({ mean: -1, error: 0.4 }, 1)).toBe('not so here');
    expect(judge({ mean: -1, error: 0.4 }, -1)).toBe('as reported');
    expect(judge({ mean: 1, error: 0.5 }, 1)).toBe('no clear difference here');
    expect(judge({ mean: 0, error: 0 }, -1)).toBe('no clear difference here');
  });

  it('says the opposite where the opposite was measured', () => {
    const same = [true, false, true, false];
    const reported: Results = { dpo: result('dpo', -2, -3, same), spo: result('spo', 1, -4, same) };
    const opposite: Results = { dpo: result('dpo', 2, 1, same), spo: result('spo', -1, 4, same) };
    expect(
      findings(reported)
        .slice(0, 5)
        .map((f) => f.verdict),
    ).toEqual(Array(5).fill('as reported'));
    expect(
      findings(opposite)
        .slice(0, 5)
        .map((f) => f.verdict),
    ).toEqual(Array(5).fill('not so here'));
    expect(
      findings(reported)
        .slice(5)
        .map((f) => f.verdict),
    ).toEqual(Array(3).fill('no clear difference here'));
    expect(conclude(findings(reported))).toMatch(/^5 of 8 came out as reported, 3 within the noise\./);
    expect(conclude(findings(opposite))).toMatch(/^0 of 8 came out as reported, 5 the other way, 3 within the noise\./);
  });

  it('draws charts whose lines are all as long, side by side where there is room', () => {
    const points = [
      [0, 0],
      [10, -1],
    ] as const;
    const frame = { width: 30, height: 5, low: -1, high: 0, xTitle: 'steps' };
    const chart = drawChart('T', [{ label: 'a', mark: '*', points }], frame);
    expect(new Set(chart.map((line) => line.length)).size).toBe(1);
    expect(chart[2]).toMatch(/ 0 ┤\*/);
    expect(chart[6]).toMatch(/-1 ┤.*\*$/);
    expect(arrange([chart, chart], 100).split('\n')).toHaveLength(chart.length + 1);
    expect(arrange([chart, chart], 60).split('\n')).toHaveLength(2 * chart.length + 2);
  });

  it('rounds limits outwards and keeps 0 inside', () => {
    expect(roundLimits([-1.36, 0.12], 6)).toMatchObject({ low: -1.5, high: 0.5 });
    expect(roundLimits([2, 7])).toMatchObject({ low: 0, high: 8 });
    expect(roundLimits([0, 0]).high).toBeGreaterThanOrEqual(0);
  });

  it('draws every number in the SVG', () => {
    const curve = curveOf(result('dpo', -2, 1, []));
    const svg = drawSvg([{ title: 'A < B', curve }], { title: 't', subtitle: 's' });
    expect(svg).not.toMatch(/NaN|Infinity|undefined/);
    expect(svg).toContain('A &lt; B');
  });
});
