// Tokenizers of Hugging Face folders: tokenizer.json as it is, through the native `tokenizers` package.
// Never adds, removes or renames tokens; loads the package only when a tokenizer is asked for.

import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { KeelgradError } from '../errors.js';
import { type ChatTemplate, createChatTemplate, findChatTemplates } from './chat-template.js';
import { isRecord } from './fields.js';
import { hashBytes } from './hash.js';
import { readJsonFileIfPresent, readTextFileIfPresent } from './json-file.js';

export interface SpecialToken {
  readonly text: string;
  readonly id: number;
}

export interface Tokenizer {
  /** Ids of a text. `addSpecialTokens` (false) lets the tokenizer's own post-processor add BOS and the like. */
  encode(text: string, options?: { addSpecialTokens?: boolean }): Promise<number[]>;
  /** The text of ids, special tokens kept unless asked otherwise, spaces left as they are. */
  decode(ids: ArrayLike<number>, options?: { skipSpecialTokens?: boolean }): Promise<string>;
  tokenToId(token: string): number | undefined;
  idToToken(id: number): string | undefined;
  readonly bosToken?: SpecialToken;
  readonly eosToken?: SpecialToken;
  readonly padToken?: SpecialToken;
  /** What the post-processor puts before a plain text: [BOS] of Llama 3, nothing in Qwen2.5. */
  readonly textPrefix: readonly number[];
  readonly chatTemplate?: ChatTemplate;
  /** Number of ids, added tokens included; a model's embedding may have more rows. */
  readonly vocabSize: number;
  /** SHA-256 over tokenizer.json, the special tokens and the chat templates. */
  readonly hash: string;
  readonly folder: string;
}

const FILE = 'tokenizer.json';
const STANDARD_TOKENS = ['bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token'];

export async function hasTokenizer(folder: string): Promise<boolean> {
  return stat(join(folder, FILE)).then(
    (entry) => entry.isFile(),
    () => false,
  );
}

const tokenText = (value: unknown): string | undefined => {
  if (typeof value === 'string') return value;
  return isRecord(value) && typeof value.content === 'string' ? value.content : undefined;
};

/** transformers' rule: special_tokens_map.json is asked only where tokenizer_config.json has no added_tokens_decoder. */
async function readSpecialTokens(folder: string, config: Record<string, unknown>): Promise<Record<string, string>> {
  const map = await readJsonFileIfPresent(join(folder, 'special_tokens_map.json'));
  const legacy = isRecord(map) && config.added_tokens_decoder === undefined;
  const merged: Record<string, unknown> = legacy ? { ...config, ...map } : { ...(isRecord(map) ? map : {}), ...config };
  const found: Record<string, string> = {};
  for (const name of STANDARD_TOKENS) {
    const text = tokenText(merged[name]);
    if (text !== undefined) found[name] = text;
  }
  return found;
}

type NativeTokenizer = import('tokenizers').Tokenizer;

/** A folder that names no special tokens still has their ids in config.json. */
async function completeFromModelConfig(
  folder: string,
  tokens: Record<string, string>,
  native: NativeTokenizer,
): Promise<Record<string, string>> {
  const config = await readJsonFileIfPresent(join(folder, 'config.json'));
  if (!isRecord(config)) return tokens;
  const completed = { ...tokens };
  for (const name of ['bos_token', 'eos_token', 'pad_token']) {
    const value = config[`${name}_id`];
    const id = Array.isArray(value) ? value[0] : value;
    const text = Number.isSafeInteger(id) && id >= 0 ? native.idToToken(id) : null;
    if (completed[name] === undefined && text !== null) completed[name] = text;
  }
  return completed;
}

async function createNative(text: string, path: string): Promise<NativeTokenizer> {
  const { Tokenizer: Native } = await import('tokenizers').catch((error: Error) => {
    const remedy = 'reinstall with `npm install tokenizers`, or train on token ids, which needs no tokenizer';
    throw new KeelgradError(`the native package "tokenizers" does not load here: ${error.message}; ${remedy}`);
  });
  try {
    const native = Native.fromString(text);
    native.disableTruncation(); // some files carry the limits of their training script
    native.disablePadding();
    return native;
  } catch (error) {
    throw new KeelgradError(`${path}: not a tokenizer.json: ${(error as Error).message}`, { cause: error });
  }
}

async function readTokenizerText(folder: string): Promise<string> {
  const path = join(folder, FILE);
  const text = await readTextFileIfPresent(path);
  if (text !== undefined) return text;
  const remedy = 'add the tokenizer files of the model, or use records of token ids (prompt_ids, chosen_ids, ...)';
  throw new KeelgradError(`${path}: no such file: text needs a tokenizer; ${remedy}`);
}

/** Loads the tokenizer of a model folder. Throws a KeelgradError where there is none: ask `hasTokenizer` first. */
export async function loadTokenizer(folder: string): Promise<Tokenizer> {
  const text = await readTokenizerText(folder);
  const native = await createNative(text, join(folder, FILE));
  const value = await readJsonFileIfPresent(join(folder, 'tokenizer_config.json'));
  const config = isRecord(value) ? value : {};
  const named = await readSpecialTokens(folder, config);
  const specialTokens = await completeFromModelConfig(folder, named, native);
  const templates = await findChatTemplates(folder, config);
  const encode = async (input: string, addSpecialTokens: boolean): Promise<number[]> =>
    (await native.encode(input, null, { addSpecialTokens })).getIds();
  const special = (name: string): SpecialToken | undefined => {
    const token = specialTokens[name];
    const id = token === undefined ? null : native.tokenToId(token);
    return token === undefined || id === null ? undefined : { text: token, id };
  };
  const bosToken = special('bos_token');
  const around = await encode('', true);
  return {
    folder,
    encode: (input, { addSpecialTokens = false } = {}) => encode(input, addSpecialTokens),
    decode: (ids, { skipSpecialTokens = false } = {}) => native.decode(Array.from(ids), skipSpecialTokens),
    tokenToId: (token) => native.tokenToId(token) ?? undefined,
    idToToken: (id) => native.idToToken(id) ?? undefined,
    bosToken,
    eosToken: special('eos_token'),
    padToken: special('pad_token'),
    textPrefix: bosToken !== undefined && around[0] === bosToken.id ? [bosToken.id] : [],
    chatTemplate: templates.size > 0 ? createChatTemplate(templates, specialTokens, folder) : undefined,
    vocabSize: native.getVocabSize(true),
    hash: hashBytes(JSON.stringify([hashBytes(text), specialTokens, [...templates]])),
  };
}
