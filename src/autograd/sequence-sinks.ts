// Sinks that keep the gradients of the sequences of a batch apart: their squared norms by group of parameters, and gradients
// accumulated with two coefficients for each sequence, from one backward pass seeded with 1. Knows parameters by what they
// receive (a product of rows, a vector, a lookup, the head), no model and no loss.
import { launch } from '../native/launch.js';
import { rowsOf } from '../ops/backward.js';
import { add, mul, square } from '../ops/elementwise.js';
import { embeddingProducts } from '../ops/embedding-squares.js';
import type { HeadContribution } from '../ops/head-backward.js';
import {
  cast,
  contiguous,
  emptyLike,
  gatherRows,
  type LookupContribution,
  reshape,
  scatterRows,
  stack,
  transpose,
  zeros,
} from '../ops/movement.js';
import { type LinearContribution, matmulInto, type VectorContribution } from '../ops/product.js';
import { sum } from '../ops/reduce.js';
import { formsGradients, innerByRows, SequenceFactors, squaresByRows } from '../ops/sequence-products.js';
import { InputSquares } from '../ops/sequence-squares.js';
import type { SequenceStreams, Span } from '../ops/streams.js';
import { accumulationDType } from '../tensor/dtype.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import { Tensor } from '../tensor/tensor.js';
import { type Contribution, type GradientShares, type GradientSink, trackedMask } from './tape.js';

/** A parameter of a pass, and where its two accumulated gradients go. */
export interface SequenceParameter {
  readonly name: string;
  /** Squared norms are summed by group. */
  readonly group: string;
  readonly first: Tensor | null;
  readonly second: Tensor | null;
}

export interface SequencePassOptions {
  /** The squared norm of each sequence's gradient, differentiable where the pass is recorded. */
  squares: boolean;
  /** The second gradient takes the sequences [0, secondCount) alone. */
  secondCount: number;
  /** The inner product of the gradients of the two sequences of each group as well; only with `squares`. */
  inner?: boolean;
}

type Known = LinearContribution | VectorContribution | LookupContribution | HeadContribution;

/** `[S, 2]`; a column by row of each of the two, `[rows, 1]`; `[2, targets]`. */
interface Coefficients {
  readonly bySequence: Tensor;
  readonly byRow: readonly Tensor[];
  readonly byTarget: Tensor;
}

/** One backward pass over a batch: `sinks` for its parameters; coefficients before it, `finish` after it. */
export class SequencePass {
  readonly streams: SequenceStreams;
  readonly options: SequencePassOptions;
  readonly sinks: readonly SequenceSink[];
  readonly factors: SequenceFactors;
  /** `[S]` terms of the squared norms by group, on the tape where the pass is recorded. */
  readonly terms: { readonly group: string; readonly tensor: Tensor }[] = [];
  /** Terms of the inner products of the pairs' gradients, float64 `[pairs]`, by group. */
  readonly innerTerms: { readonly group: string; readonly tensor: Tensor }[] = [];
  /** Rows of the sequences that the second gradient takes. */
  readonly secondSpans: readonly Span[];
  readonly secondRows: number;
  private readonly kept: Tensor[] = [];
  /** Linears of the input at hand. */
  private open: InputSquares | null = null;
  private readonly coefficients = new Map<string, Coefficients>();

  constructor(streams: SequenceStreams, parameters: readonly SequenceParameter[], options: SequencePassOptions) {
    this.streams = streams;
    this.options = options;
    this.factors = new SequenceFactors(streams);
    this.secondSpans = neighbours(streams.sequences.slice(0, options.secondCount).map((s) => s.rows));
    this.secondRows = this.secondSpans.reduce((n, { length }) => n + length, 0);
    if (options.inner && streams.headGroups.some(({ sequences }) => sequences.length !== 2))
      throw new RangeError('[SequencePass] expected streams of pairs where inner products are wanted');
    this.sinks = parameters.map((p) => new SequenceSink(this, p));
  }

  /** Coefficients `[2, S]` of the two accumulated gradients by group of parameters, in the accumulation dtype. */
  setCoefficients(byGroup: ReadonlyMap<string, Tensor>): void {
    for (const [group, coefficients] of byGroup) this.coefficients.set(group, this.spread(coefficients));
  }

