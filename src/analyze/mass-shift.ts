// Where probability goes (figure 2 and Theorem 2 of arXiv 2507.07723): responses to one prompt are sampled, some of them become
// preference pairs, and all are followed while DPO and SPO train on those pairs.

import type { PreferenceExample, PreparedData } from '../data/tokenize.js';
import { KeelgradError } from '../errors.js';
import { sampleAnswers } from '../generate/sampling.js';
import type { CausalLM } from '../models/causal-lm.js';
import type { GivenOptions } from '../train/options.js';
import { lineChart } from './charts.js';
import { formatNumber, type Report } from './report.js';
import { lossNote, type ModelSource, type PreferenceMethod, watch } from './runs.js';
import { logProbsOf } from './sequences.js';
import { type ToyFlow, toyCharts, toyFindings, toyTables } from './toy.js';

export interface MassShiftOptions {
  readonly promptIds: Int32Array;
  /** Ends a response, and belongs to it. */
  readonly endId: number;
  readonly samples: number;
  readonly maxTokens: number;
  readonly temperature: number;
  /** Whether a response is a preferred one. */
  readonly isPreferred: (ids: readonly number[]) => Promise<boolean>;
  /** Likeliest preferred responses that form Y_w, and likeliest others that form Y_l. */
  readonly perSet: number;
  readonly dpo: GivenOptions<'dpo'>;
  readonly spo: GivenOptions<'spo'>;
  readonly every: number;
  readonly seed: number;
  readonly signal?: AbortSignal;
  readonly onSampled?: (done: number, total: number) => void;
  readonly onProgress?: (method: PreferenceMethod, updates: number) => void;
}

/**
 * `Y_w`: preferred; `Y_l`: dispreferred; `y*`: the likeliest that is not preferred, in no pair, as figure 2 has it; `others`: the
 * rest. Theorem 2's y*, the likeliest in no pair, is another one where a preferred response that Y_w has no room for is likelier.
 */
export type ResponseSet = 'Y_w' | 'Y_l' | 'y*' | 'others';
export const responseSets: readonly ResponseSet[] = ['Y_w', 'Y_l', 'y*', 'others'];

export interface SampledResponse {
  readonly ids: readonly number[];
  readonly preferred: boolean;
  readonly set: ResponseSet;
  /** log π at the start. */
  readonly logProb: number;
}

export interface MassLook {
  readonly updates: number;
  /** log π of every response, in their order. */
  readonly logProbs: readonly number[];
}

export interface MassShift {
  readonly responses: readonly SampledResponse[];
  readonly runs: readonly { readonly method: PreferenceMethod; readonly looks: readonly MassLook[] }[];
}

/** Distinct sampled responses that ended, the likeliest first, with their log-probabilities. */
async function sampleResponses(model: CausalLM, options: MassShiftOptions) {
  const prompts = Array.from({ length: options.samples }, () => options.promptIds);
  const answers = await sampleAnswers(model, prompts, {
    temperature: options.temperature,
    endId: options.endId,
    maxTokens: options.maxTokens,
    seed: options.seed,
    signal: options.signal,
    onProgress: options.onSampled,
  });
  const ended = answers.filter((ids) => ids[ids.length - 1] === options.endId);
  const distinct = [...new Map(ended.map((ids) => [ids.join(' '), ids])).values()];
  const logProbs = await logProbsOf(
    model,
    model.parameters,
    distinct.map((ids) => ({ promptIds: options.promptIds, responseIds: Int32Array.from(ids) })),
  );
  const responses = await Promise.all(
    distinct.map(async (ids, i) => ({ ids, logProb: logProbs[i], preferred: await options.isPreferred(ids) })),
  );
  return responses.sort((a, b) => b.logProb - a.logProb);
}

/** Puts responses, the likeliest first, into sets. */
export function assignSets<R extends { preferred: boolean }>(
  responses: readonly R[],
  perSet: number,
): (R & { set: ResponseSet })[] {
  let [preferred, dispreferred] = [0, 0];
  return responses.map((r) => {
    if (r.preferred) return { ...r, set: preferred++ < perSet ? 'Y_w' : 'others' };
    if (dispreferred === 0) {
      dispreferred++;
      return { ...r, set: 'y*' };
    }
    return { ...r, set: dispreferred++ <= perSet ? 'Y_l' : 'others' };
  });
}

