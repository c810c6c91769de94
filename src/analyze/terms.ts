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
import { lossOptions } from '../train/option-losses.js';
import { type GivenOptions, resolveOptions } from '../train/options.js';
import { isFirstOrder } from '../train/spo-rules.js';
import { roundingOf } from '../train/spo-terms.js';
import { type GroupName, parametersOf, Trainable } from '../train/task.js';
import { innerProduct } from './sequences.js';

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

/**
 * The terms of one group of variables with λ = γ = 1, as inner products: terms are linear in their weights, so that these give the
 * norm of every weighted sum.
 */
export interface GroupTerms {
  /** ‖∇ L_pref‖ (a on φ, c on θ), the norm of the penalty's term (b on φ, d on θ) and ‖∇R‖ (e). */
  readonly preference: number;
  readonly penalty: number;
  readonly regularizer: number;
  /** ⟨preference, penalty⟩, ⟨preference, regularizer⟩ and ⟨penalty, regularizer⟩. */
  readonly inner: readonly [number, number, number];
}

/** What was measured of all terms. */
export interface TermNorms {
  /** (c), (d) and (e) on θ: the lower level has no part in them. */
  readonly backbone: GroupTerms;
  /** ‖∇_φ L_SFT‖, which (b) is a difference of two of. */
  readonly sftAdapters: number;
  /** (a), (b) and (e) on φ by α and K. */
  readonly adapters: readonly LowerTerm[];
  /** Whether (b) was taken to first order in the lower level's steps, and not as a difference. */
  readonly firstOrder: boolean;
}