  private spread(coefficients: Tensor): Coefficients {
    const { rowSequence, targetSequence } = this.streams;
    const [bySequence, first, second, byTarget] = scope(() => {
      const columns = contiguous(transpose(mul(coefficients.detach(), this.taking(coefficients))));
      const rows = gatherRows(columns, rowSequence);
      const column = (i: number): Tensor => contiguous(rows.view([rows.shape[0], 1], [2, 1], bytes(rows) * i));
      return [columns, column(0), column(1), contiguous(transpose(gatherRows(columns, targetSequence)))];
    }).map((t) => this.keep(t));
    return { bySequence, byRow: [first, second], byTarget };
  }

  /** Which sequences each of the two gradients takes, `[2, S]`. */
  private taking({ dtype, device, shape }: Tensor): Tensor {
    const count = this.streams.sequences.length;
    const takes = Float64Array.from({ length: 2 * count }, (_, i) => Number(i < count + this.options.secondCount));
    return Tensor.from(takes, { dtype: dtype as 'float32' | 'float64', device, shape });
  }

  given(group: string): Coefficients {
    const found = this.coefficients.get(group);
    if (!found)
      throw new Error(`[SequencePass] expected coefficients of ${group} before the backward pass, found none`);
    return found;
  }

  /** Targets before the end of those that the second gradient takes. */
  get secondTargets(): number {
    const taken = this.streams.sequences.slice(0, this.options.secondCount);
    return Math.max(0, ...taken.map(({ targets }) => targets.start + targets.length));
  }

  keep<T extends Tensor>(t: T): T {
    this.kept.push(detachFromScope(t));
    return t;
  }

  /** Adds to the squared norms of a group: `[S]`. */
  addSquares(group: string, tensor: Tensor): void {
    this.terms.push({ group, tensor: this.keep(tensor) });
  }

  /** The same of a linear, whose squares `[S]` are `value` without its scale: with those of its neighbours. */
  addLinearSquares(contribution: LinearContribution, group: string, value: Tensor): void {
    const { x, g, scale } = contribution;
    if (trackedMask([x, g]) === 0) {
      this.addSquares(group, mul(value, scale * scale));
      return;
    }
    if (this.open?.take(contribution, group, value)) return;
    this.closeLinears();
    this.open = new InputSquares(this.factors, contribution.x);
    this.open.take(contribution, group, value);
  }

  private closeLinears(): void {
    for (const { group, tensor } of this.open?.squares() ?? []) this.addSquares(group, tensor);
    this.open = null;
  }

  /** Adds to the inner products of a group: `[pairs]`. */
  addInner(group: string, tensor: Tensor): void {
    if (!this.options.inner) return;
    this.innerTerms.push({ group, tensor: this.keep(cast(tensor.detach(), 'float64')) });
  }

  /** After the backward pass, while outer transforms still record: parameters with several kinds of contributions. */
  finish(): void {
    scope(() => {
      this.closeLinears();
      for (const sink of this.sinks) sink.finish();
    });
  }

  /** Squared norms of the gradients by group: float64 `[S]` each. */
  squaredNorms(): Map<string, Tensor> {
    return totalsOf(this.terms);
  }

  /** Inner products of the pairs' gradients by group: float64 `[pairs]` each; empty where not asked for. */
  innerProducts(): Map<string, Tensor> {
    return totalsOf(this.innerTerms);
  }

  dispose(): void {
    this.open?.dispose();
    this.factors.release();
    for (const t of this.kept) t.dispose();
    this.kept.length = 0;
  }
}

/** Sums by group, in float64. */
function totalsOf(terms: SequencePass['terms']): Map<string, Tensor> {
  const totals = new Map<string, Tensor>();
  for (const { group, tensor } of terms) {
    const before = totals.get(group);
    const term = cast(tensor.detach(), 'float64');
    totals.set(group, before ? add(before, term) : term);
  }
  return totals;
}

const bytes = (t: Tensor): number => (t.dtype === 'float64' ? 8 : 4);

/** The sink of one parameter in a pass. */
export class SequenceSink implements GradientSink {
  readonly buffer = null;
  readonly differentiable = true;
  private readonly pass: SequencePass;
  private readonly parameter: SequenceParameter;
  private linear = false;
  private embedding: { head: HeadContribution | null; lookup: LookupContribution | null } | null = null;

  constructor(pass: SequencePass, parameter: SequenceParameter) {
    this.pass = pass;
    this.parameter = parameter;
  }

