// What the terms (a)-(e) of SPO's gradient weigh (Eqs. 13, 14 of arXiv 2507.07723; spo.md §2, §6): their norms on one batch, over
// α, K, λ and γ. Everything is read off the trainer's own gradient, which is linear in λ and γ: no term is computed by a
// second route that training would not take.
import type { PreferenceExample, PreparedData } from '../data/tokenize.js';
import type { CausalLM } from '../models/causal-lm.js';
import { sub } from '../ops/elementwise.js';
import { cast, clone } from '../ops/movement.js';
import { sumOfSquares } from '../optim/clip.js';
import { policyOf } from '../tensor/dtype.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { prepareTask } from '../train/make-task.js';
import { type GivenOptions, resolveOptions } from '../train/options.js';
import { isFirstOrder } from '../train/spo-rules.js';
import { roundingOf } from '../train/spo-terms.js';
import { type GroupName, parametersOf, Trainable } from '../train/task.js';
import { lineChart } from './charts.js';
import { formatNumber, type Report } from './report.js';

export interface TermsOptions {
  /** α. */
  readonly lowerLearningRates: readonly number[];
  /** K. */
  readonly lowerSteps: readonly number[];
  readonly lambdas: readonly number[];
  readonly gammas: readonly number[];
  /** Everything else of the trainer. */
  readonly spo: GivenOptions<'spo'>;
  readonly signal?: AbortSignal;
  readonly onProgress?: (done: number, total: number) => void;
}

/** Norms with λ = γ = 1: a term is linear in its weight. */
export interface TermNorms {
  /** ‖∇_φ L_pref‖ and ‖∇_θ L_pref‖. */
  readonly a: number;
  readonly c: number;
  /** ‖∇_θ L_SFT‖, and ‖∇_φ L_SFT‖, which (b) is a difference of two of. */
  readonly d: number;
  readonly sftAdapters: number;
  /** ‖∇_θ R‖ and ‖∇_φ R‖. */
  readonly e: number;
  readonly ePhi: number;
  /** (b) by α and K. */
  readonly b: readonly LowerTerm[];
  /** Whether (b) was taken to first order in the lower level's steps, and not as a difference. */
  readonly firstOrder: boolean;
}

export interface LowerTerm {
  readonly lowerLearningRate: number;
  readonly lowerSteps: number;
  /** ‖∇_φ L_SFT(θ, φ) - ∇_φ L_SFT(θ_K, φ)‖. */
  readonly b: number;
  /** L_SFT(θ, φ) - L_SFT(θ_K, φ). */
  readonly gap: number;
  /** Whether (b) is smaller than what rounding in the dtype of computation can make of two gradients of this size. */
  readonly belowRounding: boolean;
}

const groups: readonly GroupName[] = ['backbone', 'adapters'];

/** The trainer's gradient of one batch under some settings, by group; owned by the caller. */
interface Gradient {
  readonly tensors: ReadonlyMap<GroupName, Tensor[]>;
  readonly metrics: Readonly<Record<string, number>>;
}

async function gradientOf(
  model: CausalLM,
  data: PreparedData<PreferenceExample>,
  given: GivenOptions<'spo'>,
): Promise<Gradient> {
  const visited = data.examples.map((_, i) => i);
  const batch = { batchSize: visited.length, gradientAccumulationSteps: 1 };
  const options = resolveOptions('spo', { ...given, ...batch }, { requirePaths: false });
  const make = await prepareTask({ model, data, options, visited, hooks: {} });
  const masters = new Map(
    [...parametersOf(model, 'backbone')].map(([name, t]) => [
      name,
      detachFromScope(scope(() => cast(t, policyOf(t.dtype).master).alias())),
    ]),
  );
  const trainable = new Trainable(model, groups);
  const task = make(trainable, () => masters);
  try {
    trainable.zeroGradients();
    const { losses, metrics } = await task.accumulate({ step: 0, microBatches: [visited] });
    for (const t of losses) t.dispose();
    const copies = (group: GroupName): Tensor[] =>
      [...trainable.gradients.get(group)!.buffers.values()].map((t) => detachFromScope(clone(t)));
    return { tensors: new Map(groups.map((group) => [group, copies(group)])), metrics: await metrics };
  } finally {
    task.dispose?.();
    trainable.dispose();
    for (const t of masters.values()) t.dispose();
  }
}

