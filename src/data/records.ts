// What a record says: preference and SFT records in all their spellings, brought to three forms (ids, text, chat).
// Never tokenizes; every complaint names the record's `file:line` and the field.

import { isDeepStrictEqual } from 'node:util';
import { didYouMean, KeelgradError, show } from '../errors.js';
import type { ChatMessage } from '../io/chat-template.js';
import { isRecord } from '../io/fields.js';
import { parseJson } from '../io/json-file.js';
import type { RawRecord } from './reader.js';

/** What the chat template is given beside the messages. */
export interface ChatContext {
  readonly tools?: readonly unknown[];
  readonly variables?: Readonly<Record<string, unknown>>;
}

interface Located {
  readonly index: number;
  readonly line: number;
  readonly where: string;
}

interface IdPair {
  readonly kind: 'ids';
  readonly promptIds: readonly number[];
  readonly chosenIds: readonly number[];
  readonly rejectedIds: readonly number[];
  readonly others?: readonly (readonly number[])[];
}
interface TextPair {
  readonly kind: 'text';
  readonly prompt: string;
  readonly chosen: string;
  readonly rejected: string;
  readonly others?: readonly string[];
}
interface ChatPair extends ChatContext {
  readonly kind: 'chat';
  readonly prompt: readonly ChatMessage[];
  readonly chosen: readonly ChatMessage[];
  readonly rejected: readonly ChatMessage[];
  readonly others?: readonly (readonly ChatMessage[])[];
}
export type PreferenceRecord = Located & {
  readonly refChosenLogp?: number;
  readonly refRejectedLogp?: number;
  readonly offset?: number;
} & (IdPair | TextPair | ChatPair);

interface MaskedIds {
  readonly kind: 'ids';
  readonly inputIds: readonly number[];
  readonly completionMask: readonly (0 | 1)[];
}
interface TextCompletion {
  readonly kind: 'text';
  readonly prompt: string;
  readonly completion: string;
}
interface ChatCompletion extends ChatContext {
  readonly kind: 'chat';
  readonly prompt: readonly ChatMessage[];
  readonly completion: readonly ChatMessage[];
}
export type SftRecord = Located & (MaskedIds | TextCompletion | ChatCompletion);
/** A completion labelled desirable or not. */
export type LabelledRecord = SftRecord & { readonly desirable: boolean };

type Content = string | readonly ChatMessage[];

/** Reads of one record's fields; `null` counts as absent, as columns of other records leave it behind. */
class RecordReader {
  readonly record: RawRecord;

  constructor(record: RawRecord) {
    this.record = record;
  }

  has(name: string): boolean {
    return this.record.value[name] !== undefined && this.record.value[name] !== null;
  }

  fail(what: string): KeelgradError {
    return new KeelgradError(`${this.record.where}: ${what}`);
  }

  expected(name: string, expected: string): KeelgradError {
    return this.fail(`${name}: expected ${expected}, found ${show(this.record.value[name])}`);
  }

  ids(name: string): number[] {
    const value = this.record.value[name];
    if (!Array.isArray(value)) throw this.expected(name, 'a list of token ids');
    const bad = value.findIndex((id) => !Number.isSafeInteger(id) || id < 0);
    if (bad >= 0) throw this.fail(`${name}[${bad}]: expected a token id, found ${show(value[bad])}`);
    return value;
  }

  completionIds(name: string): number[] {
    const ids = this.ids(name);
    if (ids.length === 0) throw this.fail(`${name} is empty; remove the record or give it a response`);
    return ids;
  }

  private messages(name: string, value: readonly unknown[]): ChatMessage[] {
    for (const [i, message] of value.entries()) {
      const hint = isRecord(message) && 'from' in message ? '; rename "from" to "role" and "value" to "content"' : '';
      if (!isRecord(message) || typeof message.role !== 'string') {
        throw this.fail(`${name}[${i}]: expected a message {"role", "content"}, found ${show(message)}${hint}`);
      }
      const { content } = message;
      const callsTools = (content === null || content === undefined) && Array.isArray(message.tool_calls);
      if (typeof content !== 'string' && !Array.isArray(content) && !callsTools) {
        throw this.fail(`${name}[${i}].content: expected a string, found ${show(content)}`);
      }
    }
    return value as ChatMessage[];
  }

