// From records to token ids, as TRL does it: where a completion begins, what is scored, what is cut, what is dropped.
// Never pads, never batches, and never drops or cuts without counting.

import { KeelgradError, show } from '../errors.js';
import type { ChatMessage } from '../io/chat-template.js';
import type { Tokenizer } from '../io/tokenizer.js';
import { type RawRecord, readRecords, recordsFrom } from './reader.js';
import {
  type ChatContext,
  isLabelled,
  type PreferenceRecord,
  readLabelledRecord,
  readPreferenceRecord,
  readSftRecord,
  type SftRecord,
} from './records.js';

/**
 * One preference pair. Both sequences are the prompt followed by the response; position t predicts token t + 1, so with
 * an empty prompt (no BOS, responses that differ from their first token on) a response's first token is not scored.
 */
export interface PreferenceExample {
  /** Position and line in the file. */
  readonly index: number;
  readonly line: number;
  readonly promptIds: Int32Array;
  readonly chosenIds: Int32Array;
  readonly rejectedIds: Int32Array;
  /** Reference log-probabilities that the record brought along: sums over the response. */
  readonly refChosenLogp?: number;
  readonly refRejectedLogp?: number;
  /** By how much the chosen response is to be preferred, where the record says: ODPO's. */
  readonly offset?: number;
  /** Further responses to the prompt, where they were asked for and the record has some. */
  readonly others?: readonly Int32Array[];
}

/** One SFT sequence. `completionMask[t]` is 1 where token t is scored; `completionMask[0]` is always 0. */
export interface SftExample {
  readonly index: number;
  readonly line: number;
  readonly inputIds: Int32Array;
  readonly completionMask: Uint8Array;
  /** Position of the first scored token. */
  readonly promptLength: number;
}

/** One response labelled desirable or not; its prompt is `inputIds` up to `promptLength`. */
export interface LabelledExample extends SftExample {
  readonly desirable: boolean;
}

export interface PreparedData<Example> {
  readonly examples: readonly Example[];
  /** Records left out: prompts that alone fill the maximum length, and SFT records without any scored token. */
  readonly dropped: { readonly promptTooLong: number; readonly noTarget: number };
  /** Examples of which at least one sequence was cut to the maximum length. */
  readonly truncated: number;
  /** Records whose tokenized prompt is no prefix of prompt + response. */
  readonly boundaryShifts: number;
  readonly warnings: readonly string[];
}

export interface PrepareOptions {
  /** Called once, at the first record that is not token ids already; throws where the model has no tokenizer. */
  readonly tokenizer: () => Promise<Tokenizer>;
  /** Longest sequence, prompt included; each one keeps its start. No limit by default. */
  readonly maxLength?: number;
  /** Rows of the model's embedding: ids beyond are errors. */
  readonly vocabSize?: number;
  /** Whether to read preference records' field `others`: training has no part for it, whatever stands there. */
  readonly others?: boolean;
  /** For chat templates that print the date. */
  readonly dateString?: string;
  /** Name of `records` in messages, where they do not come from a file. */
  readonly source?: string;
}

/** A prompt and what may follow it, as ids: `prompt` is what all of the `responses` share. */
interface Split {
  prompt: number[];
  responses: number[][];
  /** The end of the tokenized prompt that is not in the sequences, where prompt and response merged. */
  lostPrompt: number[];
}

function commonPrefixLength(a: readonly number[], b: readonly number[]): number {
  const limit = Math.min(a.length, b.length);
  let length = 0;
  while (length < limit && a[length] === b[length]) length++;
  return length;
}

/** The boundary is found in token space: a response begins where prompt and prompt + response first differ. */
function split(promptIds: number[], wholes: readonly number[][]): Split {
  const length = Math.min(...wholes.map((whole) => commonPrefixLength(promptIds, whole)));
  return {
    prompt: promptIds.slice(0, length),
    responses: wholes.map((whole) => whole.slice(length)),
    lostPrompt: promptIds.slice(length),
  };
}

