// What is known of every preference loss without computing anything: its parameters, and what it needs of its inputs.
// Data only, imported by the option table as well: it must import nothing that loads the addon.

/** Numbers that a loss takes beside beta, with their defaults and bounds. Shared names mean the same thing. */
export const lossParameters = {
  /** ε: the share of flipped labels. */
  labelSmoothing: { default: 0, min: 0, below: 0.5 },
  /** Temperature of the gate of discopop. */
  discopopTau: { default: 0.05, above: 0 },
  /** λ of DPO-Positive's penalty. */
  dpopLambda: { default: 50, min: 0 },
  /** Weight of the difference of lengths in R-DPO. */
  rdpoAlpha: { default: 0.02, min: 0 },
  /** α of β-DPO: how far beta follows the mean margin. */
  betaDpoAlpha: { default: 0.6, min: 0 },
  /** Momentum of the mean margin that β-DPO compares with; a trainer keeps that mean. */
  betaDpoMomentum: { default: 0.9, min: 0, below: 1 },
  /** Target margin of SimPO and AlphaPO. */
  simpoGamma: { default: 0.5, min: 0 },
  /** α of AlphaPO's reward; 0 is SimPO. */
  alphapoAlpha: { default: 0.25 },
  /** λ of the odds ratio term. */
  orpoLambda: { default: 0.1, min: 0 },
  /** Margin of SLiC's hinge. */
  slicDelta: { default: 1, min: 0 },
  /** Weight of SLiC's regularization towards the chosen response. */
  slicLambda: { default: 0.5, min: 0 },
  /** Weights of KTO's two kinds of responses. */
  ktoDesirableWeight: { default: 1, min: 0 },
  ktoUndesirableWeight: { default: 1, min: 0 },
} as const satisfies Record<string, ParameterFacts>;

interface ParameterFacts {
  readonly default: number;
  readonly min?: number;
  readonly above?: number;
  readonly below?: number;
}

export type LossParameter = keyof typeof lossParameters;
/** Everything that some losses take and others do not. */
export type LossSetting = LossParameter | 'slicLengthNormalize';
export const lossParameterNames = Object.keys(lossParameters) as LossParameter[];

export const fDivergences = ['reverse_kl', 'forward_kl', 'js_divergence', 'alpha_divergence'] as const;
export type FDivergence = (typeof fDivergences)[number];

/** a of alpha_divergence. */
export const defaultDivergenceCoefficient = 0.5;

/** How the NLL of the chosen response is averaged: over the batch's tokens, by sequence, or not by tokens at all. */
export const nllReductions = ['token-mean', 'sequence-mean', 'sequence-sum'] as const;
export type NllReduction = (typeof nllReductions)[number];

/** Canonical names: TRL's where it has the loss. */
export const preferenceLossNames = [
  'sigmoid',
  'hinge',
  'ipo',
  'ipo_sum',
  'robust',
  'cdpo',
  'exo_pair',
  'nca_pair',
  'bco_pair',
  'sppo_hard',
  'apo_zero',
  'apo_down',
  'aot',
  'aot_unpaired',
  'discopop',
  'sigmoid_norm',
  'dpop',
  'rdpo',
  'cal_dpo',
  'beta_dpo',
  'odpo',
  'simpo',
  'alphapo',
  'cpo',
  'orpo',
  'slic',
  'kto',
  'apo_zero_unpaired',
  'sft',
] as const;
export type PreferenceLossName = (typeof preferenceLossNames)[number];

export interface LossFacts {
  /** Parameters beside beta. */
  readonly uses?: readonly LossSetting[];
  /** It takes the logarithm of the label smoothing, which must be above 0: what its paper sets. */
  readonly usualSmoothing?: number;
  /** Neither the loss nor its reward has a beta. */
  readonly noBeta?: true;
  /** Why it needs a reference. */
  readonly needsReference?: string;
  /** Its formula has no reference at all. */
  readonly referenceFree?: true;
  /** The score of a response may be an f-divergence's. */
  readonly divergence?: true;
  /** Why the loss has no value of its own for each pair, in their order. */
  readonly notPerPair?: string;
  /** Why one pair alone makes no batch of it. */
  readonly needsSeveral?: string;
  /** The gradient of one pair depends on the others of its batch: a step's micro-batches cannot be seen one by one. */
  readonly couples?: true;
  /** Compares a batch with the mean margin of those before, which a trainer keeps. */
  readonly keepsMean?: true;
  /** Takes an offset for each pair from the data. */
  readonly needsOffsets?: true;
  /** Takes the KL estimate from mismatched prompts and responses. */
  readonly needsKl?: true;
  /** A sum over single responses, so that it holds for labelled ones without pairs as well. */
  readonly unpaired?: true;
  /** The NLL of the chosen response belongs to the loss, with this weight. */
  readonly nllWeight?: number;
  /** It is that NLL: one number for a batch, beside the losses of pairs, not one of them. */
  readonly isNll?: true;
}

