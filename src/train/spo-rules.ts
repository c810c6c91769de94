// Settings of SPO that exclude each other, with the reasons: for options as they are written, and for a model that is loaded.
// Pure functions of the settings; imports nothing heavy.

/** How ∇_φ of the penalty (term b) is found; `auto` is first-order with bfloat16, else the difference. */
export type PenaltyForm = 'auto' | 'difference' | 'first-order';
export const penaltyForms: readonly PenaltyForm[] = ['auto', 'difference', 'first-order'];

export interface SpoSetting {
  /** Of computation. */
  readonly dtype: string;
  readonly gamma: number;
  readonly lowerSteps: number;
  readonly lowerSolver?: string;
  readonly lowerWarmStart?: boolean;
  readonly penaltyForm?: PenaltyForm;
  readonly regularizerMethod?: string;
  readonly gradientCheckpointing?: boolean;
  readonly learningRateBackbone?: number;
  readonly learningRateAdapters?: number;
}

/** How messages spell options. */
export interface SpoNaming {
  option(key: string): string;
  setting(key: string, value: string | number): string;
}

const spaced = (key: string): string => key.replace(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`);

/** Options in plain words: a session does not know how they were written. */
export const inWords: SpoNaming = { option: spaced, setting: (key, value) => `${spaced(key)} ${value}` };

/** Whether term (b) is taken to first order in the lower level's steps. */
export function isFirstOrder({
  dtype,
  lowerSteps,
  penaltyForm = 'auto',
}: Pick<SpoSetting, 'dtype' | 'lowerSteps' | 'penaltyForm'>): boolean {
  const form = penaltyForm === 'auto' && dtype === 'bfloat16' ? 'first-order' : penaltyForm;
  return lowerSteps > 0 && form === 'first-order';
}

/** What makes a setting impossible with the first-order form, in words. */
function beyondFirstOrder(s: SpoSetting, n: SpoNaming): { what: string; why: string; remedy: string } | undefined {
  if (s.lowerSolver !== undefined && s.lowerSolver !== 'gradient')
    return {
      what: n.setting('lowerSolver', s.lowerSolver),
      why: 'that form is the derivative along plain gradient steps, which this solver does not take',
      remedy: n.setting('lowerSolver', 'gradient'),
    };
  if (s.lowerWarmStart)
    return {
      what: n.option('lowerWarmStart'),
      why: 'that form is the derivative along steps from the backbone as it is, and a warm start begins elsewhere',
      remedy: `no ${n.option('lowerWarmStart')}`,
    };
  return undefined;
}

/** Why checkpointing and the exact regularizer cannot be had together, where both are asked for. */
export function checkpointingConflict(
  s: Pick<SpoSetting, 'gamma' | 'gradientCheckpointing' | 'regularizerMethod'>,
  n: SpoNaming,
): string | undefined {
  if (!(s.gamma > 0 && s.gradientCheckpointing) || s.regularizerMethod === 'finite-differences') return undefined;
  const instead = `${n.setting('gamma', 0)} or ${n.setting('regularizerMethod', 'finite-differences')}`;
  return `${n.option('gradientCheckpointing')} cannot be had with ${n.setting('gamma', s.gamma)}: the regularizer's second derivatives need what checkpointing drops; leave it out (pairs are then taken a few at a time), or use ${instead}`;
}

function frozenBackbone(s: SpoSetting, n: SpoNaming): string | undefined {
  const { lowerSteps, learningRateBackbone, learningRateAdapters = 0 } = s;
  if (!(lowerSteps > 0 && learningRateBackbone === 0 && learningRateAdapters > 0)) return undefined;
  const steps = lowerSteps === 1 ? 'its step leads' : `its ${lowerSteps} steps lead`;
  return `${n.setting('learningRateBackbone', 0)} freezes the backbone, which is the variable of the lower level: ${steps} to a backbone that training never moves towards, and the penalty would pull the adapters alone; use ${n.setting('lowerSteps', 0)} for adapters without a lower level, or a learning rate above 0 for both levels`;
}

/** What is wrong with a setting, or undefined. */
export function spoConflict(s: SpoSetting, n: SpoNaming): string | undefined {
  if (s.gamma > 0 && s.regularizerMethod === 'finite-differences' && s.dtype === 'bfloat16')
    return `${n.setting('regularizerMethod', 'finite-differences')} expected dtype float32 or float64, found bfloat16: steps short enough for a difference round away in it; use ${n.setting('regularizerMethod', 'exact')}, or ${n.setting('dtype', 'float32')}`;
  const excluded = checkpointingConflict(s, n) ?? frozenBackbone(s, n);
  if (excluded) return excluded;
  if (!isFirstOrder(s)) return undefined;
  const beyond = beyondFirstOrder(s, n);
  if (!beyond) return undefined;
  const automatic = (s.penaltyForm ?? 'auto') === 'auto';
  const form = automatic
    ? `the first-order form of term (b), which ${n.setting('dtype', 'bfloat16')} takes`
    : n.setting('penaltyForm', 'first-order');
  const way = automatic ? n.setting('dtype', 'float32') : n.setting('penaltyForm', 'difference');
  return `${beyond.what} cannot be had with ${form}: ${beyond.why}; use ${beyond.remedy}, or ${way}`;
}