/** Plain text: exactly one BOS where the tokenizer wants one, and nothing at the end. */
async function encodeText(tokenizer: Tokenizer, text: string): Promise<number[]> {
  const ids = await tokenizer.encode(text);
  const hasPrefix = tokenizer.textPrefix.every((id, i) => ids[i] === id);
  return hasPrefix ? ids : [...tokenizer.textPrefix, ...ids];
}

function withEos(tokenizer: Tokenizer, text: string): string {
  const { eosToken } = tokenizer;
  if (!eosToken) {
    throw new KeelgradError(
      `${tokenizer.folder}: plain text needs an end token; set eos_token in tokenizer_config.json`,
    );
  }
  return text.endsWith(eosToken.text) ? text : text + eosToken.text;
}

async function splitText(tokenizer: Tokenizer, prompt: string, responses: readonly string[]): Promise<Split> {
  const wholes = responses.map((response) => encodeText(tokenizer, prompt + withEos(tokenizer, response)));
  return split(await encodeText(tokenizer, prompt), await Promise.all(wholes));
}

async function splitChat(
  tokenizer: Tokenizer,
  prompt: readonly ChatMessage[],
  responses: readonly (readonly ChatMessage[])[],
  context: ChatContext & { dateString?: string },
): Promise<Split> {
  const { chatTemplate, folder } = tokenizer;
  if (!chatTemplate) {
    const remedy = 'add chat_template to tokenizer_config.json, or give prompts and responses as strings';
    throw new KeelgradError(`${folder}: messages need a chat template, and the tokenizer has none; ${remedy}`);
  }
  const { tools, variables, dateString } = context;
  const render = async (messages: readonly ChatMessage[], addGenerationPrompt: boolean) =>
    tokenizer.encode(await chatTemplate.render(messages, { addGenerationPrompt, tools, variables, dateString }));
  const wholes = responses.map((response) => render([...prompt, ...response], false));
  return split(await render(prompt, true), await Promise.all(wholes));
}

/** Counters and occurrences, shared by both kinds of data. */
class Report {
  readonly options: PrepareOptions;
  promptTooLong = 0;
  noTarget = 0;
  truncated = 0;
  private readonly shifts: { index: number; where: string; lostPrompt: number[] }[] = [];
  private tokenizer: Promise<Tokenizer> | undefined;

  constructor(options: PrepareOptions) {
    this.options = options;
  }

  getTokenizer(): Promise<Tokenizer> {
    this.tokenizer ??= this.options.tokenizer();
    return this.tokenizer;
  }

  noteShift({ index, where }: { index: number; where: string }, { lostPrompt }: Split): void {
    if (lostPrompt.length > 0) this.shifts.push({ index, where, lostPrompt });
  }

  checkVocabulary(where: string, ids: ArrayLike<number>): void {
    const { vocabSize = Number.POSITIVE_INFINITY } = this.options;
    for (let i = 0; i < ids.length; i++) {
      if (ids[i] < vocabSize) continue;
      const remedy = 'the tokenizer or the ids belong to another model';
      throw new KeelgradError(
        `${where}: token id ${ids[i]} is outside of the model's vocabulary of ${vocabSize}; ${remedy}`,
      );
    }
  }

  private async describeShifts(): Promise<string> {
    const first = this.shifts.reduce((a, b) => (a.index < b.index ? a : b));
    const lost = await (await this.getTokenizer()).decode(first.lostPrompt);
    const cause = 'tokens merge across the boundary, or the template renders the prompt differently when alone';
    const what = `the tokenized prompt is no prefix of prompt + response (first ${first.where}, prompt end ${show(lost)})`;
    return `${this.shifts.length} records: ${what}: ${cause}; the response is scored from where they differ`;
  }