const absolute = 'it compares each log-probability, not their difference, with the reference';
const sorting = {
  notPerPair: 'it sorts the batch',
  needsSeveral: 'it sorts the pairs of a batch',
  couples: true,
} as const;
const labelled = {
  uses: ['ktoDesirableWeight', 'ktoUndesirableWeight'],
  needsReference: absolute,
  unpaired: true,
} as const;

export const lossFacts: Readonly<Record<PreferenceLossName, LossFacts>> = {
  sigmoid: { divergence: true },
  hinge: { divergence: true },
  ipo: { divergence: true },
  ipo_sum: {},
  robust: { uses: ['labelSmoothing'], divergence: true },
  cdpo: { uses: ['labelSmoothing'] },
  exo_pair: { uses: ['labelSmoothing'], divergence: true, usualSmoothing: 0.001 },
  nca_pair: { needsReference: absolute },
  bco_pair: { needsReference: absolute, unpaired: true },
  sppo_hard: { needsReference: absolute },
  apo_zero: { needsReference: absolute },
  apo_down: { needsReference: absolute },
  aot: {
    uses: ['labelSmoothing'],
    needsReference: 'it compares the distribution of margins with that of the reference',
    ...sorting,
  },
  aot_unpaired: { uses: ['labelSmoothing'], needsReference: absolute, ...sorting },
  discopop: { uses: ['discopopTau'], divergence: true },
  sigmoid_norm: { divergence: true },
  dpop: { uses: ['dpopLambda'], needsReference: 'it penalizes chosen responses that fall below the reference' },
  rdpo: { uses: ['rdpoAlpha'] },
  cal_dpo: { needsReference: absolute },
  beta_dpo: { uses: ['betaDpoAlpha', 'betaDpoMomentum'], couples: true, keepsMean: true },
  odpo: { needsOffsets: true },
  simpo: { uses: ['labelSmoothing', 'simpoGamma'], referenceFree: true },
  alphapo: { uses: ['labelSmoothing', 'simpoGamma', 'alphapoAlpha'], referenceFree: true },
  cpo: { uses: ['labelSmoothing'], referenceFree: true, nllWeight: 1 },
  orpo: { uses: ['orpoLambda'], noBeta: true, referenceFree: true, nllWeight: 1 },
  slic: { uses: ['slicDelta', 'slicLambda', 'slicLengthNormalize'], noBeta: true, referenceFree: true },
  kto: { ...labelled, needsKl: true },
  apo_zero_unpaired: labelled,
  // Without a reference in its formula, but its rewards are those of DPO, as in TRL.
  sft: { notPerPair: 'it is one mean over the tokens of the batch', isNll: true },
};

/** The facts of some names; names that do not exist have none. */
export const factsOf = (names: readonly string[]): LossFacts[] =>
  names.flatMap((name) => (Object.hasOwn(lossFacts, name) ? [lossFacts[name as PreferenceLossName]] : []));

/** The weight of the NLL term where none is given: 1 with CPO and ORPO, whose definitions have it. */
export const defaultNllWeight = (names: readonly string[]): number =>
  Math.max(0, ...factsOf(names).map((facts) => facts.nllWeight ?? 0));

/** Whether some loss has a score that an f-divergence could replace. */
export const takesDivergence = (names: readonly string[]): boolean => factsOf(names).some((facts) => facts.divergence);

/** Whether none of the losses has a reference in its formula. */
export const referenceFree = (names: readonly string[]): boolean =>
  names.length > 0 && factsOf(names).every((facts) => facts.referenceFree);

/** The losses among `names`, or of all, that a setting has a part in. */
export const usersOf = (setting: LossSetting, names: readonly string[] = preferenceLossNames): PreferenceLossName[] =>
  (names as readonly PreferenceLossName[]).filter((name) => lossFacts[name]?.uses?.includes(setting));

/** Those that hold for labelled responses without pairs. */
export const unpairedLosses: readonly PreferenceLossName[] = preferenceLossNames.filter(
  (name) => lossFacts[name].unpaired,
);
