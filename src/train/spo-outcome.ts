// What the passes of one step of SPO leave behind: losses on the device, metrics under way, norms of the regularizer.
// Owns its tensors until they are handed over as losses or disposed of.
import { regularizerValue } from '../objectives/regularizer.js';
import { detachFromScope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { quiet } from './batch-metrics.js';
import type { MainPass } from './spo-passes.js';

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

export class Outcome {
  readonly dpo: Tensor[] = [];
  readonly sft: Tensor[] = [];
  readonly optimum: Tensor[] = [];
  /** L_SFT(θ) - L_SFT(θ_K) where it was found to first order. */
  gap: Tensor | null = null;
  /** Norms of the terms of the gradient. */
  terms: Promise<Record<string, number>> = Promise.resolve({});
  readonly measured: Promise<Record<string, number>>[] = [];
  tokens = 0;
  /** Norms of chosen and rejected gradients, and the same as R compares them. */
  private readonly plain: [number[], number[]] = [[], []];
  private readonly compared: [number[], number[]] = [[], []];
  private readonly cosines: number[] = [];

  add(pass: MainPass): void {
    this.dpo.push(pass.dpo);
    this.sft.push(pass.sft);
    this.measured.push(quiet(pass.metrics));
    this.tokens += pass.tokens;
  }

  star(values: readonly Tensor[]): void {
    this.optimum.push(...values.map((t) => detachFromScope(t)));
  }

  /** Of some pairs, chosen first. */
  norms(plain: readonly number[], compared: readonly number[]): void {
    const half = plain.length / 2;
    for (const [into, norms] of [
      [this.plain, plain],
      [this.compared, compared],
    ] as const)
      for (const side of [0, 1]) into[side].push(...norms.slice(side * half, (side + 1) * half));
  }

  /** Of one pair's gradients. */
  cosine(inner: number, [chosen, rejected]: readonly number[]): void {
    this.cosines.push(chosen * rejected > 0 ? inner / (chosen * rejected) : 0);
  }

  regularizerMetrics(): Record<string, number> {
    const { value, activeFraction } = regularizerValue(...this.compared);
    return {
      'spo/regularizer': value,
      'spo/active_fraction': activeFraction,
      'grad_norm/chosen': mean(this.plain[0]),
      'grad_norm/rejected': mean(this.plain[1]),
      ...(this.cosines.length > 0 && { grad_cosine: mean(this.cosines) }),
    };
  }

  get losses(): Tensor[] {
    return [...this.dpo, ...this.sft, ...this.optimum, ...(this.gap ? [this.gap] : [])];
  }

  dispose(): void {
    for (const t of this.losses) t.dispose();
  }
}
