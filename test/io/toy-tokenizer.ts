// A byte-pair tokenizer of a few tokens, small enough to follow by hand: "a" "b" "c" " " ":", merges "ab" and " a".

import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';

/** ids: <bos> 0, <eos> 1, <turn> 2, then the vocabulary below. */
export const TOY_VOCAB = ['<bos>', '<eos>', '<turn>', 'a', 'b', 'c', ' ', ':', '\n', 'ab', ' a'];

export const TOY_CHAT_TEMPLATE =
  '{% for m in messages %}<turn>{{ m.role[0:1] }}:{{ m.content }}<eos>\n{% endfor %}' +
  '{% if add_generation_prompt %}<turn>a:{% endif %}';

const DEFAULT_CONFIG = { eos_token: '<eos>', bos_token: '<bos>', chat_template: TOY_CHAT_TEMPLATE };

const addsBos = {
  type: 'TemplateProcessing',
  single: [{ SpecialToken: { id: '<bos>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
  pair: [{ Sequence: { id: 'A', type_id: 0 } }, { Sequence: { id: 'B', type_id: 1 } }],
  special_tokens: { '<bos>': { id: '<bos>', ids: [0], tokens: ['<bos>'] } },
};

interface ToyOptions {
  /** tokenizer_config.json; undefined given: no such file. */
  config?: object;
  bos?: boolean;
  extra?: object;
}

export async function writeToyTokenizer(folder: string, options: ToyOptions = {}): Promise<void> {
  const special = ['<bos>', '<eos>', '<turn>'];
  const flags = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
  const vocab = Object.fromEntries([...TOY_VOCAB, 's', 'u'].map((token, id) => [token, id]));
  const tokenizer = {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: special.map((content, id) => ({ id, content, ...flags })),
    normalizer: null,
    pre_tokenizer: null,
    post_processor: options.bos ? addsBos : null,
    decoder: { type: 'Fuse' },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab,
      merges: [
        ['a', 'b'],
        [' ', 'a'],
      ],
    },
    ...options.extra,
  };
  await writeFile(join(folder, 'tokenizer.json'), JSON.stringify(tokenizer));
  const config = 'config' in options ? options.config : DEFAULT_CONFIG;
  if (config) await writeFile(join(folder, 'tokenizer_config.json'), JSON.stringify(config));
}