  async finish<Example>(examples: readonly Example[]): Promise<PreparedData<Example>> {
    const { promptTooLong, noTarget, truncated, shifts } = this;
    const limit = `max length ${this.options.maxLength}`;
    const warnings: string[] = [];
    if (promptTooLong > 0) warnings.push(`dropped ${promptTooLong} records whose prompt alone fills ${limit}`);
    if (noTarget > 0) warnings.push(`dropped ${noTarget} records without any token to learn`);
    if (truncated > 0) warnings.push(`cut ${truncated} records to ${limit}`);
    if (shifts.length > 0) warnings.push(await this.describeShifts());
    return { examples, dropped: { promptTooLong, noTarget }, truncated, boundaryShifts: shifts.length, warnings };
  }
}

/** Puts the record's place before a message that does not know it. */
async function located<T>(where: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    if (!(error instanceof KeelgradError) || error.message.startsWith(where)) throw error;
    throw new KeelgradError(`${where}: ${error.message}`, { cause: error });
  }
}

/** Responses in their order: chosen, rejected, then the others. */
async function splitPair(report: Report, record: PreferenceRecord): Promise<Split> {
  if (record.kind === 'ids') {
    return {
      prompt: [...record.promptIds],
      responses: [record.chosenIds, record.rejectedIds, ...(record.others ?? [])].map((ids) => [...ids]),
      lostPrompt: [],
    };
  }
  const tokenizer = await report.getTokenizer();
  if (record.kind === 'text')
    return splitText(tokenizer, record.prompt, [record.chosen, record.rejected, ...(record.others ?? [])]);
  const context = { tools: record.tools, variables: record.variables, dateString: report.options.dateString };
  return splitChat(tokenizer, record.prompt, [record.chosen, record.rejected, ...(record.others ?? [])], context);
}

async function preparePair(report: Report, record: PreferenceRecord): Promise<PreferenceExample | undefined> {
  const { where, index, line } = record;
  const pair = await splitPair(report, record);
  const { prompt, responses } = pair;
  report.noteShift(record, pair);
  for (const ids of [prompt, ...responses]) report.checkVocabulary(where, ids);
  const unscored = prompt.length === 0 ? 1 : 0;
  const empty = responses.findIndex((ids) => ids.length <= unscored);
  if (empty >= 0) {
    const name = ['chosen', 'rejected'][empty] ?? `others[${empty - 2}]`;
    throw new KeelgradError(`${where}: ${name} has no token to score; remove the record or give it a response`);
  }
  const { maxLength = Number.POSITIVE_INFINITY } = report.options;
  const room = maxLength - prompt.length;
  if (room <= unscored) {
    report.promptTooLong++;
    return undefined;
  }
  if (responses.some((ids) => ids.length > room)) report.truncated++;
  const [chosenIds, rejectedIds, ...others] = responses.map((ids) => Int32Array.from(ids.slice(0, room)));
  const { refChosenLogp, refRejectedLogp, offset } = record;
  const given = {
    ...(refChosenLogp !== undefined && { refChosenLogp, refRejectedLogp }),
    ...(offset !== undefined && { offset }),
    ...(record.others && { others }),
  };
  return { index, line, promptIds: Int32Array.from(prompt), chosenIds, rejectedIds, ...given };
}

/** Ids and mask of an SFT record before truncation. */
async function maskedIds(report: Report, record: SftRecord): Promise<{ inputIds: Int32Array; mask: Uint8Array }> {
  if (record.kind === 'ids') {
    return { inputIds: Int32Array.from(record.inputIds), mask: Uint8Array.from(record.completionMask) };
  }
  const tokenizer = await report.getTokenizer();
  const context = record.kind === 'chat' ? { tools: record.tools, variables: record.variables } : {};
  const parts =
    record.kind === 'text'
      ? await splitText(tokenizer, record.prompt, [record.completion])
      : await splitChat(tokenizer, record.prompt, [record.completion], {
          ...context,
          dateString: report.options.dateString,
        });
  report.noteShift(record, parts);
  const inputIds = Int32Array.from([...parts.prompt, ...parts.responses[0]]);
  const mask = new Uint8Array(inputIds.length).fill(1, parts.prompt.length);
  return { inputIds, mask };
}

