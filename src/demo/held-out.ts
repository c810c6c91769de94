// The fixed held-out pairs that both runs are measured on: log-probabilities, and whether greedy answers are right.
import { type PreferenceExample, preparePreferenceData } from '../data/tokenize.js';
import { KeelgradError } from '../errors.js';
import { sampleAnswers } from '../generate/sampling.js';
import { loadTokenizer, type Tokenizer } from '../io/tokenizer.js';
import type { CausalLM } from '../models/causal-lm.js';
import { scorePairs } from '../train/batch-source.js';
import type { TrainHooks } from '../train/hooks.js';
import { agrees } from './language.js';
import { assets } from './settings.js';

/** Log-probabilities of the held-out answers after some number of updates, by pair, summed over each answer's tokens. */
export interface Measurement {
  readonly step: number;
  readonly chosen: Float64Array;
  readonly rejected: Float64Array;
}

const longestAnswer = 48;

export class HeldOutPairs {
  private readonly pairs: readonly PreferenceExample[];
  private readonly tokenizer: Tokenizer;

  private constructor(pairs: readonly PreferenceExample[], tokenizer: Tokenizer) {
    this.pairs = pairs;
    this.tokenizer = tokenizer;
  }

  /** The first `count` held-out pairs. */
  static async load(count: number): Promise<HeldOutPairs> {
    const tokenizer = await loadTokenizer(assets.model);
    const { examples } = await preparePreferenceData(assets.heldOut, { tokenizer: async () => tokenizer });
    return new HeldOutPairs(examples.slice(0, count), tokenizer);
  }

  get size(): number {
    return this.pairs.length;
  }

  async measure(model: CausalLM, step: number, signal?: AbortSignal): Promise<Measurement> {
    const scores = await scorePairs(model, model.parameters, this.pairs, { batchSize: 50, signal });
    return { step, ...scores };
  }

  /** By problem: whether the greedy answer ends on the right number. */
  async rightAnswers(model: CausalLM, hooks: Pick<TrainHooks, 'signal' | 'onPhase'> = {}): Promise<boolean[]> {
    const endId = this.tokenizer.eosToken?.id;
    if (endId === undefined)
      throw new KeelgradError(`${assets.model}: the tokenizer has no end token; reinstall keelgrad`);
    const prompts = this.pairs.map((pair) => pair.promptIds);
    const answers = await sampleAnswers(model, prompts, {
      temperature: 0,
      endId,
      maxTokens: longestAnswer,
      signal: hooks.signal,
      onProgress: (done, total) => hooks.onPhase?.('held-out answers', done, total),
    });
    const text = (ids: ArrayLike<number>): Promise<string> => this.tokenizer.decode(ids, { skipSpecialTokens: true });
    return Promise.all(answers.map(async (ids, i) => agrees(await text(ids), await text(this.pairs[i].chosenIds))));
  }
}
