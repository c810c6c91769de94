// Theorem 2 without sampling: a toy transformer of random weights whose outputs can all be listed, so that what one step of
// DPO takes away and gives is known to the last output. For comparison beside the sampled responses of a real model.
import { parseModelConfig } from '../models/config.js';
import { createModel } from '../models/initialize.js';
import { barChart, type Chart, changeChart } from './charts.js';
import {
  dpoStepFlow,
  enumerateOutputs,
  type FlowCase,
  type FlowStatistics,
  firstOrderFlow,
  flowStatistics,
  gramOf,
  likeliestPairs,
  type MassFlow,
  outputGradients,
  outputLogProbs,
} from './enumerable.js';
import type { Table } from './report.js';

const vocabSize = 5;
const length = 3;

export interface ToyOptions {
  /** Of the toy model's weights. */
  readonly seed: number;
  readonly beta: number;
  /** η of the one plain gradient step. */
  readonly stepSize: number;
}

export type OutputRole = 'y_w' | 'y_l' | 'y*' | 'other';

/** What one step does to one output: probabilities. */
export interface OutputFlow {
  /** Its tokens. */
  readonly output: string;
  readonly role: OutputRole;
  readonly before: number;
  readonly after: number;
  /** after - before. */
  readonly change: number;
  /** The same to first order in η (Eq. 57). */
  readonly firstOrder: number;
}

/** Shares of the gained mass; they add up to one. */
export type Shares = Readonly<Record<OutputRole, number>>;

/** One step on one pair. */
export interface PairFlow {
  /** To first order. */
  readonly case: FlowCase;
  /** The mass that changed hands, exactly. */
  readonly moved: number;
  readonly shares: Shares;
  readonly firstOrderShares: Shares;
  /** Every output, the likeliest first. */
  readonly outputs: readonly OutputFlow[];
}

export interface ToyFlow {
  readonly outputs: number;
  readonly topProbability: number;
  readonly beta: number;
  readonly stepSize: number;
  /** Exactly: the likeliest pair of each case. */
  readonly pairs: readonly PairFlow[];
  /** To first order: all ordered pairs. */
  readonly statistics: Readonly<Record<FlowCase, FlowStatistics>>;
}

