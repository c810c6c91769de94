// Answers of a small model to many prompts at once: the whole text is run again for every token, which needs no cache.
// For the demo's sizes; nothing here is meant for long texts.
import type { CausalLM } from '../models/causal-lm.js';
import { gatherRows } from '../ops/movement.js';
import { linear } from '../ops/product.js';
import { SegmentLayout } from '../ops/segments.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import { Tensor } from '../tensor/tensor.js';
import { Choices } from './random.js';

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

/** Logits `[S, V]` of the token after each sequence. */
async function nextLogits(model: CausalLM, sequences: readonly (readonly number[])[]): Promise<ArrayLike<number>> {
  const layout = SegmentLayout.sequences(sequences.map((s) => s.length));
  const lastRows = layout.segments.map((s) => s.start + s.length - 1);
  const logits = detachFromScope(
    scope(() => {
      const hidden = model.hidden(model.parameters, Tensor.from(Int32Array.from(sequences.flat())), layout);
      return linear(gatherRows(hidden, Tensor.from(Int32Array.from(lastRows))), model.headWeight(model.parameters));
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

/** One answer (token ids, the end included) for every prompt. */
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
      const sequences = open.map((i) => [...Array.from(prompts[i]), ...answers[i]]);
      const logits = await nextLogits(model, sequences);
      open.forEach((i, k) => {
        answers[i].push(choose(logits, k * vocabSize, (k + 1) * vocabSize, temperature, choices.get(i)!));
      });
      open = open.filter((i) => answers[i][answers[i].length - 1] !== endId);
    }
    options.onProgress?.(Math.min(start + batchSize, prompts.length), prompts.length);
  }
  return answers;
}
