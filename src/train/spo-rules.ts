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
}

/** How messages spell options. */
export interface SpoNaming {
  option(key: string): string;
  setting(key: string, value: string | number): string;
}

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

/** What is wrong with a setting, or undefined. */
export function spoConflict(s: SpoSetting, n: SpoNaming): string | undefined {
  if (s.gamma > 0 && s.regularizerMethod === 'finite-differences' && s.dtype === 'bfloat16')
    return `${n.setting('regularizerMethod', 'finite-differences')} expected dtype float32 or float64, found bfloat16: steps short enough for a difference round away in it; use ${n.setting('regularizerMethod', 'exact')}, or ${n.setting('dtype', 'float32')}`;
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