/** Index of Theorem 2's y* among responses, the likeliest first: the first one in no pair. */
export const likeliestOutside = (responses: readonly { set: ResponseSet }[]): number =>
  responses.findIndex(({ set }) => set !== 'Y_w' && set !== 'Y_l');

function requireBoth(responses: readonly SampledResponse[], options: MassShiftOptions): void {
  const count = (set: ResponseSet): number => responses.filter((r) => r.set === set).length;
  if (count('Y_w') > 0 && count('Y_l') > 0) return;
  const preferred = responses.filter((r) => r.preferred).length;
  throw new KeelgradError(
    `[mass shift] expected preferred and at least two dispreferred responses among ${options.samples} samples, found ${preferred} preferred ` +
      `and ${responses.length - preferred} dispreferred distinct ones that ended; sample more, longer or hotter, or ask something else`,
  );
}

/** Every member of Y_w against every member of Y_l. */
function pairsOf(responses: readonly SampledResponse[], promptIds: Int32Array): PreparedData<PreferenceExample> {
  const ids = (set: ResponseSet): Int32Array[] =>
    responses.filter((r) => r.set === set).map((r) => Int32Array.from(r.ids));
  const examples = ids('Y_w').flatMap((chosenIds) =>
    ids('Y_l').map((rejectedIds): Omit<PreferenceExample, 'index' | 'line'> => ({ promptIds, chosenIds, rejectedIds })),
  );
  return {
    examples: examples.map((example, i) => ({ ...example, index: i, line: i + 1 })),
    dropped: { promptTooLong: 0, noTarget: 0 },
    truncated: 0,
    boundaryShifts: 0,
    warnings: [],
  };
}

/** Samples, trains by DPO and by SPO, follows every response. Undefined where the signal ended it early. */
export async function followMass(source: ModelSource, options: MassShiftOptions): Promise<MassShift | undefined> {
  const sampled = await (async () => {
    using model = await source();
    return await sampleResponses(model, options);
  })();
  if (options.signal?.aborted) return undefined;
  const responses: SampledResponse[] = assignSets(sampled, options.perSet);
  requireBoth(responses, options);
  const data = pairsOf(responses, options.promptIds);
  const sequences = responses.map((r) => ({ promptIds: options.promptIds, responseIds: Int32Array.from(r.ids) }));
  const runs: { method: PreferenceMethod; looks: MassLook[] }[] = [];
  for (const method of ['dpo', 'spo'] as const) {
    const looks: MassLook[] = [];
    const finished = await watch(source, data, {
      method,
      options: options[method],
      every: options.every,
      signal: options.signal,
      look: async (model, updates) => {
        looks.push({ updates, logProbs: await logProbsOf(model, model.parameters, sequences) });
        options.onProgress?.(method, updates);
      },
    });
    if (!finished) return undefined;
    runs.push({ method, looks });
  }
  return { responses, runs };
}

/** Of one look: mean change of log π and total probability by set, and what the sampled responses leave to all others. */
export function summarize(shift: MassShift, look: MassLook) {
  const members = (set: ResponseSet): number[] => shift.responses.flatMap((r, i) => (r.set === set ? [i] : []));
  const rows = responseSets.map((set) => {
    const at = members(set);
    const change = at.reduce((total, i) => total + look.logProbs[i] - shift.responses[i].logProb, 0) / at.length;
    const mass = at.reduce((total, i) => total + Math.exp(look.logProbs[i]), 0);
    return { set, count: at.length, change, mass };
  });
  return { rows, unseenMass: 1 - rows.reduce((total, row) => total + row.mass, 0) };
}

