// Token ids, masks, cuts and drops: by hand on a toy tokenizer, and against what TRL prepared and batched.

import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { planSteps } from '../../src/data/batches.js';
import {
  type PreferenceExample,
  type PrepareOptions,
  preparePreferenceData,
  prepareSftData,
  type SftExample,
} from '../../src/data/tokenize.js';
import { loadTokenizer, type Tokenizer } from '../../src/io/tokenizer.js';
import { TOY_VOCAB, writeToyTokenizer } from '../io/toy-tokenizer.js';
import { describeWithShared, readSharedJson, sharedPath } from '../shared.js';

const noTokenizer = () => Promise.reject(new Error('no tokenizer was needed'));
const id = (token: string): number => TOY_VOCAB.indexOf(token);
const [BOS, EOS, TURN] = [0, 1, 2];

let folder: string;
let options: PrepareOptions;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'keelgrad-'));
  await writeToyTokenizer(folder);
  options = { tokenizer: () => loadTokenizer(folder) };
});
afterEach(() => rm(folder, { recursive: true }));

const lists = ({ promptIds, chosenIds, rejectedIds }: PreferenceExample) => [
  [...promptIds],
  [...chosenIds],
  [...rejectedIds],
];

describe('plain text pairs', () => {
  const prepare = async (value: object) => preparePreferenceData([value], options);

  it('end in exactly one end token', async () => {
    const { examples, warnings } = await prepare({ prompt: 'c', chosen: 'a', rejected: 'b<eos>' });
    expect(lists(examples[0])).toEqual([[id('c')], [id('a'), EOS], [id('b'), EOS]]);
    expect(warnings).toEqual([]);
  });

  it('find the boundary in token space, and say so', async () => {
    const { examples, boundaryShifts, warnings } = await prepare({ prompt: 'ca', chosen: 'b', rejected: 'c' });
    expect(lists(examples[0])).toEqual([[id('c')], [id('ab'), EOS], [id('a'), id('c'), EOS]]);
    expect(boundaryShifts).toBe(1);
    expect(warnings).toEqual([expect.stringMatching(/1 records: .*first records:1, prompt end "a".*merge/)]);
  });

  it('may have other responses, which are asked for', async () => {
    const pair = { prompt: 'c', chosen: 'a', rejected: 'b', others: ['c', 'ab'] };
    const [example] = (await preparePreferenceData([pair], { ...options, others: true })).examples;
    expect(lists(example)).toEqual([[id('c')], [id('a'), EOS], [id('b'), EOS]]);
    expect(example.others?.map((ids) => [...ids])).toEqual([
      [id('c'), EOS],
      [id('ab'), EOS],
    ]);
    expect((await prepare(pair)).examples[0]).not.toHaveProperty('others');
    // 'ca' ends in a token that merges with what follows: the boundary is the one of all responses.
    const merging = { prompt: 'ca', chosen: 'c', rejected: 'a', others: ['b'] };
    const [moved] = (await preparePreferenceData([merging], { ...options, others: true })).examples;
    expect(lists(moved)).toEqual([[id('c')], [id('a'), id('c'), EOS], [id('a'), id('a'), EOS]]);
    expect([...moved.others![0]]).toEqual([id('ab'), EOS]);
  });

  it('begin with exactly one BOS where the tokenizer wants one', async () => {
    await writeToyTokenizer(folder, { bos: true });
    const [first] = (await prepare({ prompt: 'c', chosen: 'a', rejected: 'b' })).examples;
    expect(lists(first)).toEqual([
      [BOS, id('c')],
      [id('a'), EOS],
      [id('b'), EOS],
    ]);
    const [given] = (await prepare({ prompt: '<bos>c', chosen: 'a', rejected: 'b' })).examples;
    expect(lists(given)).toEqual(lists(first));
    const [none] = (await prepare({ prompt: '', chosen: 'a', rejected: 'b' })).examples;
    expect([...none.promptIds]).toEqual([BOS]);
  });

  it('may have no prompt', async () => {
    const [example] = (await prepare({ prompt: '', chosen: 'a', rejected: 'b' })).examples;
    expect(lists(example)).toEqual([[], [id('a'), EOS], [id('b'), EOS]]);
    const ids = { prompt_ids: [], chosen_ids: [1], rejected_ids: [2, 3] };
    await expect(prepare(ids)).rejects.toThrow(/records:1: chosen has no token to score/);
  });

  it('need an end token', async () => {
    await rm(join(folder, 'tokenizer_config.json'));
    await expect(prepare({ prompt: 'c', chosen: 'a', rejected: 'b' })).rejects.toThrow(/records:1: .*set eos_token in/);
  });
});

