// The SPO objective (arXiv 2507.07723, Eq. 9; spo.md §2) as a function of its parts.
import { KeelgradError } from '../errors.js';

/** The parts of F, evaluated at (θ, φ) before an update. */
export interface SpoParts {
  /** L_DPO(θ, φ) (Eq. 1). */
  dpo: number;
  /** L_SFT(θ, φ) (Eq. 72). */
  sft: number;
  /** L*_SFT(φ) ≈ L_SFT(θ_K, φ) (Eqs. 10, 11); `sft` itself without a lower level. */
  sftStar: number;
  /** R(θ, φ) (Eq. 77). */
  regularizer: number;
}

export interface SpoWeights {
  /** λ, of the value-function penalty. */
  lambda: number;
  /** γ, of the regularizer. */
  gamma: number;
}

/** F = L_DPO + λ [L_SFT - L*_SFT] + γ R (Eq. 9). */
export function spoObjective(parts: SpoParts, weights: SpoWeights): number {
  for (const [name, value] of Object.entries(weights))
    if (!(value >= 0 && Number.isFinite(value)))
      throw new KeelgradError(`${name}: expected a number of at least 0, found ${value}`);
  return parts.dpo + weights.lambda * (parts.sft - parts.sftStar) + weights.gamma * parts.regularizer;
}
