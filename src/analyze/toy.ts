// Theorem 2 without sampling: a toy transformer of random weights whose outputs can all be listed, so that what one step of
// DPO takes away and gives is known to the last output. For comparison beside the sampled responses of a real model.
import { parseModelConfig } from '../models/config.js';
import { createModel } from '../models/initialize.js';
import {
  enumerateOutputs,
  type FlowCase,
  type FlowStatistics,
  flowStatistics,
  gramOf,
  outputGradients,
  outputLogProbs,
} from './enumerable.js';
import type { Table } from './report.js';

const vocabSize = 5;
const length = 3;

export interface ToyFlow {
  readonly outputs: number;
  readonly topProbability: number;
  readonly statistics: Readonly<Record<FlowCase, FlowStatistics>>;
}

/** First-order flows of every ordered pair of outputs of a toy model (Eq. 57), by case of Theorem 2. */
export async function toyFlow(seed: number): Promise<ToyFlow> {
  const config = parseModelConfig({
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    vocab_size: vocabSize,
    hidden_size: 8,
    intermediate_size: 16,
    num_hidden_layers: 1,
    num_attention_heads: 2,
    num_key_value_heads: 1,
    max_position_embeddings: 64,
    rms_norm_eps: 1e-6,
    initializer_range: 0.7,
    tie_word_embeddings: false,
    rope_theta: 10_000,
  });
  using model = createModel(config, { seed, dtype: 'float64' });
  const prompt = Int32Array.of(1, 3, 2);
  const outputs = enumerateOutputs(vocabSize, length);
  const logProbs = await outputLogProbs(model, prompt, outputs);
  const gram = gramOf(await outputGradients(model, prompt, outputs));
  return {
    outputs: outputs.length,
    topProbability: Math.exp(Math.max(...logProbs)),
    statistics: flowStatistics(logProbs, gram),
  };
}

const cases: Readonly<Record<FlowCase, string>> = {
  'case 1': 'case 1: y_w and y_l fall',
  'case 2': 'case 2: y_w rises, y_l falls',
  'both rise': 'both rise (not treated by the theorem)',
};

export function toyTable({ outputs, statistics }: ToyFlow): Table {
  return {
    id: 'mass-shift-exact',
    title: 'Exactly, where all outputs can be listed',
    caption: `A toy transformer of random weights with ${outputs} outputs: what one step of DPO on each ordered pair does to all of them, to first order. y* is the likeliest output other than the two.`,
    columns: ['case', 'pairs', 'y* gains', 'y* gains most', 'y_w gains most', 'share of gained mass to y*', 'to y_w'],
    rows: (Object.keys(cases) as FlowCase[]).map((name) => {
      const s = statistics[name];
      return [
        cases[name],
        s.pairs,
        s.starGains,
        s.starGainsMost,
        s.chosenGainsMost,
        s.meanShareToStar,
        s.meanShareToChosen,
      ];
    }),
  };
}

/** One sentence over all cases. */
export function toyFinding({ statistics }: ToyFlow): string {
  const [one, two] = [statistics['case 1'], statistics['case 2']];
  const percent = (share: number): string => `${(100 * share).toFixed(0)} %`;
  return (
    `On the toy model whose outputs can all be listed, y* takes ${percent(one.meanShareToStar)} of the gained mass where both fall (${one.pairs} pairs), ` +
    `and ${percent(two.meanShareToStar)} where y_w rises and y_l falls (${two.pairs} pairs; y_w itself ${percent(two.meanShareToChosen)}).`
  );
}
