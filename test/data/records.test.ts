// The spellings of records, and what is said of records that have none of them.

import { describe, expect, it } from 'vitest';
import { recordsFrom } from '../../src/data/reader.js';
import { isLabelled, readLabelledRecord, readPreferenceRecord, readSftRecord } from '../../src/data/records.js';

const user = (content: string) => ({ role: 'user', content });
const assistant = (content: string) => ({ role: 'assistant', content });
const pair = (value: object) => readPreferenceRecord(recordsFrom([value], 'f.jsonl')[0]);
const labelled = (value: object) => readLabelledRecord(recordsFrom([value], 'f.jsonl')[0]);
const sft = (value: object) => readSftRecord(recordsFrom([value], 'f.jsonl')[0]);

describe('preference records', () => {
  it('are strings, with other fields beside them', () => {
    expect(pair({ id: 7, prompt: 'p', chosen: 'c', rejected: 'r' })).toMatchObject({
      ...{ kind: 'text', prompt: 'p', chosen: 'c', rejected: 'r', where: 'f.jsonl:1', line: 1, index: 0 },
    });
    expect(pair({ prompt: '', chosen: 'c', rejected: 'r' })).toMatchObject({ kind: 'text', prompt: '' });
  });

  it('are messages, with an explicit or an implicit prompt', () => {
    const expected = { kind: 'chat', prompt: [user('q')], chosen: [assistant('a')], rejected: [assistant('b')] };
    expect(pair({ prompt: [user('q')], chosen: [assistant('a')], rejected: [assistant('b')] })).toMatchObject(expected);
    expect(pair({ prompt: [user('q')], chosen: 'a', rejected: 'b' })).toMatchObject(expected);
    expect(pair({ prompt: [user('q')], chosen: assistant('a'), rejected: assistant('b') })).toMatchObject(expected);
    const implicit = { chosen: [user('q'), assistant('a')], rejected: [user('q'), assistant('b')] };
    expect(pair(implicit)).toMatchObject(expected);
    expect(pair({ prompt: null, ...implicit })).toMatchObject(expected);
    expect(pair({ prompt: 'q', ...implicit })).toMatchObject(expected);
  });

  it('leave something of both responses where they are equal', () => {
    const same = [user('q'), assistant('a')];
    expect(pair({ chosen: same, rejected: same })).toMatchObject({ prompt: [user('q')], chosen: [assistant('a')] });
  });

  it('share the start of strings', () => {
    const text = { chosen: 'The sky is blue.', rejected: 'The sky is green.' };
    expect(pair(text)).toMatchObject({ prompt: 'The sky is', chosen: ' blue.', rejected: ' green.' });
    expect(() => pair({ chosen: 'ab', rejected: 'abc' })).toThrow(/chosen \(behind the prompt.*is empty/);
  });

  it('are token ids, with reference log-probabilities', () => {
    const ids = { prompt_ids: [1], chosen_ids: [2, 3], rejected_ids: [4] };
    expect(pair(ids)).toMatchObject({ kind: 'ids', promptIds: [1], chosenIds: [2, 3], rejectedIds: [4] });
    expect(pair({ ...ids, prompt: 'x', chosen: 'y', rejected: 'z' }).kind).toBe('ids');
    const given = pair({ ...ids, ref_chosen_logps: -1.5, ref_rejected_logps: 0 });
    expect(given).toMatchObject({ refChosenLogp: -1.5, refRejectedLogp: 0 });
    expect(() => pair({ ...ids, ref_chosen_logps: 1 })).toThrow(/f.jsonl:1: expected both of ref_chosen_logps/);
    expect(() => pair({ ...ids, ref_chosen_logps: '1' })).toThrow(
      /ref_chosen_logps: expected a finite number, found "1"/,
    );
  });

  it('bring tools and variables of the template', () => {
    const chat = { prompt: [user('q')], chosen: 'a', rejected: 'b' };
    const read = pair({ ...chat, tools: '[{"name":"f"}]', chat_template_kwargs: { thinking: false } });
    expect(read).toMatchObject({ tools: [{ name: 'f' }], variables: { thinking: false } });
    expect(pair({ ...chat, tools: [1] })).toMatchObject({ tools: [1] });
    expect(() => pair({ ...chat, tools: '{' })).toThrow(/f.jsonl:1: tools: not valid JSON/);
    expect(() => pair({ ...chat, tools: 3 })).toThrow(/tools: expected a list, found 3/);
    expect(() => pair({ ...chat, chat_template_kwargs: [] })).toThrow(/chat_template_kwargs: expected an object/);
  });

  const refused: [object, RegExp][] = [
    [{ prompt: 'p', chosen: 'c' }, /f.jsonl:1: expected prompt, chosen and rejected.*found the fields prompt, chosen$/],
    [{ prompt: 'p', chosn: 'c', rejected: 'r' }, /found the fields prompt, chosn, rejected; did you mean "chosen"/],
    [{}, /found the fields \(none\)/],
    [{ prompt: 'p', chosen: '', rejected: 'r' }, /f.jsonl:1: chosen is empty; remove the record/],
    [{ prompt: 'p', chosen: 'c', rejected: [] }, /rejected is empty/],
    [{ prompt: [user('q')], chosen: [assistant('')], rejected: [assistant('b')] }, /chosen is empty/],
    [{ prompt: [user('q')], chosen: 'a', rejected: [assistant('b')] }, /two strings or two message lists/],
    [{ prompt: 3, chosen: 'c', rejected: 'r' }, /prompt: expected a string or a list of messages, found 3/],
    [{ prompt: [], chosen: 'c', rejected: 'r' }, /the prompt has no message/],
    [{ chosen: [assistant('a')], rejected: [assistant('b')] }, /the prompt has no message/],
    [
      { prompt: [{ role: 'user' }], chosen: 'c', rejected: 'r' },
      /prompt\[0\].content: expected a string, found nothing/,
    ],
    [{ prompt: ['x'], chosen: 'c', rejected: 'r' }, /prompt\[0\]: expected a message .* found "x"/],
    [{ prompt: [{ from: 'human', value: 'x' }], chosen: 'c', rejected: 'r' }, /rename "from" to "role"/],
    [{ prompt_ids: [1], chosen_ids: [], rejected_ids: [1] }, /chosen_ids is empty/],
    [{ prompt_ids: [1], chosen_ids: [1.5], rejected_ids: [1] }, /chosen_ids\[0\]: expected a token id, found 1.5/],
    [{ prompt_ids: [1], chosen_ids: [1] }, /rejected_ids: expected a list of token ids, found nothing/],
  ];
  it.each(refused)('refuses %j', (value, message) => {
    expect(() => pair(value)).toThrow(message);
  });

  it('bring other responses in the form of the pair, where they are asked for', () => {
    const read = (value: object) => readPreferenceRecord(recordsFrom([value], 'f.jsonl')[0], { others: true });
    const text = { prompt: 'p', chosen: 'c', rejected: 'r' };
    expect(read({ ...text, others: ['x', 'y'] })).toMatchObject({ ...text, others: ['x', 'y'] });
    expect(read({ ...text, others: [] })).toMatchObject({ others: [] });
    expect(read({ ...text, others: null })).not.toHaveProperty('others');
    expect(pair({ ...text, others: 'anything' })).not.toHaveProperty('others');
    const chat = { prompt: [user('q')], chosen: 'a', rejected: 'b', others: ['x', [assistant('y')]] };
    expect(read(chat)).toMatchObject({ others: [[assistant('x')], [assistant('y')]] });
    const ids = { prompt_ids: [1], chosen_ids: [2], rejected_ids: [3], others: [[4, 5], [6]] };
    expect(read(ids)).toMatchObject({ others: [[4, 5], [6]] });
    for (const [value, message] of [
      [{ ...text, others: 'x' }, /f.jsonl:1: others: expected a list of responses, found "x"/],
      [{ ...text, others: ['x', ''] }, /others\[1\] is empty/],
      [{ ...text, others: [3] }, /others\[0\]: expected a string or a list of messages, found 3/],
      [{ ...text, others: [[assistant('x')]] }, /others\[0\]: expected a string, as chosen and rejected are/],
      [{ ...ids, others: [[4], 'x'] }, /others\[1\]: expected a list of token ids, found "x"/],
      [{ ...ids, others: [[]] }, /others\[0\] is empty/],
      [{ chosen: 'p c', rejected: 'p r', others: ['x'] }, /others: expected a prompt that they follow, found none/],
    ] as const)
      expect(() => read(value)).toThrow(message);
  });

  it('may call tools instead of talking', () => {
    const call = { role: 'assistant', content: null, tool_calls: [{ name: 'f' }] };
    expect(pair({ prompt: [user('q')], chosen: [call], rejected: [assistant('b')] }).kind).toBe('chat');
  });
});

describe('SFT records', () => {
  it('are read in all forms', () => {
    expect(sft({ text: 'abc' })).toMatchObject({ kind: 'text', prompt: '', completion: 'abc' });
    expect(sft({ prompt: 'p', completion: 'c' })).toMatchObject({ kind: 'text', prompt: 'p', completion: 'c' });
    const chat = { kind: 'chat', prompt: [user('q')], completion: [assistant('a')] };
    expect(sft({ prompt: [user('q')], completion: 'a' })).toMatchObject(chat);
    expect(sft({ messages: [user('q'), assistant('a')] })).toMatchObject(chat);
    const turns = [user('q'), assistant('a'), user('r'), assistant('b')];
    expect(sft({ messages: turns })).toMatchObject({ prompt: turns.slice(0, 3), completion: [assistant('b')] });
    expect(sft({ prompt_ids: [1, 2], completion_ids: [3] })).toMatchObject({
      inputIds: [1, 2, 3],
      completionMask: [0, 0, 1],
    });
    expect(sft({ input_ids: [1, 2], completion_mask: [0, true] })).toMatchObject({ completionMask: [0, 1] });
    expect(sft({ input_ids: [1, 2] })).toMatchObject({ completionMask: [1, 1] });
  });

  const refused: [object, RegExp][] = [
    [{ prompt: 'p' }, /f.jsonl:1: expected text, messages, or prompt and completion.*found the fields prompt$/],
    [{ prompt: 'p', chosen: 'c', rejected: 'r' }, /found the fields prompt, chosen, rejected/],
    [{ mesages: [] }, /did you mean "messages"/],
    [{ text: '' }, /text is empty/],
    [{ text: 3 }, /text: expected a string, found 3/],
    [{ prompt: 'p', completion: '' }, /completion is empty/],
    [{ prompt: 'p', completion: [assistant('a')] }, /prompt is a string but completion is a message list/],
    [{ messages: [user('q')] }, /expected an assistant message at the end/],
    [{ messages: [] }, /expected an assistant message at the end, found nothing/],
    [{ messages: 'q' }, /messages: expected a list of messages, found "q"/],
    [{ messages: [assistant('a')] }, /the prompt has no message/],
    [{ messages: [user('q'), assistant('')] }, /the last message is empty/],
    [{ input_ids: [1, 2], completion_mask: [1] }, /completion_mask: expected 2 entries, one per input id, found 1/],
    [{ input_ids: [1], completion_mask: [2] }, /completion_mask: expected a list of 0 and 1/],
    [{ input_ids: [], completion_mask: [] }, /input_ids is empty/],
    [{ input_ids: [-1] }, /input_ids\[0\]: expected a token id, found -1/],
    [{ completion_ids: [1] }, /prompt_ids: expected a list of token ids/],
  ];
  it.each(refused)('refuses %j', (value, message) => {
    expect(() => sft(value)).toThrow(message);
  });
});

describe('labelled records', () => {
  it('are completions with a label: strings, messages or token ids', () => {
    expect(labelled({ prompt: 'p', completion: 'c', label: true })).toMatchObject({
      ...{ kind: 'text', prompt: 'p', completion: 'c', desirable: true, where: 'f.jsonl:1' },
    });
    expect(labelled({ prompt: [user('q')], completion: [assistant('a')], label: false })).toMatchObject({
      ...{ kind: 'chat', prompt: [user('q')], completion: [assistant('a')], desirable: false },
    });
    expect(labelled({ prompt_ids: [1, 2], completion_ids: [3], label: false })).toMatchObject({
      ...{ kind: 'ids', inputIds: [1, 2, 3], completionMask: [0, 0, 1], desirable: false },
    });
  });

  it('are no pairs, and pairs are none of them', () => {
    const is = (value: object) => isLabelled(recordsFrom([value])[0]);
    expect(is({ prompt: 'p', completion: 'c', label: false })).toBe(true);
    expect(is({ prompt: 'p', completion: 'c' })).toBe(false);
    expect(is({ prompt: 'p', chosen: 'c', rejected: 'r', completion: 'c', label: 1 })).toBe(false);
    expect(() => pair({ prompt: 'p', completion: 'c', label: true })).toThrow(
      /f.jsonl:1: expected a pair .*, found a completion with its label/,
    );
    expect(() => labelled({ prompt: 'p', chosen: 'c', rejected: 'r' })).toThrow(
      /expected prompt, completion and label/,
    );
    expect(() => labelled({ prompt: 'p', completion: 'c', label: 'yes' })).toThrow(
      /label: expected true or false, found "yes"/,
    );
    expect(() => labelled({ prompt: 'p', completion: '', label: true })).toThrow(/completion is empty/);
  });
});