describe('conversations', () => {
  const user = { role: 'user', content: 'a' };
  const answer = (content: string) => ({ role: 'assistant', content });

  it('score everything behind the generation header, and no header after it', async () => {
    const pair = { prompt: [user], chosen: [answer('b')], rejected: [answer('c')] };
    const [example] = (await preparePreferenceData([pair], options)).examples;
    const u = 12;
    const prompt = [TURN, u, id(':'), id('a'), EOS, id('\n'), TURN, id('a'), id(':')];
    expect(lists(example)).toEqual([prompt, [id('b'), EOS, id('\n')], [id('c'), EOS, id('\n')]]);
  });

  it('learn the last turn only', async () => {
    const messages = [user, answer('b'), user, answer('c')];
    const [{ inputIds, completionMask, promptLength }] = (await prepareSftData([{ messages }], options)).examples;
    expect([...inputIds.subarray(promptLength)]).toEqual([id('c'), EOS, id('\n')]);
    expect(completionMask.reduce((sum, bit) => sum + bit)).toBe(3);
    expect(completionMask.indexOf(1)).toBe(promptLength);
  });

  it('need a template', async () => {
    await writeToyTokenizer(folder, { config: { eos_token: '<eos>' } });
    const pair = { prompt: [user], chosen: 'b', rejected: 'c' };
    await expect(preparePreferenceData([pair], options)).rejects.toThrow(/records:1: .*messages need a chat template/);
  });

  it('give the template tools, variables and the date', async () => {
    const chat_template =
      '{{ tools | length }}{{ x }}{{ date_string }}' + '{% for m in messages %}{{ m.content }}{% endfor %}';
    await writeToyTokenizer(folder, { config: { chat_template } });
    const record = { messages: [user, answer('b')], tools: [1, 2], chat_template_kwargs: { x: 'c' } };
    let seen = '';
    const tokenizer = async (): Promise<Tokenizer> => ({
      ...(await loadTokenizer(folder)),
      encode: async (text) => {
        seen = text;
        return [...text].map((character) => character.charCodeAt(0));
      },
    });
    await prepareSftData([record], { tokenizer, dateString: ':' });
    expect(seen).toMatch(/^2c:ab?$/);
  });
});

describe('SFT text', () => {
  it('is scored whole, but for the first token, which nothing predicts', async () => {
    const [example] = (await prepareSftData([{ text: 'abc' }], options)).examples;
    expect([...example.inputIds]).toEqual([id('ab'), id('c'), EOS]);
    expect([...example.completionMask]).toEqual([0, 1, 1]);
    await writeToyTokenizer(folder, { bos: true });
    const [withBos] = (await prepareSftData([{ text: 'abc<eos>' }], options)).examples;
    expect([...withBos.inputIds]).toEqual([BOS, id('ab'), id('c'), EOS]);
    expect([...withBos.completionMask]).toEqual([0, 1, 1, 1]);
  });

  it('scores the completion of a prompt', async () => {
    const [example] = (await prepareSftData([{ prompt: 'c', completion: ' a' }], options)).examples;
    expect([...example.inputIds]).toEqual([id('c'), id(' a'), EOS]);
    expect([...example.completionMask]).toEqual([0, 1, 1]);
  });
});