  content(name: string): Content {
    const value = this.record.value[name];
    if (typeof value === 'string') return value;
    if (Array.isArray(value)) return this.messages(name, value);
    if (isRecord(value)) return this.messages(name, [value]);
    throw this.expected(name, 'a string or a list of messages');
  }

  number(name: string): number | undefined {
    if (!this.has(name)) return undefined;
    const value = this.record.value[name];
    if (typeof value !== 'number' || !Number.isFinite(value)) throw this.expected(name, 'a finite number');
    return value;
  }

  /** `tools` (a list, or JSON text of one) and `chat_template_kwargs`. */
  context(): ChatContext {
    const { tools: rawTools, chat_template_kwargs: variables } = this.record.value;
    const tools = typeof rawTools === 'string' ? parseJson(rawTools, `${this.record.where}: tools`) : rawTools;
    if (tools !== undefined && tools !== null && !Array.isArray(tools)) throw this.expected('tools', 'a list');
    if (this.has('chat_template_kwargs') && !isRecord(variables)) {
      throw this.expected('chat_template_kwargs', 'an object');
    }
    return { tools: tools ?? undefined, variables: (variables as Record<string, unknown>) ?? undefined };
  }

  /** Refuses a response in which nothing was said. */
  checkResponse(name: string, response: Content): void {
    const isSilent = ({ content, tool_calls: calls }: ChatMessage) =>
      (content === '' || (Array.isArray(content) && content.length === 0)) && !Array.isArray(calls);
    const empty = typeof response === 'string' ? response === '' : response.length === 0 || response.every(isSilent);
    if (empty) throw this.fail(`${name} is empty; remove the record or give it a response`);
  }

  checkPrompt(prompt: readonly ChatMessage[]): void {
    if (prompt.length === 0) throw this.fail('the prompt has no message; a conversation needs one before the response');
  }

  /** For records of none of the known forms. */
  unknownForm(forms: string, names: readonly string[]): KeelgradError {
    const keys = Object.keys(this.record.value);
    const near = keys.map((key) => (names.includes(key) ? '' : didYouMean(key, names))).find((hint) => hint !== '');
    return this.fail(`expected ${forms}, found the fields ${keys.join(', ') || '(none)'}${near ?? ''}`);
  }
}

const asMessages = (response: Content): readonly ChatMessage[] =>
  typeof response === 'string' ? [{ role: 'assistant', content: response }] : response;

const located = ({ index, line, where }: RawRecord): Located => ({ index, line, where });

const PAIR_FORMS = 'prompt, chosen and rejected (strings or messages), or prompt_ids, chosen_ids and rejected_ids';
const PAIR_FIELDS = ['prompt', 'chosen', 'rejected', 'prompt_ids', 'chosen_ids', 'rejected_ids'];

function readIdPair(reader: RecordReader): IdPair {
  const [promptIds, chosenIds, rejectedIds] = [
    reader.ids('prompt_ids'),
    reader.completionIds('chosen_ids'),
    reader.completionIds('rejected_ids'),
  ];
  return { kind: 'ids', promptIds, chosenIds, rejectedIds };
}

/** Length of the longest common prefix that leaves something of both: TRL's implicit prompt. */
function commonStart(chosen: Content, rejected: Content): number {
  const limit = Math.min(chosen.length, rejected.length);
  let length = 0;
  while (length < limit && isDeepStrictEqual(chosen[length], rejected[length])) length++;
  if (typeof chosen !== 'string') return Math.min(length, limit - 1);
  return length > 0 && chosen[length - 1] === ' ' ? length - 1 : length; // the space belongs to the response
}

function readContentPair(reader: RecordReader): TextPair | ChatPair {
  const [chosen, rejected] = [reader.content('chosen'), reader.content('rejected')];
  reader.checkResponse('chosen', chosen);
  reader.checkResponse('rejected', rejected);
  const prompt = reader.has('prompt') ? reader.content('prompt') : undefined;
  if (typeof chosen === 'string' && typeof rejected === 'string')
    return readStringPair(reader, prompt, chosen, rejected);
  if (typeof chosen === 'string' || typeof rejected === 'string') {
    throw reader.fail('chosen and rejected: expected two strings or two message lists, found one of each');
  }
  // A string beside conversations repeats their first message (a habit of published data sets).
  const explicit = typeof prompt === 'string' ? undefined : prompt;
  const length = explicit === undefined ? commonStart(chosen, rejected) : 0;
  const shared = explicit ?? chosen.slice(0, length);
  reader.checkPrompt(shared);
  const responses = { chosen: chosen.slice(length), rejected: rejected.slice(length) };
  reader.checkResponse('chosen', responses.chosen);
  reader.checkResponse('rejected', responses.rejected);
  return { kind: 'chat', prompt: shared, ...responses, ...reader.context() };
}