  get shares(): GradientShares {
    const { first, second } = this.parameter;
    const { secondTargets, options } = this.pass;
    const byTarget = first || second ? this.given.byTarget : null;
    return { first, second, byTarget, secondTargets, squares: options.squares };
  }

  private get given(): Coefficients {
    return this.pass.given(this.parameter.group);
  }

  accept(contribution: Contribution | Tensor): void {
    const known = contribution as Known;
    const kind = 'materialize' in contribution ? known.kind : 'tensor';
    if (kind === 'linear') this.acceptLinear(known as LinearContribution);
    else if (kind === 'vector') this.acceptVector(known as VectorContribution);
    else if (kind === 'lookup') this.acceptLookup(known as LookupContribution);
    else if (kind === 'head') this.acceptHead(known as HeadContribution);
    else
      throw new Error(
        `[SequenceSink] expected a gradient of ${this.parameter.name} that is known by sequence, found a plain tensor`,
      );
  }

  // ---- products of rows ---------------------------------------------------------------------------------------------

  private acceptLinear(contribution: LinearContribution): void {
    const { x, g, scale } = contribution;
    if (this.linear)
      throw new Error(
        `[SequenceSink] expected ${this.parameter.name} to be used by one linear layer, found a second: their gradients would have to be added before squaring`,
      );
    this.linear = true;
    const { pass } = this;
    const { first, second, group } = this.parameter;
    const { streams, options } = pass;
    const shape = {
      lengths: streams.sequences.map((s) => s.rows.length),
      primalRows: streams.primalRows,
      in: x.shape[1],
      out: g.shape[1],
    };
    const wanted = { squares: options.squares, first: first !== null, secondRows: second ? pass.secondRows : 0 };
    const rows = contiguous(g.detach());
    const forms = formsGradients(shape, wanted);
    const value = forms ? this.throughGradients(x, rows, scale) : this.throughProducts(x, rows, scale);
    if (options.squares && value) pass.addLinearSquares(contribution, group, value);
  }

  /** Forms each sequence's gradient; its squares `[S]` without the scale, where they are wanted. */
  private throughGradients(x: Tensor, g: Tensor, scale: number): Tensor | null {
    const { factors, options, streams } = this.pass;
    const { bySequence } = this.given;
    const { first, second } = this.parameter;
    const wide = accumulationDType(x.dtype);
    const rows = factors.rowsOf(x);
    const count = factors.spans.length;
    const sums = options.squares ? zeros([count, 2], { dtype: 'float64', device: x.device }) : null;
    const coefficients = scale === 1 ? bySequence : mul(bySequence, scale);
    // The gradient of a pair's first sequence, for its product with the second's.
    const kept = options.inner ? emptyLike(x, [g.shape[1], x.shape[1]], wide) : null;
    for (const { sequences } of streams.headGroups)
      for (const [i, s] of sequences.entries()) {
        const { start, length } = factors.spans[s];
        const pair = (t: Tensor): Tensor => reshape(rowsOf(t, s, 1), [2]);
        const into = s < options.secondCount ? second : null;
        const [tile, other] = i === 0 ? [kept, null] : [null, kept];
        const parts = [g, rows].map((t) => rowsOf(t, start, length));
        launch('sequenceGradient', [sums && pair(sums), first, into, tile, ...parts, other, pair(coefficients)]);
      }
    for (const t of [first, second]) if (t) t.storage.version++;
    if (!sums) return null;
    if (options.inner) this.addInnerSums(sums, scale);
    return cast(contiguous(sums.view([count], [2])), wide);
  }

  /** The second sums of the second sequences of pairs. */
  private addInnerSums(sums: Tensor, scale: number): void {
    const { headGroups } = this.pass.streams;
    const column = contiguous(sums.view([sums.shape[0], 1], [2, 1], bytes(sums)));
    const products = headGroups.map(({ sequences }) => reshape(rowsOf(column, sequences[1], 1), []));
    this.pass.addInner(this.parameter.group, mul(stack(products), scale * scale));
  }