describe('token ids', () => {
  const pair = { prompt_ids: [5, 6, 7], chosen_ids: [1, 2, 3], rejected_ids: [4] };
  const ids: PrepareOptions = { tokenizer: noTokenizer };

  it('are used as they are, without a tokenizer', async () => {
    const records = [pair, { ...pair, ref_chosen_logps: -3, ref_rejected_logps: -4 }];
    const { examples } = await preparePreferenceData(records, ids);
    expect(lists(examples[0])).toEqual([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]);
    expect(examples[0]).not.toHaveProperty('refChosenLogp');
    expect(examples[1]).toMatchObject({ index: 1, line: 2, refChosenLogp: -3, refRejectedLogp: -4 });
  });

  it('have other responses checked and cut as the pair is', async () => {
    const given = { ...pair, others: [[8, 9, 10], [3]] };
    const { examples, truncated } = await preparePreferenceData([given], { ...ids, maxLength: 5, others: true });
    expect(examples[0].others?.map((other) => [...other])).toEqual([[8, 9], [3]]);
    expect(truncated).toBe(1);
    await expect(preparePreferenceData([given], { ...ids, vocabSize: 10, others: true })).rejects.toThrow(
      /records:1: token id 10 is outside/,
    );
    const unprompted = { prompt_ids: [], chosen_ids: [1, 2], rejected_ids: [2, 3], others: [[1, 2], [3]] };
    await expect(preparePreferenceData([unprompted], { ...ids, others: true })).rejects.toThrow(
      /records:1: others\[1\] has no token to score/,
    );
  });

  it('are cut each on its own, and dropped where the prompt fills everything', async () => {
    const records = [pair, { ...pair, prompt_ids: [1, 2, 3, 4, 5] }, { ...pair, prompt_ids: [1, 2, 3, 4] }];
    const { examples, dropped, truncated, warnings } = await preparePreferenceData(records, { ...ids, maxLength: 5 });
    expect(examples.map(({ index }) => index)).toEqual([0, 2]);
    expect(lists(examples[0])).toEqual([[5, 6, 7], [1, 2], [4]]);
    expect(lists(examples[1])).toEqual([[1, 2, 3, 4], [1], [4]]);
    expect({ dropped, truncated }).toEqual({ dropped: { promptTooLong: 1, noTarget: 0 }, truncated: 2 });
    expect(warnings).toEqual([
      'dropped 1 records whose prompt alone fills max length 5',
      'cut 2 records to max length 5',
    ]);
    await expect(preparePreferenceData([pair], { ...ids, maxLength: 3 })).rejects.toThrow(
      /no record is left.*dropped 1/,
    );
  });

  it('honour the completion mask', async () => {
    const records = [
      { input_ids: [1, 2, 3, 4], completion_mask: [1, 0, 1, 0] },
      { input_ids: [1, 2], completion_mask: [1, 0] },
      { input_ids: [1, 2, 3, 4], completion_mask: [0, 0, 0, 1] },
    ];
    const { examples, dropped, truncated } = await prepareSftData(records, { ...ids, maxLength: 3 });
    expect(examples).toHaveLength(1);
    expect(examples[0]).toMatchObject({ index: 0, promptLength: 2 });
    expect([...examples[0].completionMask]).toEqual([0, 0, 1]);
    expect({ dropped, truncated }).toEqual({ dropped: { promptTooLong: 1, noTarget: 1 }, truncated: 1 });
  });

  it('must lie in the vocabulary', async () => {
    await expect(preparePreferenceData([pair], { ...ids, vocabSize: 7 })).rejects.toThrow(
      /records:1: token id 7 is outside/,
    );
    await expect(prepareSftData([{ input_ids: [1, 9] }], { ...ids, vocabSize: 9 })).rejects.toThrow(/token id 9/);
  });

  it('come from files, whose place is in every message', async () => {
    const path = join(folder, 'd.jsonl');
    await writeFile(path, `${JSON.stringify(pair)}\n\n{"prompt_ids":[1],"chosen_ids":[],"rejected_ids":[1]}\n`);
    await expect(preparePreferenceData(path, ids)).rejects.toThrow(/d.jsonl:3: chosen_ids is empty/);
    await writeFile(path, '{"prompt":"a","chosen":"b","rejected":"c"}\n');
    const missing = { tokenizer: () => loadTokenizer(join(folder, 'none')) };
    await expect(preparePreferenceData(path, missing)).rejects.toThrow(/d.jsonl:1: .*text needs a tokenizer/);
  });
});

interface Batch {
  step: number;
  input_ids: number[][];
  attention_mask: number[][];
  labels?: number[][];
  completion_mask?: number[][];
}
const LOADERS = { tokenizer: noTokenizer };

/** What TRL fed, without the padding: per row the ids and which of them are scored. */
function rowsOf(batch: Batch): { ids: number[]; scored: number[] }[] {
  return batch.input_ids.map((row, i) => {
    const length = batch.attention_mask[i].reduce((sum, bit) => sum + bit, 0);
    const scored = batch.labels ? batch.labels[i].map((label) => (label === -100 ? 0 : 1)) : batch.completion_mask![i];
    return { ids: row.slice(0, length), scored: scored.slice(0, length) };
  });
}
const sftRow = ({ inputIds, completionMask }: SftExample) => ({ ids: [...inputIds], scored: [...completionMask] });
const pairRow = (prompt: Int32Array, response: Int32Array) => ({
  ids: [...prompt, ...response],
  scored: [...prompt.map(() => 0), ...response.map(() => 1)],
});

