// What the passes of one step of SPO leave behind: losses on the device, metrics under way, gradients of single sequences
// measured. Owns its tensors until they are handed over as losses or disposed of.
import { regularizerValue } from '../objectives/regularizer.js';
import type { GradientProducts } from '../objectives/sequence-gradients.js';
import { add } from '../ops/elementwise.js';
import type { HostArray } from '../tensor/dtype.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { quiet } from './batch-metrics.js';
import type { MainPass } from './spo-passes.js';

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

/** Of the gradients of some pairs, on their way to the host. */
export interface PairProducts {
  /** Squared norms, chosen first. */
  squares: Promise<ArrayLike<number>>;
  /** Inner products of chosen and rejected; null where they are not known. */
  inner: Promise<ArrayLike<number>> | null;
}

/** Starts reading products, summed over some groups of parameters; their tensors may be disposed of at once. */
export function readProducts(products: GradientProducts, groups: ReadonlySet<string>): PairProducts {
  const read = (byGroup: ReadonlyMap<string, Tensor>): Promise<HostArray> | null => {
    const wanted = [...byGroup].filter(([group]) => groups.has(group)).map(([, t]) => t);
    if (wanted.length === 0) return null;
    return scope(() => ({ values: quiet(wanted.reduce((a, b) => add(a, b)).data()) })).values;
  };
  return { squares: read(products.squaredNorms)!, inner: read(products.innerProducts) };
}

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
  private readonly measuredPairs: MeasuredPairs[] = [];

  add(pass: MainPass): void {
    this.dpo.push(pass.dpo);
    this.sft.push(pass.sft);
    this.measured.push(quiet(pass.metrics));
    this.tokens += pass.tokens;
  }

  star(values: readonly Tensor[]): void {
    this.optimum.push(...values.map((t) => detachFromScope(t)));
  }

  /** @param divisors what R divides the norms by, chosen first */
  pairs(products: PairProducts, divisors: readonly number[]): void {
    this.measuredPairs.push({ products, divisors });
  }

  get hasPairs(): boolean {
    return this.measuredPairs.length > 0;
  }

  /** R and what it is made of; nothing where no gradient was measured. */
  async gradientMetrics(): Promise<Record<string, number>> {
    const all = await Promise.all(this.measuredPairs.map(pairNorms));
    if (all.length === 0) return {};
    const { value, activeFraction } = regularizerValue(
      all.flatMap((part) => part.compared[0]),
      all.flatMap((part) => part.compared[1]),
    );
    const cosines = all.flatMap((part) => part.cosines);
    return {
      'spo/regularizer': value,
      'spo/active_fraction': activeFraction,
      'grad_norm/chosen': mean(all.flatMap((part) => part.plain[0])),
      'grad_norm/rejected': mean(all.flatMap((part) => part.plain[1])),
      ...(cosines.length > 0 && { grad_cosine: mean(cosines) }),
    };
  }

  get losses(): Tensor[] {
    return [...this.dpo, ...this.sft, ...this.optimum, ...(this.gap ? [this.gap] : [])];
  }

  dispose(): void {
    for (const t of this.losses) t.dispose();
  }
}

interface MeasuredPairs {
  readonly products: PairProducts;
  readonly divisors: readonly number[];
}

interface PairNorms {
  /** Norms of chosen and of rejected gradients, and the same as R compares them. */
  readonly plain: readonly [number[], number[]];
  readonly compared: readonly [number[], number[]];
  readonly cosines: number[];
}

async function pairNorms({ products, divisors }: MeasuredPairs): Promise<PairNorms> {
  const [squares, inner] = await Promise.all([products.squares, products.inner]);
  const norms = Array.from(squares, Math.sqrt);
  const half = norms.length / 2;
  const sides = (values: number[]): [number[], number[]] => [values.slice(0, half), values.slice(half)];
  const plain = sides(norms);
  const cosine = (product: number, i: number): number => {
    const lengths = plain[0][i] * plain[1][i];
    return lengths > 0 ? product / lengths : 0;
  };
  return { plain, compared: sides(norms.map((n, s) => n / divisors[s])), cosines: Array.from(inner ?? [], cosine) };
}