const release = ({ tensors }: Gradient): void => {
  for (const list of tensors.values()) for (const t of list) t.dispose();
};

/** ‖x‖, or ‖x - y‖, over one group. */
async function norm(group: GroupName, x: Gradient, y?: Gradient): Promise<number> {
  using total = scope(() => {
    const minus = y?.tensors.get(group);
    return sumOfSquares(x.tensors.get(group)!.map((t, i) => (minus ? sub(t, minus[i]) : t)));
  });
  return Math.sqrt((await total.data())[0]);
}

/**
 * Norms of all terms on the given pairs as one batch. Undefined where the signal ended it early.
 * Memory: twice the gradients beside the trainer's own.
 */
export async function measureTerms(
  model: CausalLM,
  data: PreparedData<PreferenceExample>,
  options: TermsOptions,
): Promise<TermNorms | undefined> {
  const { lowerLearningRates, lowerSteps } = options;
  // Settings of one term have no part without it, and are refused there; λ is what is varied.
  const { normPerToken, lowerSolver, penaltyForm, lambdaSchedule: _, lambdaRampSteps: __, ...spo } = options.spo;
  const total = lowerLearningRates.length * lowerSteps.length + 3;
  const firstOrder = isFirstOrder({ dtype: model.dtype, lowerSteps: 1, penaltyForm });
  let done = 0;
  const gradient = async (settings: GivenOptions<'spo'>): Promise<Gradient> => {
    const result = await gradientOf(model, data, { ...spo, ...settings });
    options.onProgress?.(++done, total);
    return result;
  };
  const bare = { lambda: 0, gamma: 0, lowerSteps: 0 };
  const preference = await gradient(bare);
  /** Norms by group of what some settings add to the preference loss's gradient. */
  const added = async (settings: GivenOptions<'spo'>) => {
    const other = await gradient({ ...bare, ...settings });
    const norms = { theta: await norm('backbone', other, preference), phi: await norm('adapters', other, preference) };
    release(other);
    return { ...norms, gap: other.metrics['spo/sft_gap'] };
  };
  try {
    // The NLL of chosen responses beside the loss is L_SFT, with its gradient for both groups.
    const nllReduction = options.spo.sftReduction === 'token-mean' ? 'token-mean' : 'sequence-sum';
    const sft = await added({ nllWeight: (options.spo.nllWeight ?? 0) + 1, nllReduction });
    const [a, c] = [await norm('adapters', preference), await norm('backbone', preference)];
    const b: LowerTerm[] = [];
    for (const steps of lowerSteps)
      for (const lowerLearningRate of lowerLearningRates) {
        if (options.signal?.aborted) return undefined;
        const { phi, gap } = await added({
          lambda: 1,
          lowerSteps: steps,
          lowerLearningRate,
          penaltyForm,
          // Its first step is the gradient's.
          lowerSolver: lowerSolver === 'momentum' && steps === 1 ? 'gradient' : lowerSolver,
        });
        const belowRounding = phi < roundingOf(model.dtype, sft.phi, a);
        b.push({ lowerLearningRate, lowerSteps: steps, b: phi, gap, belowRounding });
      }
    const r = await added({ gamma: 1, normPerToken });
    return { a, c, d: sft.theta, sftAdapters: sft.phi, e: r.theta, ePhi: r.phi, b, firstOrder };
  } finally {
    release(preference);
  }
}

/** Norms of the terms at one setting, and their shares in the sum of norms of their group. */
export interface TermShares extends Pick<LowerTerm, 'lowerLearningRate' | 'lowerSteps'> {
  readonly lambda: number;
  readonly gamma: number;
  /** a, b, e_phi of φ, then c, d, e of θ. */
  readonly norms: readonly [number, number, number, number, number, number];
  readonly shares: readonly [number, number, number, number, number, number];
}

/** All settings: every α and K with every λ and γ. */
export function termShares(terms: TermNorms, lambdas: readonly number[], gammas: readonly number[]): TermShares[] {
  const share = (parts: readonly number[]): number[] => {
    const total = parts.reduce((x, y) => x + y, 0);
    return parts.map((x) => (total > 0 ? x / total : 0));
  };
  return terms.b.flatMap(({ b, lowerLearningRate, lowerSteps }) =>
    lambdas.flatMap((lambda) =>
      gammas.map((gamma) => {
        const phi = [terms.a, lambda * b, gamma * terms.ePhi];
        const theta = [terms.c, lambda * terms.d, gamma * terms.e];
        return {
          lowerLearningRate,
          lowerSteps,
          lambda,
          gamma,
          norms: [...phi, ...theta] as unknown as TermShares['norms'],
          shares: [...share(phi), ...share(theta)] as unknown as TermShares['shares'],
        };
      }),
    ),
  );
}