async function prepareCompletion(report: Report, record: SftRecord): Promise<SftExample | undefined> {
  const { inputIds, mask } = await maskedIds(report, record);
  report.checkVocabulary(record.where, inputIds);
  mask[0] = 0; // nothing predicts the first token
  const { maxLength = Number.POSITIVE_INFINITY } = report.options;
  const promptLength = mask.indexOf(1);
  if (promptLength < 0 || promptLength >= maxLength) {
    report[promptLength < 0 ? 'noTarget' : 'promptTooLong']++;
    return undefined;
  }
  if (inputIds.length > maxLength) report.truncated++;
  const kept = { inputIds: inputIds.slice(0, maxLength), completionMask: mask.slice(0, maxLength), promptLength };
  return { index: record.index, line: record.line, ...kept };
}

async function prepareLabelled(report: Report, raw: RawRecord): Promise<LabelledExample | undefined> {
  const record = readLabelledRecord(raw);
  const example = await prepareCompletion(report, record);
  return example && { ...example, desirable: record.desirable };
}

/** The tokenizer works on its own threads; this many records are given to it at a time. */
const RECORDS_AT_ONCE = 64;

type Prepare<Example> = (report: Report, record: RawRecord) => Promise<Example | undefined>;

async function prepareAll<Example>(
  data: string | readonly object[],
  options: PrepareOptions,
  preparation: (first: RawRecord | undefined) => Prepare<Example>,
): Promise<PreparedData<Example>> {
  const source = typeof data === 'string' ? data : (options.source ?? 'records');
  const records = typeof data === 'string' ? await readRecords(data) : recordsFrom(data, source);
  const prepare = preparation(records[0]);
  const report = new Report(options);
  const examples: Example[] = [];
  for (let begin = 0; begin < records.length; begin += RECORDS_AT_ONCE) {
    const chunk = records.slice(begin, begin + RECORDS_AT_ONCE);
    const prepared = chunk.map((record) => located(record.where, () => prepare(report, record)));
    for (const outcome of await Promise.allSettled(prepared)) {
      if (outcome.status === 'rejected') throw outcome.reason; // the first one in the file, whichever came first
      if (outcome.value !== undefined) examples.push(outcome.value);
    }
  }
  const result = await report.finish(examples);
  if (examples.length > 0) return result;
  throw new KeelgradError(
    `${source}: no record is left to train on: ${result.warnings.join('; ') || 'there was none'}`,
  );
}

const pairs: Prepare<PreferenceExample> = (report, record) =>
  preparePair(report, readPreferenceRecord(record, report.options));

/** Reads, checks and tokenizes preference records of a file (or of memory), in the order of the file. */
export const preparePreferenceData = (
  data: string | readonly object[],
  options: PrepareOptions,
): Promise<PreparedData<PreferenceExample>> => prepareAll(data, options, () => pairs);

/** The same, or labelled responses without pairs where the first record is one. */
export const preparePairedOrLabelledData = (
  data: string | readonly object[],
  options: PrepareOptions,
): Promise<PreparedData<PreferenceExample> | PreparedData<LabelledExample>> =>
  prepareAll<PreferenceExample | LabelledExample>(data, options, (first) =>
    first && isLabelled(first) ? prepareLabelled : pairs,
  ) as Promise<PreparedData<PreferenceExample> | PreparedData<LabelledExample>>;

/** Reads, checks and tokenizes SFT records of a file (or of memory), in the order of the file. */
export const prepareSftData = (
  data: string | readonly object[],
  options: PrepareOptions,
): Promise<PreparedData<SftExample>> =>
  prepareAll(data, options, () => (report, record) => prepareCompletion(report, readSftRecord(record)));