  /** The accumulated gradients as products of their own; squares from inner products. */
  private throughProducts(x: Tensor, g: Tensor, scale: number): Tensor | null {
    const { streams, factors, options, secondSpans } = this.pass;
    const { first, second } = this.parameter;
    if (first) {
      const weighted = mul(g, this.given.byRow[0]);
      const merged = streams.rowMap ? scatterRows(weighted, streams.rowMap, streams.primalRows) : weighted;
      addProduct(first, merged, x.detach(), scale);
    }
    for (const { start, length } of second ? secondSpans : []) {
      const part = (t: Tensor): Tensor => rowsOf(t, start, length);
      addProduct(second!, mul(part(g), part(this.given.byRow[1])), part(factors.rowsOf(x)), scale);
    }
    if (options.inner) this.pass.addInner(this.parameter.group, mul(innerByRows(factors, x, g), scale * scale));
    return options.squares ? squaresByRows(factors, x, g) : null;
  }

  // ---- vectors ------------------------------------------------------------------------------------------------------

  private acceptVector({ bySequence }: VectorContribution): void {
    const { options } = this.pass;
    const { first, second, group } = this.parameter;
    [first, second].forEach((into, i) => {
      if (!into) return;
      const columns = this.given.bySequence;
      const weights = columns.view([1, bySequence.shape[0]], [1, 2], bytes(columns) * i);
      const row = into.view([1, into.size], [into.size, 1]);
      const source = bySequence.detach();
      matmulInto(row, weights, source, { accumulate: true });
    });
    if (options.squares) this.pass.addSquares(group, sum(square(bySequence), { axes: 1 }));
    if (options.inner) {
      const rows = bySequence.detach();
      const row = (s: number): Tensor => rowsOf(rows, s, 1);
      const { headGroups } = this.pass.streams;
      this.pass.addInner(group, stack(headGroups.map(({ sequences: [a, b] }) => sum(mul(row(a), row(b))))));
    }
  }

  // ---- embedding and head -------------------------------------------------------------------------------------------

  private acceptLookup(contribution: LookupContribution): void {
    const { first, second } = this.parameter;
    const g = contiguous(contribution.g.detach());
    const add = (into: Tensor, { start, length }: Span, weights: Tensor): void => {
      const part = (t: Tensor): Tensor => rowsOf(t, start, length);
      const rows = contiguous(mul(part(g), part(weights)));
      into.storage.version++;
      if (rows.size > 0) launch('scatterAddRows', [into, rows, part(contribution.ids)]);
    };
    if (first) add(first, { start: 0, length: g.shape[0] }, this.given.byRow[0]);
    if (second) for (const span of this.pass.secondSpans) add(second, span, this.given.byRow[1]);
    if (this.pass.options.squares) this.embeddingOf('lookup', contribution);
  }

  private acceptHead(contribution: HeadContribution): void {
    for (const t of [this.parameter.first, this.parameter.second]) if (t) t.storage.version++;
    if (this.pass.options.squares) this.embeddingOf('head', contribution);
  }

  /** A tied matrix receives both: they are added before squaring, in finish(). */
  private embeddingOf(kind: 'head' | 'lookup', contribution: HeadContribution | LookupContribution): void {
    this.embedding ??= { head: null, lookup: null };
    if (this.embedding[kind])
      throw new Error(`[SequenceSink] expected one ${kind} of ${this.parameter.name}, found a second`);
    const kept = contribution.kept((t) => this.pass.keep(t.alias()));
    this.embedding = { ...this.embedding, [kind]: kept };
  }

  finish(): void {
    if (!this.embedding) return;
    const { squares, inner } = embeddingProducts(this.embedding, this.pass.streams);
    this.pass.addSquares(this.parameter.group, squares);
    if (inner) this.pass.addInner(this.parameter.group, inner);
  }
}

/** Spans in order, those that lie side by side as one; empty ones left out. */
function neighbours(spans: readonly Span[]): Span[] {
  const merged: Span[] = [];
  for (const { start, length } of spans) {
    const last = merged.at(-1);
    if (length === 0) continue;
    if (last && last.start + last.length === start)
      merged[merged.length - 1] = { start: last.start, length: last.length + length };
    else merged.push({ start, length });
  }
  return merged;
}

/** into[out, in] += scale * gᵀ x. */
function addProduct(into: Tensor, g: Tensor, x: Tensor, scale: number): void {
  const dtype = into.dtype === 'float32' && x.dtype === 'bfloat16' ? x.dtype : into.dtype;
  matmulInto(into, transpose(cast(g, dtype)), cast(x, dtype), { alpha: scale, accumulate: true });
}