function finding(shift: MassShift, { method, looks }: MassShift['runs'][number]): string {
  const [first, last] = [summarize(shift, looks[0]), summarize(shift, looks[looks.length - 1])];
  const moves = last.rows
    .filter((row) => row.count > 0)
    .map(
      (row, i) =>
        `${row.set} ${formatNumber(row.change)} (mass ${formatNumber(first.rows[i].mass)} → ${formatNumber(row.mass)})`,
    );
  const star = likeliestOutside(shift.responses);
  if (shift.responses[star].set !== 'y*') {
    const [before, after] = [looks[0], looks[looks.length - 1]].map(({ logProbs }) => logProbs[star]);
    moves.push(`Theorem 2’s y* ${formatNumber(after - before)}`);
  }
  return (
    `${method.toUpperCase()}, mean change of log π in nats after ${looks[looks.length - 1].updates} steps: ${moves.join(', ')}; ` +
    `responses that were not sampled: mass ${formatNumber(first.unseenMass)} → ${formatNumber(last.unseenMass)}.`
  );
}

/** The report of a finished experiment; `texts` are the responses as text. */
export function massShiftReport(
  shift: MassShift,
  options: MassShiftOptions,
  facts: { model: string; prompt: string; texts: readonly string[] },
  toy: ToyFlow,
): Report {
  const points = shift.runs.flatMap(({ method, looks }) =>
    looks.flatMap((look) =>
      summarize(shift, look)
        .rows.filter((row) => row.count > 0)
        .map((row) => ({ x: look.updates, y: row.change, series: row.set, panel: method.toUpperCase() })),
    ),
  );
  const masses = shift.runs.flatMap(({ method, looks }) =>
    looks.flatMap((look) => {
      const { rows, unseenMass } = summarize(shift, look);
      const panel = method.toUpperCase();
      return [
        ...rows.filter((r) => r.count > 0).map((r) => ({ x: look.updates, y: r.mass, series: r.set, panel })),
        { x: look.updates, y: unseenMass, series: 'not sampled', panel },
      ];
    }),
  );
  const x = 'optimizer steps';
  const star = likeliestOutside(shift.responses);
  const last = shift.runs.map(({ looks }) => looks[looks.length - 1].logProbs);
  return {
    id: 'mass-shift',
    title: 'Where probability goes: one prompt, DPO and SPO',
    introduction: [
      `${facts.model} answered “${facts.prompt}” ${options.samples} times; ${shift.responses.length} distinct responses ended. Y_w: the likeliest preferred ones; y*: the likeliest one that is not preferred, as in figure 2, in no pair; Y_l: the next likeliest dispreferred ones. Every member of Y_w is paired with every member of Y_l, and the model trained on these pairs by DPO and by SPO${lossNote(options.spo)}.`,
      shift.responses[star].set === 'y*'
        ? 'Theorem 2’s y*, the likeliest response in no pair, is this one here.'
        : `Theorem 2’s y*, the likeliest response in no pair, is another one here, a preferred one: “${facts.texts[star]}”.`,
      'Sampling shows some outputs of a real model. Below, a toy model shows all of its own.',
    ],
    findings: [...shift.runs.map((run) => finding(shift, run)), ...toyFindings(toy)],
    charts: [
      lineChart(points, {
        id: 'mass-shift-logps',
        title: 'Mean change of log-probability by set of responses',
        caption: 'Against the start, summed over a response’s tokens (figure 2).',
        x,
        y: 'mean change of log π (nats)',
        zero: true,
      }),
      lineChart(masses, {
        id: 'mass-shift-mass',
        title: 'Probability held by each set of responses',
        caption: 'Sums of π over a set’s responses; “not sampled” is what is left to all other outputs.',
        x,
        y: 'probability',
      }),
      ...toyCharts(toy),
    ],
    tables: [
      {
        id: 'mass-shift-responses',
        title: 'Responses',
        caption: 'The likeliest first; log π in nats, at the start and after the last step.',
        columns: ['set', 'preferred', 'log π', ...shift.runs.map((r) => `after ${r.method.toUpperCase()}`), 'response'],
        rows: shift.responses.map((r, i) => [
          r.set,
          r.preferred,
          r.logProb,
          ...last.map((values) => values[i]),
          facts.texts[i],
        ]),
      },
      ...toyTables(toy),
    ],
    data: { ...facts, options: { dpo: options.dpo, spo: options.spo, samples: options.samples }, ...shift, toy },
  };
}