const toyConfig = () =>
  parseModelConfig({
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

const sharesOf = (star: number, chosen: number, rejected: number): Shares => ({
  y_w: chosen,
  y_l: rejected,
  'y*': star,
  other: Math.max(0, 1 - star - chosen - rejected),
});

const flowShares = (flow: MassFlow): Shares => sharesOf(flow.shareToStar, flow.shareToChosen, flow.shareToRejected);

/**
 * What one step of DPO does to every output of a toy model: exactly, on the likeliest pair of each case of Theorem 2;
 * and to first order, in numbers over all ordered pairs (Eq. 57 of arXiv 2507.07723). The reference is the model itself: s = 0.
 */
export async function toyFlow({ seed, beta, stepSize }: ToyOptions): Promise<ToyFlow> {
  using model = createModel(toyConfig(), { seed, dtype: 'float64' });
  const prompt = Int32Array.of(1, 3, 2);
  const outputs = enumerateOutputs(vocabSize, length);
  const logProbs = await outputLogProbs(model, prompt, outputs);
  const gram = gramOf(await outputGradients(model, prompt, outputs));
  const pairs: PairFlow[] = [];
  for (const { case: name, chosen, rejected } of likeliestPairs(logProbs, gram)) {
    const exact = await dpoStepFlow(model, prompt, outputs, { chosen, rejected }, { beta, stepSize });
    const first = firstOrderFlow(logProbs, gram, chosen, rejected);
    const unit = (stepSize * beta) / 2; // ηβ(1 - σ(0))
    const role = (k: number): OutputRole =>
      k === chosen ? 'y_w' : k === rejected ? 'y_l' : k === exact.star ? 'y*' : 'other';
    const rows = outputs.map((output, k): OutputFlow => {
      const before = Math.exp(logProbs[k]);
      const change = exact.change[k];
      const firstOrder = unit * first.change[k];
      return { output: output.join(' '), role: role(k), before, after: before + change, change, firstOrder };
    });
    rows.sort((a, b) => b.before - a.before);
    const shares = { shares: flowShares(exact), firstOrderShares: flowShares(first) };
    pairs.push({ case: name, moved: exact.moved, ...shares, outputs: rows });
  }
  const topProbability = Math.exp(Math.max(...logProbs));
  const statistics = flowStatistics(logProbs, gram);
  return { outputs: outputs.length, topProbability, beta, stepSize, pairs, statistics };
}

const cases: Readonly<Record<FlowCase, string>> = {
  'case 1': 'case 1: y_w and y_l fall',
  'case 2': 'case 2: y_w rises, y_l falls',
  'both rise': 'both rise (not treated by the theorem)',
};

/** In the order of legends. */
const roles: readonly OutputRole[] = ['y_w', 'y_l', 'y*', 'other'];

const nameOf = ({ outputs }: PairFlow, role: OutputRole): string => outputs.find((o) => o.role === role)?.output ?? '';

const setting = ({ beta, stepSize }: ToyFlow): string => `η = ${stepSize}, β = ${beta}, s = 0`;

const meanShares = (s: FlowStatistics): Shares =>
  sharesOf(s.meanShareToStar, s.meanShareToChosen, s.meanShareToRejected);

export function toyCharts(toy: ToyFlow): Chart[] {
  const flows = toy.pairs.flatMap((pair) =>
    pair.outputs
      .map(({ change, firstOrder, role }, i) => ({
        x: i + 1,
        y: change,
        predicted: firstOrder,
        role,
        panel: `${cases[pair.case]}; y_w = ${nameOf(pair, 'y_w')}, y_l = ${nameOf(pair, 'y_l')}, y* = ${nameOf(pair, 'y*')}`,
      }))
      .sort((a, b) => roles.indexOf(a.role) - roles.indexOf(b.role)),
  );
  const counted = (Object.keys(cases) as FlowCase[]).filter((name) => toy.statistics[name].pairs > 0);
  const bars = [
    ...toy.pairs.map((pair) => ({ category: `${pair.case}|one pair|exactly`, of: pair.shares })),
    ...counted.map((name) => ({
      category: `${name}|${toy.statistics[name].pairs} pairs|to first order`,
      of: meanShares(toy.statistics[name]),
    })),
  ];
  return [
    changeChart(flows, {
      id: 'mass-shift-flow',
      title: `One step of DPO: the exact flow of probability to each of ${toy.outputs} outputs`,
      caption: `A toy transformer of random weights; ${setting(toy)}. Bars: the exact change; black marks: what Theorem 1 says to first order. Of each case of Theorem 2, the likeliest pair.`,
      x: 'outputs, the likeliest first (rank)',
      y: 'change of π',
    }),
    barChart(
      bars.flatMap(({ category, of }) => roles.map((role) => ({ category, value: of[role], series: `to ${role}` }))),
      {
        id: 'mass-shift-shares',
        title: 'Who gains what a step of DPO takes away',
        caption:
          'Shares of all probability that outputs gained: of the pairs shown above, exactly; of all ordered pairs of a case, their mean, to first order.',
        x: 'case of Theorem 2',
        y: 'share of the gained mass',
      },
    ),
  ];
}

export function toyTables(toy: ToyFlow): Table[] {
  const flow: Table = {
    id: 'mass-shift-flow',
    title: 'One step of DPO: the exact flow to every output',
    caption: `Probabilities of every output of the toy model before and after one step; ${setting(toy)}. The largest changes first.`,
    columns: ['case', 'output', 'role', 'before', 'after', 'exact change', 'first-order change'],
    rows: toy.pairs
      .flatMap((pair) => pair.outputs.map((o) => ({ ...o, case: pair.case })))
      .sort((a, b) => Math.abs(b.change) - Math.abs(a.change))
      .map((o) => [o.case, o.output, o.role, o.before, o.after, o.change, o.firstOrder]),
    shown: 15,
  };
  const shares: Table = {
    id: 'mass-shift-shares',
    title: 'Shares of the gained mass, pair by pair',
    caption: `The pairs of the flow above; ${setting(toy)}. Gained: the sum of all rises of probability.`,
    columns: [
      'case',
      'y_w',
      'y_l',
      'y*',
      'gained',
      ...roles.map((r) => `to ${r}`),
      ...roles.map((r) => `to ${r}, first order`),
    ],
    rows: toy.pairs.map((pair) => [
      cases[pair.case],
      ...(['y_w', 'y_l', 'y*'] as const).map((role) => nameOf(pair, role)),
      pair.moved,
      ...roles.map((role) => pair.shares[role]),
      ...roles.map((role) => pair.firstOrderShares[role]),
    ]),
  };
  return [flow, shares, statisticsTable(toy)];
}

function statisticsTable({ outputs, statistics }: ToyFlow): Table {
  return {
    id: 'mass-shift-first-order',
    title: 'All ordered pairs, to first order',
    caption: `The toy model with ${outputs} outputs: what one small step of DPO on each ordered pair does to all of them, to first order (Eq. 57). y* is the likeliest output other than the two. Shares are means over the pairs.`,
    columns: ['case', 'pairs', 'y* gains', 'y* gains most', 'y_w gains most', ...roles.map((r) => `share to ${r}`)],
    rows: (Object.keys(cases) as FlowCase[]).map((name) => {
      const s = statistics[name];
      const shares = meanShares(s);
      const counts = [s.pairs, s.starGains, s.starGainsMost, s.chosenGainsMost];
      return [cases[name], ...counts, ...roles.map((role) => (s.pairs > 0 ? shares[role] : Number.NaN))];
    }),
  };
}

const percent = (share: number): string => `${(100 * share).toFixed(0)} %`;

const inWords = (shares: Shares): string =>
  `${percent(shares['y*'])} to y*, ${percent(shares.y_w)} to y_w, ${percent(shares.other)} to other outputs`;

/** Shares in sentences: one for the exact steps, one for all pairs. Of the cases that the theorem treats. */
export function toyFindings({ pairs, statistics, outputs }: ToyFlow): string[] {
  const treated = (['case 1', 'case 2'] as const).filter((name) => statistics[name].pairs > 0);
  const exact = pairs.flatMap((pair) =>
    treated.some((name) => name === pair.case) ? [`${cases[pair.case]}: ${inWords(pair.shares)}`] : [],
  );
  const means = treated.map(
    (name) => `${cases[name]}: ${inWords(meanShares(statistics[name]))} (${statistics[name].pairs} pairs)`,
  );
  return [
    `On a toy model whose ${outputs} outputs can all be listed, the mass that one step of DPO on a pair moved went, exactly: ${exact.join('; ')}.`,
    `There to first order, means over all pairs: ${means.join('; ')}.`,
  ];
}
