// Makes assets/demo with this very engine: the demo's language, its tokenizer, a small Llama model trained on it by SFT from
// random weights, and preference pairs whose rejected answers are the model's own wrong ones. Everything follows from one seed.
// Run by hand, after `npm run build`: node scripts/make-demo.mjs [folder]. Takes about four minutes on two cores.
import { mkdirSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Choices } from '../dist/data/random.js';
import { prepareSftData } from '../dist/data/tokenize.js';
import { agrees, drawAnswer, drawProblem, rightAnswers } from '../dist/demo/language.js';
import { tokenizerFiles } from '../dist/demo/tokenizer.js';
import { sampleAnswers } from '../dist/generate/sampling.js';
import { loadModel, saveModel } from '../dist/io/model-folder.js';
import { loadTokenizer } from '../dist/io/tokenizer.js';
import { parseModelConfig } from '../dist/models/config.js';
import { createModel } from '../dist/models/initialize.js';
import { countParameters } from '../dist/models/parameters.js';
import { resolveOptions } from '../dist/train/options.js';
import { createProgress } from '../dist/train/progress.js';
import { openSession } from '../dist/train/session.js';

const folder = process.argv[2] ?? fileURLToPath(new URL('../assets/demo', import.meta.url));
const seed = 42;
const counts = { sft: 4000, pairs: 1200, heldOut: 200, test: 400 };
const shape = { hidden: 128, intermediate: 320, layers: 4, heads: 4, kvHeads: 2 };
const training = { epochs: 10, batchSize: 32, learningRate: 2e-3, lrSchedule: 'cosine', warmupSteps: 100 };
const sampling = { temperature: 1, tries: 4, maxTokens: 48 };

const note = (text) => console.log(text);
const jsonLines = (records) => records.map((record) => `${JSON.stringify(record)}\n`).join('');
const user = (content) => [{ role: 'user', content }];
const assistant = (content) => [{ role: 'assistant', content }];

/** Problems by set, no question twice. */
function drawSets() {
  const seen = new Set();
  const draw = (count, stream) => {
    const c = new Choices(seed, stream);
    const problems = [];
    while (problems.length < count) {
      const problem = drawProblem(c);
      if (seen.has(problem.question)) continue;
      seen.add(problem.question);
      problems.push({ ...problem, answer: drawAnswer(problem, c) });
    }
    return problems;
  };
  // Pairs are made of those problems that the model gets wrong: more are drawn than there will be pairs.
  const [test, sft] = [draw(counts.test, 0), draw(counts.sft, 1)];
  return { test, sft, heldOut: draw(2.5 * counts.heldOut, 2), pairs: draw(2.5 * counts.pairs, 3) };
}

/** Writes config.json and the tokenizer's files. */
function writeModelFolder(path, problems) {
  const texts = problems.flatMap((p) => [p.question, ...rightAnswers(p)]);
  const { vocabSize, files } = tokenizerFiles(texts);
  const idOf = (token) => files['tokenizer.json'].model.vocab[token];
  const config = {
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    hidden_act: 'silu',
    hidden_size: shape.hidden,
    intermediate_size: shape.intermediate,
    num_hidden_layers: shape.layers,
    num_attention_heads: shape.heads,
    num_key_value_heads: shape.kvHeads,
    vocab_size: vocabSize,
    max_position_embeddings: 256,
    rms_norm_eps: 1e-6,
    rope_theta: 10000,
    initializer_range: 0.05,
    tie_word_embeddings: true,
    attention_bias: false,
    mlp_bias: false,
    attention_dropout: 0,
    use_cache: true,
    bos_token_id: null,
    eos_token_id: idOf('<|end|>'),
    pad_token_id: idOf('<|pad|>'),
    torch_dtype: 'bfloat16',
  };
  mkdirSync(path, { recursive: true });
  for (const [name, value] of Object.entries({ ...files, 'config.json': config }))
    writeFileSync(join(path, name), `${JSON.stringify(value, null, 1)}\n`);
  return parseModelConfig(config);
}