function readStringPair(
  reader: RecordReader,
  prompt: Content | undefined,
  chosen: string,
  rejected: string,
): TextPair | ChatPair {
  if (prompt === undefined) {
    const length = commonStart(chosen, rejected);
    const pair = { prompt: chosen.slice(0, length), chosen: chosen.slice(length), rejected: rejected.slice(length) };
    reader.checkResponse('chosen (behind the prompt it shares with rejected)', pair.chosen);
    reader.checkResponse('rejected (behind the prompt it shares with chosen)', pair.rejected);
    return { kind: 'text', ...pair };
  }
  if (typeof prompt === 'string') return { kind: 'text', prompt, chosen, rejected };
  reader.checkPrompt(prompt);
  const responses = { chosen: asMessages(chosen), rejected: asMessages(rejected) };
  return { kind: 'chat', prompt, ...responses, ...reader.context() };
}

/** A pair with the responses of the field `others`: each in the pair's form, each behind the prompt. */
function withOthers(reader: RecordReader, pair: IdPair | TextPair | ChatPair): IdPair | TextPair | ChatPair {
  if (!reader.has('others')) return pair;
  const { others } = reader.record.value;
  if (!Array.isArray(others)) throw reader.expected('others', 'a list of responses');
  if (pair.kind !== 'ids' && !reader.has('prompt'))
    throw reader.fail('others: expected a prompt that they follow, found none; add the field prompt');
  const names = others.map((_, i) => `others[${i}]`);
  const value = Object.fromEntries(names.map((name, i) => [name, others[i]]));
  const each = new RecordReader({ ...reader.record, value });
  if (pair.kind === 'ids') return { ...pair, others: names.map((name) => each.completionIds(name)) };
  const contents = names.map((name) => each.content(name));
  for (const [i, content] of contents.entries()) each.checkResponse(names[i], content);
  if (pair.kind === 'chat') return { ...pair, others: contents.map(asMessages) };
  return {
    ...pair,
    others: contents.map((content, i) => {
      if (typeof content !== 'string') throw each.expected(names[i], 'a string, as chosen and rejected are');
      return content;
    }),
  };
}

/** Reads one preference record; `others`, further responses to its prompt, only where they are asked for. */
export function readPreferenceRecord(record: RawRecord, options: { others?: boolean } = {}): PreferenceRecord {
  const reader = new RecordReader(record);
  if (isLabelled(record)) throw reader.fail('expected a pair (chosen and rejected), found a completion with its label');
  const byIds = ['prompt_ids', 'chosen_ids', 'rejected_ids'].some((name) => reader.has(name));
  if (!byIds && !(reader.has('chosen') && reader.has('rejected'))) throw reader.unknownForm(PAIR_FORMS, PAIR_FIELDS);
  const [refChosenLogp, refRejectedLogp] = [reader.number('ref_chosen_logps'), reader.number('ref_rejected_logps')];
  if ((refChosenLogp === undefined) !== (refRejectedLogp === undefined)) {
    throw reader.fail('expected both of ref_chosen_logps and ref_rejected_logps, or neither');
  }
  const pair = byIds ? readIdPair(reader) : readContentPair(reader);
  const content = options.others ? withOthers(reader, pair) : pair;
  return { ...located(record), refChosenLogp, refRejectedLogp, offset: reader.number('offset'), ...content };
}

const SFT_FORMS =
  'text, messages, or prompt and completion; or token ids: input_ids with completion_mask, or prompt_ids with completion_ids';
const SFT_FIELDS = [
  'text',
  'messages',
  'prompt',
  'completion',
  'input_ids',
  'completion_mask',
  'prompt_ids',
  'completion_ids',
];

