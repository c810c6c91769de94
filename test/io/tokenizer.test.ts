// Token ids, decoded texts and rendered conversations against transformers; folders with less than all files.

import { cp, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { createChatTemplate } from '../../src/io/chat-template.js';
import { hasTokenizer, loadTokenizer } from '../../src/io/tokenizer.js';
import { describeWithShared, readSharedJson, sharedPath } from '../shared.js';
import { writeToyTokenizer } from './toy-tokenizer.js';

const FOLDERS: Record<string, string> = {
  qwen2_5: 'data/tokenizers/qwen2_5',
  llama3_2: 'data/tokenizers/llama3_2',
  'minimind2-small': 'data/models/minimind2-small/hf',
  smollm2: 'data/models/smollm2-135m-instruct',
};

describeWithShared('recorded tokenizers', 'golden/models/templates.json', () => {
  const templates = readSharedJson('golden/models/templates.json');
  const texts = readSharedJson('golden/models/tokenizer-text.json');

  it.each(Object.entries(FOLDERS))('%s tokenizes and decodes the recorded texts', async (name, path) => {
    const tokenizer = await loadTokenizer(sharedPath(path));
    const expected = texts.tokenizers[name];
    const inputs: string[] = texts.texts.map((entry: { text: string }) => entry.text);
    const ids = await Promise.all(inputs.map((text) => tokenizer.encode(text)));
    expect(ids).toEqual(expected.ids);
    const decoded = await Promise.all(ids.map((list) => tokenizer.decode(list)));
    const different = expected.decoded_if_different;
    const recorded = inputs.map((text, i) => different[i] ?? text);
    expect(decoded).toEqual(recorded);
  });

  it.each(Object.entries(FOLDERS))('%s renders and tokenizes the recorded conversations', async (name, path) => {
    const tokenizer = await loadTokenizer(sharedPath(path));
    const options = name === 'llama3_2' ? { dateString: templates.date_string } : {};
    for (const [c, { messages }] of templates.conversations.entries()) {
      const { prompt, whole } = templates.rendered[name][c];
      const lastUser = messages.findLastIndex((message: { role: string }) => message.role === 'user');
      const cut = messages.slice(0, lastUser + 1);
      const promptText = await tokenizer.chatTemplate!.render(cut, { addGenerationPrompt: true, ...options });
      const wholeText = await tokenizer.chatTemplate!.render(messages, options);
      expect(promptText).toBe(prompt.text);
      expect(wholeText).toBe(whole.text);
      expect(await tokenizer.encode(promptText)).toEqual(prompt.ids);
      expect(await tokenizer.encode(wholeText)).toEqual(whole.ids);
    }
  });

  it('finds special tokens and what is put before a text', async () => {
    const llama = await loadTokenizer(sharedPath('data/tokenizers/llama3_2'));
    expect(llama).toMatchObject({ bosToken: { text: '<|begin_of_text|>', id: 128000 }, textPrefix: [128000] });
    expect(llama.vocabSize).toBe(128256);
    const stories = await loadTokenizer(sharedPath('data/models/stories260K/hf'));
    expect(stories).toMatchObject({ textPrefix: [1], eosToken: { text: '</s>', id: 2 }, chatTemplate: undefined });
    const mini = await loadTokenizer(sharedPath('data/models/minimind2-small/hf'));
    expect(mini).toMatchObject({ textPrefix: [], eosToken: { id: 2 }, padToken: { id: 0 }, vocabSize: 6400 });
    const gpt2 = await loadTokenizer(sharedPath('data/tokenizers/gpt2'));
    expect(gpt2).toMatchObject({ textPrefix: [], eosToken: { id: 50256 }, padToken: undefined });
  });
});

describe('a small tokenizer folder', () => {
  let folder: string;
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'keelgrad-'));
  });
  afterEach(() => rm(folder, { recursive: true }));

  it('encodes and decodes', async () => {
    await writeToyTokenizer(folder);
    expect(await hasTokenizer(folder)).toBe(true);
    const tokenizer = await loadTokenizer(folder);
    const ids = await tokenizer.encode('ab<eos>');
    expect(ids).toEqual([tokenizer.tokenToId('ab'), 1]);
    expect(await tokenizer.decode(Int32Array.from(ids))).toBe('ab<eos>');
    expect(await tokenizer.decode(ids, { skipSpecialTokens: true })).toBe('ab');
    expect(tokenizer.idToToken(1)).toBe('<eos>');
    expect(tokenizer.tokenToId('nothing')).toBeUndefined();
    expect(await tokenizer.encode('a', { addSpecialTokens: true })).toHaveLength(1);
  });

  it('takes special tokens from the map, and from config.json where nothing names them', async () => {
    await writeToyTokenizer(folder, { config: undefined });
    expect((await loadTokenizer(folder)).eosToken).toBeUndefined();
    await writeFile(join(folder, 'config.json'), '{"eos_token_id":[1,0],"bos_token_id":null,"pad_token_id":-1}');
    expect((await loadTokenizer(folder)).eosToken).toEqual({ text: '<eos>', id: 1 });
    await writeFile(join(folder, 'special_tokens_map.json'), '{"eos_token":{"content":"<bos>"}}');
    expect((await loadTokenizer(folder)).eosToken).toEqual({ text: '<bos>', id: 0 });
    await writeFile(join(folder, 'tokenizer_config.json'), '{"added_tokens_decoder":{},"eos_token":"<eos>"}');
    expect((await loadTokenizer(folder)).eosToken?.id).toBe(1);
  });

  it('ignores truncation and padding that a training script left in the file', async () => {
    const padding = {
      strategy: { Fixed: 9 },
      direction: 'Right',
      pad_to_multiple_of: null,
      pad_id: 0,
      pad_type_id: 0,
      pad_token: '<bos>',
    };
    const truncation = { direction: 'Right', max_length: 2, strategy: 'LongestFirst', stride: 0 };
    await writeToyTokenizer(folder, { extra: { padding, truncation } });
    expect(await (await loadTokenizer(folder)).encode('abababab')).toHaveLength(4);
  });

  it('says what is missing or broken', async () => {
    expect(await hasTokenizer(folder)).toBe(false);
    await expect(loadTokenizer(folder)).rejects.toThrow(
      /tokenizer.json: no such file: text needs a tokenizer.*prompt_ids/,
    );
    await writeFile(join(folder, 'tokenizer.json'), '{"model": 1}');
    await expect(loadTokenizer(folder)).rejects.toThrow(/tokenizer.json: not a tokenizer.json/);
  });

  it('hashes what decides the ids', async () => {
    await writeToyTokenizer(folder);
    const { hash } = await loadTokenizer(folder);
    const copy = join(folder, 'copy');
    await mkdir(copy);
    for (const name of ['tokenizer.json', 'tokenizer_config.json']) await cp(join(folder, name), join(copy, name));
    expect((await loadTokenizer(copy)).hash).toBe(hash);
    await writeFile(join(copy, 'chat_template.jinja'), 'x');
    expect((await loadTokenizer(copy)).hash).not.toBe(hash);
  });

  it('prefers template files, and named templates for tools', async () => {
    await writeToyTokenizer(folder, { config: { eos_token: '<eos>', chat_template: 'old' } });
    const render = async (tools?: unknown[]) =>
      (await loadTokenizer(folder)).chatTemplate!.render([{ role: 'user', content: 'hi' }], { tools });
    expect(await render()).toBe('old');
    await writeFile(join(folder, 'chat_template.jinja'), 'file {{ eos_token }}');
    expect(await render()).toBe('file <eos>');
    await mkdir(join(folder, 'additional_chat_templates'));
    await writeFile(join(folder, 'additional_chat_templates', 'tool_use.jinja'), 'tools {{ tools | length }}');
    expect(await render([{}, {}])).toBe('tools 2');
    expect(await render()).toBe('file <eos>');
    const named = [{ name: 'rag', template: 'x' }];
    await rm(join(folder, 'chat_template.jinja'));
    await writeFile(join(folder, 'tokenizer_config.json'), JSON.stringify({ chat_template: named }));
    await expect(render()).rejects.toThrow(/expected a chat template named default, found rag, tool_use/);
    await writeFile(join(folder, 'tokenizer_config.json'), '{"chat_template": 3}');
    await expect(render()).rejects.toThrow(/chat_template: expected a template or a list/);
  });
});

describe('createChatTemplate', () => {
  const create = (source: string) => createChatTemplate(new Map([['default', source]]), { bos_token: '<s>' }, 'model');

  it('passes variables on', async () => {
    const template = create(
      '{{ bos_token }}{{ messages[0].content }}{{ date_string }}{{ x + 1 }}{% if tools is none %}-{% endif %}',
    );
    const options = { dateString: 'today', variables: { x: 1 } };
    expect(await template.render([{ role: 'user', content: 'hi' }], options)).toBe('<s>hitoday2-');
  });

  it("repeats the template's own complaint", async () => {
    const template = create("{{ raise_exception('roles must alternate') }}");
    await expect(template.render([])).rejects.toThrow(/model: the chat template does not accept.*roles must alternate/);
    await expect(create('{% if %}').render([])).rejects.toThrow(/model: the chat template/);
  });
});