async function fineTune(config, path, dataFile) {
  const model = createModel(config, { seed });
  note(`model: ${countParameters(model.backbone).toLocaleString('en')} parameters, vocabulary of ${config.vocabSize}`);
  const options = resolveOptions('sft', { ...training, train: 'full', seed }, { requirePaths: false });
  const data = await prepareSftData(dataFile, { tokenizer: () => loadTokenizer(path), vocabSize: config.vocabSize });
  const session = await openSession(model, data, options);
  const progress = await createProgress(process.stderr);
  try {
    progress.onStart({ totalSteps: session.plan.totalSteps, examples: data.examples.length, dropped: 0 });
    for await (const step of session.steps()) progress.onStep(step);
    progress.stop();
    await saveModel(model, path, { dtype: 'bfloat16', backbone: new Map(session.masters('backbone')) });
  } finally {
    session.dispose();
    model.dispose();
  }
}

/** Answers of the model to problems, as texts; an answer that did not end is null. */
async function answers(model, tokenizer, problems, temperature, stream) {
  const endId = tokenizer.eosToken.id;
  const prompts = await Promise.all(
    problems.map(async (p) =>
      tokenizer.encode(await tokenizer.chatTemplate.render(user(p.question), { addGenerationPrompt: true })),
    ),
  );
  const ids = await sampleAnswers(model, prompts, { temperature, endId, maxTokens: sampling.maxTokens, seed: stream });
  return Promise.all(ids.map((one) => (one.at(-1) === endId ? tokenizer.decode(one.slice(0, -1)) : null)));
}

const shareRight = (problems, texts) => {
  const right = problems.filter((p, i) => texts[i] !== null && agrees(texts[i], p.answer)).length;
  return `${((100 * right) / problems.length).toFixed(1)} %`;
};

/** Pairs: a problem's worked answer, and the first wrong one that the model samples. Problems it never gets wrong make none. */
async function makePairs(model, tokenizer, problems, count, stream) {
  const rejected = problems.map(() => null);
  for (let attempt = 0; attempt < sampling.tries; attempt++) {
    const open = problems.map((_, i) => i).filter((i) => rejected[i] === null);
    const asked = open.map((i) => problems[i]);
    const texts = await answers(model, tokenizer, asked, sampling.temperature, stream + attempt);
    if (attempt === 0) note(`  right at temperature ${sampling.temperature}: ${shareRight(asked, texts)}`);
    open.forEach((i, k) => {
      if (texts[k] !== null && !agrees(texts[k], problems[i].answer)) rejected[i] = texts[k];
    });
  }
  const wrong = problems.map((_, i) => i).filter((i) => rejected[i] !== null);
  note(
    `  ${wrong.length} of ${problems.length} problems have a wrong answer in ${sampling.tries}, ${Math.min(count, wrong.length)} are kept`,
  );
  return wrong.slice(0, count).map((i) => ({
    prompt: user(problems[i].question),
    chosen: assistant(problems[i].answer),
    rejected: assistant(rejected[i]),
  }));
}

const startedAt = performance.now();
const sets = drawSets();
rmSync(folder, { recursive: true, force: true });
const modelFolder = join(folder, 'model');
const config = writeModelFolder(modelFolder, Object.values(sets).flat());
const sftFile = join(folder, 'sft_train.jsonl');
writeFileSync(sftFile, jsonLines(sets.sft.map((p) => ({ messages: [...user(p.question), ...assistant(p.answer)] }))));
await fineTune(config, modelFolder, sftFile);
const model = await loadModel(modelFolder);
try {
  const tokenizer = await loadTokenizer(modelFolder);
  for (const [name, problems] of [
    ['new', sets.test],
    ['SFT', sets.sft.slice(0, counts.test)],
  ])
    note(
      `right greedy answers, ${name} problems: ${shareRight(problems, await answers(model, tokenizer, problems, 0, 0))}`,
    );
  for (const [name, problems, count, stream] of [
    ['pairs_train', sets.pairs, counts.pairs, 1000],
    ['pairs_heldout', sets.heldOut, counts.heldOut, 2000],
  ]) {
    note(`${name}.jsonl`);
    const pairs = await makePairs(model, tokenizer, problems, count, stream);
    writeFileSync(join(folder, `${name}.jsonl`), jsonLines(pairs));
  }
} finally {
  model.dispose();
}
let total = 0;
for (const path of readdirSync(folder, { recursive: true })) {
  const { size } = statSync(join(folder, path));
  if (!statSync(join(folder, path)).isDirectory()) total += size;
}
note(`${folder}: ${(total / 1e6).toFixed(2)} MB in ${Math.round((performance.now() - startedAt) / 1000)} s`);