const percent = (value: number): string => `${formatNumber(100 * value)} %`;

function findings(terms: TermNorms, dtype: string): string[] {
  const smallest = terms.b.reduce((x, y) => (y.b < x.b ? y : x));
  const lost = terms.b.filter((one) => one.belowRounding);
  const out = [
    `At λ = 1, α = ${smallest.lowerLearningRate}, K = ${smallest.lowerSteps}, term (b) is ${percent(smallest.b / terms.a)} of term (a): ‖b‖ = ${formatNumber(smallest.b)}, ‖a‖ = ${formatNumber(terms.a)}.`,
    `On the backbone, term (d) at λ = 1 is ${formatNumber(terms.d / terms.c)} times term (c).`,
    terms.e + terms.ePhi > 0
      ? `At γ = 1 the regularizer adds ${formatNumber(terms.e / terms.c)} times term (c) on the backbone and ${formatNumber(terms.ePhi / terms.a)} times term (a) on the adapters.`
      : 'No pair of this batch is active: the regularizer adds nothing.',
  ];
  if (lost.length > 0) {
    const where = lost.map((one) => `α = ${one.lowerLearningRate}, K = ${one.lowerSteps}`).join('; ');
    out.push(
      terms.firstOrder
        ? `Term (b) is below the rounding of ${dtype} at ${where}: only its first-order form, which was taken here, can tell it from noise.`
        : `Term (b) is below the rounding of ${dtype} at ${where}: there it is noise, and the lower level does nothing that could be told from it.`,
    );
  }
  return out;
}

/** The report of a finished measurement. */
export function termsReport(
  terms: TermNorms,
  options: TermsOptions,
  facts: { model: string; pairs: number; dtype: string },
): Report {
  const rows = termShares(terms, options.lambdas, options.gammas);
  const line = (y: (one: LowerTerm) => number, series: (one: LowerTerm) => string) =>
    terms.b.map((one) => ({ x: one.lowerLearningRate, y: y(one), series: series(one) }));
  return {
    id: 'terms',
    title: 'What the terms of SPO’s gradient weigh',
    introduction: [
      `${facts.model}, ${facts.pairs} pairs as one batch, computed in ${facts.dtype}. On the adapters φ: (a) the preference loss, (b) λ times the difference of two SFT gradients, γ∇R. On the backbone θ: (c) the preference loss, (d) λ times SFT, (e) γ∇R.`,
    ],
    findings: findings(terms, facts.dtype),
    charts: [
      lineChart(
        [
          ...line(
            (one) => one.b,
            (one) => `‖b‖ at λ = 1, K = ${one.lowerSteps}`,
          ),
          ...line(
            () => terms.a,
            () => '‖a‖',
          ),
        ],
        {
          id: 'terms-b',
          title: 'Term (b) over the learning rate of the lower level',
          caption: 'Norms on the adapters. Term (b) is nearly linear in α K while the steps are small.',
          x: 'α (lower-level learning rate)',
          y: 'norm',
          logX: true,
          logY: true,
          points: true,
        },
      ),
    ],
    tables: [
      {
        id: 'terms',
        title: 'Norms and shares',
        caption: 'Shares are of the sum of norms on the same group of variables.',
        columns: [
          'alpha',
          'K',
          'lambda',
          'gamma',
          '|a|',
          '|b|',
          '|γ∇R| φ',
          'share b',
          '|c|',
          '|d|',
          '|e|',
          'share d',
          'share e',
        ],
        rows: rows.map(({ lowerLearningRate, lowerSteps, lambda, gamma, norms: n, shares }) => [
          lowerLearningRate,
          lowerSteps,
          lambda,
          gamma,
          n[0],
          n[1],
          n[2],
          shares[1],
          n[3],
          n[4],
          n[5],
          shares[4],
          shares[5],
        ]),
      },
    ],
    data: { ...facts, options: options.spo, terms, rows },
  };
}