describeWithShared('trajectories of TRL', 'golden/training', () => {
  const folders: [string, string][] = [
    ['sft', 'data_sft.json'],
    ['sft_accum', 'data_sft.json'],
    ['sft_accum_remainder', 'data_sft.json'],
    ['dpo_sigmoid', 'data_preference.json'],
    ['dpo_accum_remainder', 'data_preference.json'],
    ['dpo_lora_zero', 'data_preference.json'],
    ['text_sft', 'data_text.json'],
    ['text_dpo', 'data_text.json'],
  ];
  it.each(folders)('%s: the same micro-batches, token by token', async (name, file) => {
    const config = readSharedJson('golden/training', name, 'config.json');
    const log = readSharedJson('golden/training', name, 'log.json');
    const isSft = config.trainer === 'SFTTrainer';
    const rows = readSharedJson('golden/training', file).slice(...(config.rows ?? [0]));
    const records =
      file === 'data_text.json' && isSft
        ? rows.map(({ prompt, chosen }: never) => ({ prompt, completion: chosen }))
        : rows;
    const text = { tokenizer: () => loadTokenizer(sharedPath('data/models/minimind2-small/hf')) };
    const prepareOptions = {
      ...(file === 'data_text.json' ? text : LOADERS),
      maxLength: config.max_length,
      vocabSize: 6400,
    };
    const sft = isSft ? (await prepareSftData(records, prepareOptions)).examples : [];
    const pairs = isSft ? [] : (await preparePreferenceData(records, prepareOptions)).examples;
    const plan = planSteps(isSft ? sft.length : pairs.length, {
      batchSize: config.per_device_train_batch_size,
      gradientAccumulationSteps: config.gradient_accumulation_steps,
      epochs: config.num_train_epochs,
      maxSteps: config.max_steps,
      shuffle: false,
    });
    const ours = [...plan].flatMap(({ step, microBatches }) =>
      microBatches.map((batch) => ({
        step: step + 1,
        rows: isSft
          ? batch.map((i) => sftRow(sft[i]))
          : [
              ...batch.map((i) => pairRow(pairs[i].promptIds, pairs[i].chosenIds)),
              ...batch.map((i) => pairRow(pairs[i].promptIds, pairs[i].rejectedIds)),
            ],
      })),
    );
    const batches: Batch[] = readSharedJson('golden/training', name, 'batches.json');
    expect(ours).toEqual(batches.map((batch) => ({ step: batch.step, rows: rowsOf(batch) })));
    expect(plan.totalSteps).toBe(config.total_steps);
    const steps = Array.isArray(log) ? log : log.steps;
    for (const [i, { epoch }] of [...plan].entries()) expect(steps[i].epoch).toBeCloseTo(epoch, 10);
  });

  it('text_dpo: the same rows kept, cut and dropped', async () => {
    const rows = readSharedJson('golden/training/data_text.json');
    const prepared = readSharedJson('golden/training/text_dpo/prepared.json');
    const tokens = readSharedJson('golden/training/text_tokens.json');
    const text = { tokenizer: () => loadTokenizer(sharedPath('data/models/minimind2-small/hf')) };
    const whole = await preparePreferenceData(rows, text);
    expect(whole.examples.map(lists)).toEqual(
      tokens.map((row: Record<string, number[]>) => [
        row.prompt_ids,
        row.prompt_chosen_ids.slice(row.prompt_ids.length),
        row.prompt_rejected_ids.slice(row.prompt_ids.length),
      ]),
    );
    const cut = await preparePreferenceData(rows, { ...text, maxLength: 128 });
    const keep = (row: Record<string, number[]>, key: string) => row[key].slice(0, 128 - row.prompt_ids.length);
    expect(cut.examples.map(lists)).toEqual(
      prepared.map((row: Record<string, number[]>) => [
        row.prompt_ids,
        keep(row, 'chosen_ids'),
        keep(row, 'rejected_ids'),
      ]),
    );
    expect(cut.dropped).toEqual({ promptTooLong: 1, noTarget: 0 });
    expect(cut.truncated).toBe(3);
    expect(whole.boundaryShifts).toBe(0);
  });

  it('text_sft: the same rows prepared', async () => {
    const rows = readSharedJson('golden/training/data_text.json');
    const prepared = readSharedJson('golden/training/text_sft/prepared.json');
    const text = { tokenizer: () => loadTokenizer(sharedPath('data/models/minimind2-small/hf')), maxLength: 128 };
    const records = rows.map(({ prompt, chosen }: never) => ({
      messages: [...prompt, { role: 'assistant', content: chosen }],
    }));
    const { examples, dropped, truncated } = await prepareSftData(records, text);
    expect(examples.map(sftRow)).toEqual(
      prepared.map(({ input_ids, labels }: { input_ids: number[]; labels: number[] }) => ({
        ids: input_ids,
        scored: labels.map((label) => (label === -100 ? 0 : 1)),
      })),
    );
    expect({ dropped, truncated }).toEqual({ dropped: { promptTooLong: 1, noTarget: 0 }, truncated: 3 });
  });
});

describeWithShared('real preference data', 'data/gsm8k', () => {
  it('tokenizes the GSM8K pairs with one end token each', async () => {
    const tokenizer = () => loadTokenizer(sharedPath('data/models/smollm2-135m-instruct'));
    const path = sharedPath('data/gsm8k/pairs_train.jsonl');
    const { examples, boundaryShifts } = await preparePreferenceData(path, { tokenizer, vocabSize: 49152 });
    expect(examples).toHaveLength(621);
    expect(boundaryShifts).toBe(0);
    for (const { chosenIds, rejectedIds } of examples) {
      for (const ids of [chosenIds, rejectedIds]) expect(ids.indexOf(2)).toBe(ids.length - 1);
    }
  });
});