function readMaskedIds(reader: RecordReader): MaskedIds {
  const inputIds = reader.completionIds('input_ids');
  if (!reader.has('completion_mask')) return { kind: 'ids', inputIds, completionMask: inputIds.map(() => 1) };
  const mask = reader.record.value.completion_mask;
  const isBit = (bit: unknown) => bit === 0 || bit === 1 || typeof bit === 'boolean';
  if (!Array.isArray(mask) || !mask.every(isBit)) throw reader.expected('completion_mask', 'a list of 0 and 1');
  if (mask.length !== inputIds.length) {
    throw reader.fail(`completion_mask: expected ${inputIds.length} entries, one per input id, found ${mask.length}`);
  }
  return { kind: 'ids', inputIds, completionMask: mask.map((bit) => (bit ? 1 : 0)) };
}

function readSplitIds(reader: RecordReader): MaskedIds {
  const [prompt, completion] = [reader.ids('prompt_ids'), reader.completionIds('completion_ids')];
  const completionMask = [...prompt.map(() => 0 as const), ...completion.map(() => 1 as const)];
  return { kind: 'ids', inputIds: [...prompt, ...completion], completionMask };
}

function readPromptCompletion(reader: RecordReader): TextCompletion | ChatCompletion {
  const [prompt, completion] = [reader.content('prompt'), reader.content('completion')];
  reader.checkResponse('completion', completion);
  if (typeof prompt === 'string' && typeof completion === 'string') return { kind: 'text', prompt, completion };
  if (typeof prompt === 'string') {
    throw reader.fail('prompt is a string but completion is a message list; give both in the same form');
  }
  reader.checkPrompt(prompt);
  return { kind: 'chat', prompt, completion: asMessages(completion), ...reader.context() };
}

/** Of a conversation, the last assistant turn is what is learned. */
function readConversation(reader: RecordReader): ChatCompletion {
  const messages = reader.content('messages');
  const last = messages.at(-1);
  if (typeof messages === 'string') throw reader.expected('messages', 'a list of messages');
  if (last === undefined || typeof last === 'string' || last.role !== 'assistant') {
    throw reader.fail(`messages: expected an assistant message at the end, found ${show(last)}`);
  }
  reader.checkResponse('the last message', [last]);
  reader.checkPrompt(messages.slice(0, -1));
  return { kind: 'chat', prompt: messages.slice(0, -1), completion: [last], ...reader.context() };
}

function readText(reader: RecordReader): TextCompletion {
  const { text } = reader.record.value;
  if (typeof text !== 'string') throw reader.expected('text', 'a string');
  reader.checkResponse('text', text);
  return { kind: 'text', prompt: '', completion: text };
}

/** Reads one SFT record; where a record has several forms, token ids win, then prompt + completion, then messages. */
export function readSftRecord(record: RawRecord): SftRecord {
  const reader = new RecordReader(record);
  const forms: [boolean, (reader: RecordReader) => MaskedIds | TextCompletion | ChatCompletion][] = [
    [reader.has('input_ids'), readMaskedIds],
    [reader.has('prompt_ids') || reader.has('completion_ids'), readSplitIds],
    [reader.has('prompt') && reader.has('completion'), readPromptCompletion],
    [reader.has('messages'), readConversation],
    [reader.has('text'), readText],
  ];
  const read = forms.find(([applies]) => applies)?.[1];
  if (!read) throw reader.unknownForm(SFT_FORMS, SFT_FIELDS);
  return { ...located(record), ...read(reader) };
}

const LABELLED_FORMS =
  'prompt, completion and label (true or false) as in the records before; or prompt_ids, completion_ids and label';
const LABELLED_FIELDS = ['prompt', 'completion', 'label', 'prompt_ids', 'completion_ids'];

/** Whether a record is a completion with a label, and no pair. */
export function isLabelled(record: RawRecord): boolean {
  const reader = new RecordReader(record);
  const completes = reader.has('completion') || reader.has('completion_ids');
  return reader.has('label') && completes && !reader.has('chosen') && !reader.has('chosen_ids');
}

/** Reads one completion with its label, as TRL's unpaired preference records have it. */
export function readLabelledRecord(record: RawRecord): LabelledRecord {
  const reader = new RecordReader(record);
  if (!isLabelled(record)) throw reader.unknownForm(LABELLED_FORMS, LABELLED_FIELDS);
  const { label } = record.value;
  if (typeof label !== 'boolean') throw reader.expected('label', 'true or false');
  const read = reader.has('completion_ids') ? readSplitIds : readPromptCompletion;
  return { ...located(record), desirable: label, ...read(reader) };
}
