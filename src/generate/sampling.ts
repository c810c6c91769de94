// Answers to many prompts at once: the texts so far are run again for every token, which needs no cache; prompts that are
// the same array are run once. For short answers; nothing here is meant for long texts.

import { Choices } from '../data/random.js';
import type { CausalLM } from '../models/causal-lm.js';
import { cast, gatherRows } from '../ops/movement.js';
import { linear } from '../ops/product.js';
import { SegmentLayout } from '../ops/segments.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import { Tensor } from '../tensor/tensor.js';

export interface SamplingOptions {
  /** 0 takes the likeliest token every time. */
  temperature: number;
  /** Ends an answer, and belongs to it. */
  endId: number;
  /** Answers without an end by then stay as they are. */
  maxTokens: number;
  seed?: number;
  batchSize?: number;
  signal?: AbortSignal;
  onProgress?: (done: number, total: number) => void;
}

/** A text so far: a prompt and what has been answered. */
interface Text {
  readonly prompt: ArrayLike<number>;
  readonly answer: readonly number[];
}

/** Texts on one token axis, each prompt once; `lastRows` is where the token after each text is predicted. */
function packTexts(texts: readonly Text[]): { ids: number[]; layout: SegmentLayout; lastRows: number[] } {
  const parts: { length: number; parent?: number }[] = [];
  const ids: number[] = [];
  const prompts = new Map<ArrayLike<number>, { segment: number; lastRow: number }>();
  const lastRows = texts.map(({ prompt, answer }) => {
    let shared = prompts.get(prompt);
    if (!shared) {
      ids.push(...Array.from(prompt));
      shared = { segment: parts.push({ length: prompt.length }) - 1, lastRow: ids.length - 1 };
      prompts.set(prompt, shared);
    }
    if (answer.length === 0) return shared.lastRow;
    ids.push(...answer);
    parts.push({ length: answer.length, parent: shared.segment });
    return ids.length - 1;
  });
  return { ids, layout: new SegmentLayout(parts), lastRows };
}

/** Logits `[S, V]` of the token after each text. */
async function nextLogits(model: CausalLM, texts: readonly Text[]): Promise<ArrayLike<number>> {
  const { ids, layout, lastRows } = packTexts(texts);
  const ints = (values: readonly number[]): Tensor => Tensor.from(Int32Array.from(values), { device: model.device });
  const logits = detachFromScope(
    scope(() => {
      const hidden = model.hidden(model.parameters, ints(ids), layout);
      return cast(linear(gatherRows(hidden, ints(lastRows)), model.headWeight(model.parameters)), 'float32');
    }),
  );
  try {
    return await logits.data();
  } finally {
    logits.dispose();
    layout.dispose();
  }
}

/** An index drawn from softmax(logits / temperature), or the largest logit's. */
function choose(logits: ArrayLike<number>, from: number, to: number, temperature: number, c: Choices): number {
  let best = from;
  for (let i = from; i < to; i++) if (logits[i] > logits[best]) best = i;
  if (temperature === 0) return best - from;
  const weight = (i: number): number => Math.exp((logits[i] - logits[best]) / temperature);
  let total = 0;
  for (let i = from; i < to; i++) total += weight(i);
  let left = c.uniform() * total;
  for (let i = from; i < to; i++) {
    left -= weight(i);
    if (left < 0) return i - from;
  }
  return best - from;
}

/** One answer (token ids, the end included) for every prompt; prompts hold at least one token. */
export async function sampleAnswers(
  model: CausalLM,
  prompts: readonly ArrayLike<number>[],
  options: SamplingOptions,
): Promise<number[][]> {
  const { temperature, endId, maxTokens, seed = 0, batchSize = 64 } = options;
  const { vocabSize } = model.config;
  const answers: number[][] = prompts.map(() => []);
  for (let start = 0; start < prompts.length; start += batchSize) {
    let open = prompts.slice(start, start + batchSize).map((_, i) => start + i);
    const choices = new Map(open.map((i) => [i, new Choices(seed, i)]));
    for (let token = 0; token < maxTokens && open.length > 0 && !options.signal?.aborted; token++) {
      const texts = open.map((i) => ({ prompt: prompts[i], answer: answers[i] }));
      const logits = await nextLogits(model, texts);
      open.forEach((i, k) => {
        answers[i].push(choose(logits, k * vocabSize, (k + 1) * vocabSize, temperature, choices.get(i)!));
      });
      open = open.filter((i) => answers[i][answers[i].length - 1] !== endId);
    }
    options.onProgress?.(Math.min(start + batchSize, prompts.length), prompts.length);
  }
  return answers;
}