export interface LowerTerm extends GroupTerms {
  readonly lowerLearningRate: number;
  readonly lowerSteps: number;
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

type Tensors = readonly Tensor[];

/** What a gradient adds to another, by group; owned by the caller. */
function minus(x: Gradient, y: Gradient): Gradient {
  const of = (group: GroupName): Tensor[] =>
    x.tensors.get(group)!.map((t, i) => detachFromScope(scope(() => sub(t, y.tensors.get(group)![i]))));
  return { tensors: new Map(groups.map((group) => [group, of(group)])), metrics: x.metrics };
}

async function norm(x: Tensors): Promise<number> {
  using total = scope(() => sumOfSquares(x));
  return Math.sqrt((await total.data())[0]);
}

/** Norms and inner products of a group's three terms. */
async function groupTerms(preference: Tensors, penalty: Tensors, regularizer: Tensors): Promise<GroupTerms> {
  return {
    preference: await norm(preference),
    penalty: await norm(penalty),
    regularizer: await norm(regularizer),
    inner: [
      await innerProduct(preference, penalty),
      await innerProduct(preference, regularizer),
      await innerProduct(penalty, regularizer),
    ],
  };
}

/** Options of a trainer without its preference loss: the default loss stands in for it. */
const withoutLoss = (spo: GivenOptions<'spo'>): GivenOptions<'spo'> =>
  Object.fromEntries(Object.entries(spo).filter(([key]) => !Object.hasOwn(lossOptions, key)));

/**
 * Norms of all terms on the given pairs as one batch, and their inner products. Undefined where the signal ended it early.
 * Memory: four times the gradients beside the trainer's own.
 * @throws KeelgradError for options of the trainer that it refuses, as `spo()` does
 */
export async function measureTerms(
  model: CausalLM,
  data: PreparedData<PreferenceExample>,
  options: TermsOptions,
): Promise<TermNorms | undefined> {
  const { lowerLearningRates, lowerSteps } = options;
  // Settings of one term have no part without it, and are refused there; λ is what is varied.
  const {
    normPerToken,
    normOver,
    regularizerMethod,
    lowerSolver,
    penaltyForm,
    lambdaSchedule: _,
    lambdaRampSteps: __,
    ...spo
  } = options.spo;
  const total = lowerLearningRates.length * lowerSteps.length + 4;
  let done = 0;
  const bare = { lambda: 0, gamma: 0, lowerSteps: 0 };
  const gradient = async (settings: GivenOptions<'spo'>, of = spo): Promise<Gradient> => {
    const result = await gradientOf(model, data, { ...of, ...bare, ...settings });
    options.onProgress?.(++done, total);
    return result;
  };
  const kept: Gradient[] = [];
  const keep = <G extends Gradient>(one: G): G => {
    kept.push(one);
    return one;
  };
  /** What some settings add to the preference loss's gradient. */
  const added = async (settings: GivenOptions<'spo'>, to: Gradient, of = spo): Promise<Gradient> => {
    const other = await gradient(settings, of);
    const result = minus(other, to);
    release(other);
    return result;
  };
  try {
    const preference = keep(await gradient({}));
    // The NLL of chosen responses beside a loss is L_SFT, with its gradient for both groups.
    const plain = withoutLoss(spo);
    const without = await gradient({}, plain);
    const nllReduction = spo.sftReduction === 'token-mean' ? 'token-mean' : 'sequence-sum';
    const sft = keep(await added({ nllWeight: 1, nllReduction }, without, plain));
    release(without);
    const regularizer = keep(await added({ gamma: 1, normPerToken, normOver, regularizerMethod }, preference));
    const parts = (group: GroupName): [Tensors, Tensors, Tensors] => {
      const of = ({ tensors }: Gradient): Tensors => tensors.get(group)!;
      return [of(preference), of(sft), of(regularizer)];
    };
    const sftAdapters = await norm(sft.tensors.get('adapters')!);
    const adapters: LowerTerm[] = [];
    for (const steps of lowerSteps)
      for (const lowerLearningRate of lowerLearningRates) {
        if (options.signal?.aborted) return undefined;
        // Momentum's first step is the gradient's.
        const solver = lowerSolver === 'momentum' && steps === 1 ? 'gradient' : lowerSolver;
        const lower = { lowerSteps: steps, lowerLearningRate, penaltyForm, lowerSolver: solver };
        const other = await added({ lambda: 1, ...lower }, preference);
        const [first, , third] = parts('adapters');
        const terms = await groupTerms(first, other.tensors.get('adapters')!, third);
        release(other);
        const belowRounding = terms.penalty < roundingOf(model.dtype, sftAdapters, terms.preference);
        const gap = other.metrics['spo/sft_gap'];
        adapters.push({ ...terms, lowerLearningRate, lowerSteps: steps, gap, belowRounding });
      }
    const firstOrder = isFirstOrder({ dtype: model.dtype, lowerSteps: 1, penaltyForm });
    return { backbone: await groupTerms(...parts('backbone')), sftAdapters, adapters, firstOrder };
  } finally {
    for (const one of kept) release(one);
  }
}

/** Norms of the three terms of a group and their shares. */
export interface GroupShares {
  readonly norms: readonly [number, number, number];
  /** Of the norm of the group's whole gradient, as the trainer's metrics `spo/share_a` ... count; terms that cancel exceed 1. */
  readonly shares: readonly [number, number, number];
}

/** The terms at one setting. */
export interface TermShares extends Pick<LowerTerm, 'lowerLearningRate' | 'lowerSteps'> {
  readonly lambda: number;
  readonly gamma: number;
  /** (a), (b), (e) on φ. */
  readonly adapters: GroupShares;
  /** (c), (d), (e) on θ. */
  readonly backbone: GroupShares;
}

function groupShares(terms: GroupTerms, lambda: number, gamma: number): GroupShares {
  const norms = [terms.preference, lambda * terms.penalty, gamma * terms.regularizer] as const;
  const [penalty, regularizer, both] = terms.inner;
  const crossed = lambda * penalty + gamma * regularizer + lambda * gamma * both;
  const whole = Math.sqrt(Math.max(0, norms.reduce((total, n) => total + n * n, 0) + 2 * crossed));
  const share = (n: number): number => (whole > 0 ? n / whole : 0);
  return { norms, shares: [share(norms[0]), share(norms[1]), share(norms[2])] };
}

/** All settings: every α and K with every λ and γ. */
export function termShares(terms: TermNorms, lambdas: readonly number[], gammas: readonly number[]): TermShares[] {
  return terms.adapters.flatMap((phi) =>
    lambdas.flatMap((lambda) =>
      gammas.map((gamma) => ({
        lowerLearningRate: phi.lowerLearningRate,
        lowerSteps: phi.lowerSteps,
        lambda,
        gamma,
        adapters: groupShares(phi, lambda, gamma),
        backbone: groupShares(terms.backbone, lambda, gamma),
      })),
    ),
  );
}
