// The tokenizer of the demo's language as Hugging Face files: one id a word (with the space before it), a digit, a sign.
// Only makes the files; they are read by the same library as any other tokenizer.

const end = '<|end|>';
const special = ['<|pad|>', '<|unk|>', '<|user|>', '<|assistant|>', end];

/** Words take the space before them along; every other character stands alone. */
const pieces = ' ?[A-Za-z]+|[^A-Za-z]';

const chatTemplate =
  "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}" +
  '{% if add_generation_prompt %}<|assistant|>{% endif %}';

/** tokenizer.json and tokenizer_config.json for all pieces of the given texts, and the digits. */
export function tokenizerFiles(texts: Iterable<string>): { vocabSize: number; files: Record<string, unknown> } {
  const found = new Set([...'0123456789']);
  for (const text of texts) for (const [piece] of text.matchAll(new RegExp(pieces, 'g'))) found.add(piece);
  const vocab = Object.fromEntries([...special, ...[...found].sort()].map((token, id) => [token, id]));
  const flags = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
  return {
    vocabSize: Object.keys(vocab).length,
    files: {
      'tokenizer.json': {
        version: '1.0',
        truncation: null,
        padding: null,
        added_tokens: special.map((content, id) => ({ id, content, ...flags })),
        normalizer: null,
        pre_tokenizer: { type: 'Split', pattern: { Regex: pieces }, behavior: 'Isolated', invert: false },
        post_processor: null,
        decoder: { type: 'Fuse' },
        model: { type: 'WordLevel', vocab, unk_token: '<|unk|>' },
      },
      'tokenizer_config.json': {
        tokenizer_class: 'PreTrainedTokenizerFast',
        clean_up_tokenization_spaces: false,
        eos_token: end,
        pad_token: '<|pad|>',
        unk_token: '<|unk|>',
        chat_template: chatTemplate,
      },
    },
  };
}
