// Squared norms of sequences' gradients of all linears that read one input, as one differentiable function. With X_i the rows
// of the input of sequence i and G_i the cotangents behind a linear, its gradient is G_iᵀ X_i, and
//   |G_iᵀ X_i|² = <X_i X_iᵀ, G_i G_iᵀ>,  for X: 2 G_i G_iᵀ X_i,  for G: 2 X_i X_iᵀ G_i.
// X_i X_iᵀ serves all of them, and the derivative for X is one product behind the sum of their G_i G_iᵀ. A linear with the same
// G and another input (an adapter's B beside the weight) adds to what stands left of G, and uses the same G_i G_iᵀ.
import { detachFromScope, scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { rowsOf, spread } from './backward.js';
import { add, addInPlace, mul, square } from './elementwise.js';
import { fusedOutputs } from './fused.js';
import {
  cast,
  clone,
  contiguous,
  emptyLike,
  fill,
  gatherRows,
  reshape,
  scatterRows,
  stack,
  transpose,
} from './movement.js';
import { type LinearContribution, matmul, matmulInto } from './product.js';
import { sum } from './reduce.js';
import { gramOf, rowIndices, type SequenceFactors } from './sequence-products.js';
import type { Span } from './streams.js';

/** A linear's gradient: scale · G_iᵀ X_i, its squares summed with those of its group. */
interface Use {
  readonly x: Tensor;
  readonly group: string;
  readonly scale: number;
}

/** A linear of the common input, and those of other inputs behind the same cotangents `[rows, out]`. */
interface Cotangents {
  readonly g: Tensor;
  readonly own: Use;
  readonly others: Use[];
}

const same = (a: Tensor, b: Tensor): boolean =>
  a.storage === b.storage && a.byteOffset === b.byteOffset && a.size === b.size && a.node === b.node;

const sumOf = (squares: readonly number[]): number => squares.reduce((n, t) => n + t, 0);

/** Linears of one input whose gradients are known by sequence, as they come. */
export class InputSquares {
  private readonly factors: SequenceFactors;
  private readonly x: Tensor;
  private readonly parts: Cotangents[] = [];
  private readonly values = new Map<string, Tensor>();
  private readonly kept: Tensor[] = [];

  constructor(factors: SequenceFactors, x: Tensor) {
    this.factors = factors;
    this.x = this.keep(x.alias());
  }

  private keep(t: Tensor): Tensor {
    this.kept.push(detachFromScope(t));
    return t;
  }

  /**
   * Takes a linear that reads this input, or has the cotangents of one that does.
   * @param value the squares `[S]`, without the scale
   * @returns whether it does
   */
  take({ x, g, scale }: LinearContribution, group: string, value: Tensor): boolean {
    if (same(x, this.x)) this.parts.push({ g: this.keep(g.alias()), own: { x: this.x, group, scale }, others: [] });
    else {
      const beside = this.parts.find((part) => same(part.g, g));
      if (!beside) return false;
      beside.others.push({ x: this.keep(x.alias()), group, scale });
    }
    const before = this.values.get(group);
    const scaled = scale === 1 ? value.alias() : mul(value, scale * scale);
    this.values.set(group, this.keep(before ? add(before, scaled) : scaled));
    return true;
  }

  /** The squares of each group, `[S]`: differentiable for the inputs and the cotangents. Once. */
  squares(): { group: string; tensor: Tensor }[] {
    const groups = [...this.values.keys()];
    const { parts } = this;
    const outputs = fusedOutputs({
      name: 'sequenceSquares',
      inputs: [this.x, ...parts.map((p) => p.g), ...parts.flatMap((p) => p.others.map((use) => use.x))],
      forward: () => ({ outputs: groups.map((group) => this.values.get(group)!.alias(null)), saved: [] }),
      definition: (...inputs) => this.definition(this.placed(inputs), groups),
      backward: ({ cotangents, saved }) => {
        const given = new Map(groups.map((group, i) => [group, cotangents[i]]));
        return scope(() => new Derivative(this.factors, this.placed(saved), given).run());
      },
    });
    this.dispose();
    return groups.map((group, i) => ({ group, tensor: outputs[i] }));
  }

  dispose(): void {
    for (const t of this.kept) t.dispose();
    this.kept.length = 0;
  }

  /** The linears over other tensors, in the order of the op's inputs. */
  private placed([x, ...rest]: readonly Tensor[]): Placed {
    const others = rest.slice(this.parts.length);
    let at = 0;
    const parts = this.parts.map(
      (part, i): Cotangents => ({
        g: rest[i],
        own: { ...part.own, x },
        others: part.others.map((use) => ({ ...use, x: others[at++] })),
      }),
    );
    return { x, parts };
  }

  /** From primitive ops. */
  private definition({ parts }: Placed, groups: readonly string[]): Tensor[] {
    const { spans, streams } = this.factors;
    const piece = (t: Tensor, { start, length }: Span): Tensor => gatherRows(t, rowIndices(start, length, t));
    const of = (g: Tensor, { x, scale }: Use): Tensor => {
      const rows = spread(x, streams);
      const each = spans.map((span) => sum(square(matmul(transpose(piece(g, span)), piece(rows, span)))));
      return mul(stack(each), scale * scale);
    };
    return groups.map((group) =>
      parts
        .flatMap(({ g, own, others }) => [own, ...others].filter((u) => u.group === group).map((u) => of(g, u)))
        .reduce((total, t) => add(total, t)),
    );
  }
}

interface Placed {
  x: Tensor;
  parts: readonly Cotangents[];
}

/** A use whose squares have a cotangent. */
interface Weighted {
  /** Its input, by sequence. */
  readonly rows: Tensor;
  /** `[S, 1]`: 2 scale² times the cotangent. */
  readonly weights: Tensor;
  /** Rows times the weight of their sequence; of inputs other than the common one. */
  readonly scaled: Tensor | null;
  /** The derivative for the input, by sequence. */
  readonly into: Tensor;
}

interface WeightedPart {
  readonly g: Tensor;
  readonly forG: Tensor;
  readonly own: Weighted | null;
  readonly others: readonly (Weighted | null)[];
}

const usesOf = ({ own, others }: WeightedPart): Weighted[] => [own, ...others].filter((use) => use !== null);

/** One derivative of the squares, for given cotangents of the groups. */
class Derivative {
  private readonly factors: SequenceFactors;
  private readonly x: Tensor;
  private readonly rows: Tensor;
  private readonly forX: Tensor;
  private readonly parts: readonly WeightedPart[];
  /** What has been written of the sequence at hand: products behind the first are added. */
  private readonly written = new Set<Tensor>();

  /** @param cotangents `[S]` by group; null where zero */
  constructor(factors: SequenceFactors, { x, parts }: Placed, cotangents: ReadonlyMap<string, Tensor | null>) {
    this.factors = factors;
    this.x = x;
    this.rows = factors.rowsOf(x);
    this.forX = emptyLike(this.rows);
    const known = new Map<string, Tensor>();
    const weightsOf = ({ group, scale }: Use): Tensor | null => {
      const [key, given] = [`${scale} ${group}`, cotangents.get(group)];
      if (given && !known.has(key)) known.set(key, reshape(mul(given.detach(), 2 * scale * scale), [-1, 1]));
      return known.get(key) ?? null;
    };
    const { streams } = factors;
    this.parts = parts.map(({ g, own, others }) => {
      const weights = weightsOf(own);
      return {
        g: contiguous(g.detach()),
        forG: emptyLike(g),
        own: weights && { rows: this.rows, weights, scaled: null, into: this.forX },
        others: others.map((use) => {
          const weights = weightsOf(use);
          const rows = contiguous(spread(use.x.detach(), streams));
          const scaled = weights && cast(mul(rows, gatherRows(weights, streams.rowSequence)), rows.dtype);
          return weights && { rows, weights, scaled, into: emptyLike(rows) };
        }),
      };
    });
  }

  /** Derivatives for the common input, the cotangents and the other inputs. */
  run(): (Tensor | null)[] {
    const { factors, parts } = this;
    const byProducts = this.prefersInnerProducts();
    const targets = [this.forX, ...parts.flatMap(({ forG, others }) => [forG, ...others.map((use) => use?.into)])];
    for (const [s, span] of factors.spans.entries()) {
      if (span.length === 0) continue;
      this.written.clear();
      scope(() => (byProducts ? this.throughInnerProducts(s, span) : this.throughGradients(s, span)));
      for (const t of targets) if (t && !this.written.has(t)) fill(pieceOf(t, span), 0);
    }
    const { rowMap, primalRows } = factors.streams;
    const merged = (t: Tensor): Tensor => (rowMap ? scatterRows(t, rowMap, primalRows) : t);
    const others = parts.flatMap((part) => part.others.map((use) => use && merged(use.into)));
    return [merged(this.forX), ...parts.map((p) => p.forG), ...others];
  }

  /** Multiply-adds of the two ways; inner products are symmetric, which halves them. */
  private prefersInnerProducts(): boolean {
    const lengths = this.factors.spans.map((span) => span.length);
    const [squares, total] = [sumOf(lengths.map((t) => t * t)), sumOf(lengths)];
    const width = this.rows.shape[1];
    let [inner, gradients] = [this.parts.some((p) => p.own) ? 1.5 * squares * width : 0, 0];
    for (const part of this.parts) {
      const out = part.g.shape[1];
      const uses = usesOf(part);
      if (uses.length > 0) inner += 1.5 * squares * out;
      for (const { rows } of uses) gradients += 3 * total * rows.shape[1] * out;
      for (const use of part.others) if (use) inner += 1.5 * squares * use.rows.shape[1];
    }
    return inner < gradients;
  }

  /** into += a b, or = where nothing has been written of it. */
  private put(into: Tensor, span: Span, a: Tensor, b: Tensor): void {
    matmulInto(pieceOf(into, span), cast(a, b.dtype), b, { accumulate: this.written.has(into) });
    this.written.add(into);
  }

  private throughInnerProducts(s: number, span: Span): void {
    const gramOfX = this.parts.some((p) => p.own) ? this.factors.gramsOf(this.x)[s] : null;
    const left = new Map<Tensor, Tensor>();
    const behind = new Map<Tensor, Tensor>();
    for (const { g, forG, own, others } of this.parts) {
      const uses = others.filter((use) => use !== null);
      const rows = pieceOf(g, span);
      if (own && !left.has(own.weights)) left.set(own.weights, mul(gramOfX!, weightOf(own, s)));
      const ofOwn = own && left.get(own.weights)!;
      if (uses.length > 0) {
        const gram = gramOf(rows);
        const sum = ofOwn ? clone(ofOwn) : null;
        const total = uses.reduce((into, use) => this.beside(use, span, gram, into), sum);
        this.put(forG, span, total!, rows);
        if (own) addTo(behind, own.weights, gram);
      } else if (own) {
        this.put(forG, span, ofOwn!, rows);
        const before = behind.get(own.weights);
        // Thin: what is symmetric costs less than one more pass over a matrix of rows.
        if (before && g.shape[1] < span.length) matmulInto(before, rows, transpose(rows), { accumulate: true });
        else addTo(behind, own.weights, gramOf(rows));
      }
    }
    const scaled = [...behind].map(([weights, gram]) => mul(gram, pieceOf(weights, { start: s, length: 1 })));
    if (scaled.length > 0)
      this.put(
        this.forX,
        span,
        scaled.reduce((total, t) => add(total, t)),
        pieceOf(this.rows, span),
      );
  }

  /** Of another input behind the same cotangents: its derivative, and its inner products times the weight, added to `into`. */
  private beside(use: Weighted, span: Span, gram: Tensor, into: Tensor | null): Tensor {
    const [rows, scaled] = [pieceOf(use.rows, span), pieceOf(use.scaled!, span)];
    this.put(use.into, span, gram, scaled);
    const sum = into ?? emptyLike(gram);
    matmulInto(sum, scaled, transpose(rows), { accumulate: into !== null });
    return sum;
  }

  private throughGradients(s: number, span: Span): void {
    for (const part of this.parts)
      for (const use of usesOf(part)) {
        const [g, rows] = [pieceOf(part.g, span), pieceOf(use.rows, span)];
        const gradient = emptyLike(rows, [g.shape[1], rows.shape[1]]);
        matmulInto(gradient, transpose(cast(mul(g, weightOf(use, s)), g.dtype)), rows);
        this.put(part.forG, span, rows, transpose(gradient));
        this.put(use.into, span, g, gradient);
      }
  }
}

function addTo(sums: Map<Tensor, Tensor>, key: Tensor, t: Tensor): void {
  const before = sums.get(key);
  if (before) addInPlace(before, t);
  else sums.set(key, t);
}

const pieceOf = (t: Tensor, { start, length }: Span): Tensor => rowsOf(t, start, length);
const weightOf = ({ weights }: Weighted, s: number): Tensor => rowsOf(weights, s, 1);
