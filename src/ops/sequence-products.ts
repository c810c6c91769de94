// Products of one sequence's factors: of a weight's gradient G_iᵀ X_i for every sequence i, its square, without or with the
// gradient itself. <G_iᵀ X_i, G_iᵀ X_i> = <X_i X_iᵀ, G_i G_iᵀ>: whichever costs less.
import { launch } from '../native/launch.js';
import { accumulationDType } from '../tensor/dtype.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { rowsOf, spread } from './backward.js';
import { mul, square } from './elementwise.js';
import { fused } from './fused.js';
import { cast, contiguous, emptyLike, fill, gatherRows, reshape, scatterRows, stack, transpose } from './movement.js';
import { matmul, matmulInto } from './product.js';
import { sum } from './reduce.js';
import type { SequenceStreams, Span } from './streams.js';

/** Moving a number to or from memory costs about as much as so many multiply-adds. */
const MOVE = 8;

/** What a weight's factors look like. */
export interface FactorShape {
  /** Rows of each sequence, and of the packed axis. */
  readonly lengths: readonly number[];
  readonly primalRows: number;
  readonly in: number;
  readonly out: number;
}

const squares = (lengths: readonly number[]): number => lengths.reduce((n, t) => n + t * t, 0);
const total = (lengths: readonly number[]): number => lengths.reduce((n, t) => n + t, 0);

/**
 * Whether to form each sequence's gradient, in multiply-adds: `first` and `second` accumulated gradients then are read and
 * written once for each, else they are products of their own; squares else come from the rows' inner products.
 */
export function formsGradients(
  shape: FactorShape,
  wanted: { squares: boolean; first: boolean; secondRows: number },
): boolean {
  const weight = shape.in * shape.out;
  const passes = (wanted.first ? 2 : 0) + (wanted.secondRows > 0 ? 2 : 0);
  const formed = weight * (total(shape.lengths) + MOVE * passes * shape.lengths.length);
  const products = weight * ((wanted.first ? shape.primalRows : 0) + wanted.secondRows);
  const inner = wanted.squares ? squares(shape.lengths) * (shape.in + shape.out) : 0;
  return formed < products + inner;
}

/** Whether the derivative of the squares goes through the gradients, two products of rows each, or inner products. */
const derivativeForms = ({ lengths, in: width, out }: FactorShape): boolean =>
  3 * width * out * total(lengths) < 2 * squares(lengths) * (width + out);

/** One input's rows by sequence, with their inner products once they were asked for. */
interface KnownInput {
  readonly source: Tensor;
  readonly rows: Tensor;
  grams: readonly Tensor[] | null;
}

/**
 * Factors of the last inputs, by sequence: several linears in a row read one input, their adapters another. Off the tape.
 */
export class SequenceFactors {
  readonly streams: SequenceStreams;
  readonly spans: readonly Span[];
  private known: KnownInput[] = [];

  constructor(streams: SequenceStreams) {
    this.streams = streams;
    this.spans = streams.sequences.map((s) => s.rows);
  }

  /** `[rows, in]` of x `[primal rows, in]`, contiguous. */
  rowsOf(x: Tensor): Tensor {
    return this.input(x).rows;
  }

  /** X_i X_iᵀ of each sequence, in the accumulation dtype. */
  gramsOf(x: Tensor): readonly Tensor[] {
    const input = this.input(x);
    input.grams ??= this.spans.map(({ start, length }) => detachFromScope(gramOf(rowsOf(input.rows, start, length))));
    return input.grams;
  }

  private input(x: Tensor): KnownInput {
    const same = ({ source }: KnownInput): boolean =>
      source.storage === x.storage && source.byteOffset === x.byteOffset && source.size === x.size;
    let input = this.known.find(same);
    if (!input) {
      const rows = detachFromScope(scope(() => contiguous(spread(x.detach(), this.streams))));
      input = { source: detachFromScope(x.detach()), rows, grams: null };
    }
    const others = this.known.filter((k) => k !== input);
    for (const old of others.slice(1)) free(old);
    this.known = [input, ...others.slice(0, 1)];
    return input;
  }

  release(): void {
    this.known.forEach(free);
    this.known = [];
  }
}

const free = ({ source, rows, grams }: KnownInput): void => {
  for (const t of [source, rows, ...(grams ?? [])]) t.dispose();
};

/** a bᵀ in the accumulation dtype, of rows. */
function gramOf(a: Tensor, b: Tensor = a): Tensor {
  const out = emptyLike(a, [a.shape[0], b.shape[0]], accumulationDType(a.dtype));
  if (out.size > 0) matmulInto(out, a, transpose(b));
  return out;
}

/** aᵀ b `[out, in]` of rows a `[T, out]` and b `[T, in]`, in the accumulation dtype, into `out`. */
function gradientInto(out: Tensor, a: Tensor, b: Tensor): void {
  if (a.shape[0] > 0) matmulInto(out, transpose(a), b);
  else fill(out, 0);
}

/** |G_iᵀ X_i|² of each sequence from inner products: `[S]` in the accumulation dtype. */
export function squaresByRows(factors: SequenceFactors, x: Tensor, g: Tensor): Tensor {
  const grams = factors.gramsOf(x);
  return stack(factors.spans.map(({ start, length }, s) => sum(mul(grams[s], gramOf(rowsOf(g, start, length))))));
}

/** <G_iᵀ X_i, G_jᵀ X_j> of the two sequences i, j of each group from inner products: `[groups]`. */
export function innerByRows(factors: SequenceFactors, x: Tensor, g: Tensor): Tensor {
  const rows = factors.rowsOf(x);
  const products = factors.streams.headGroups.map(({ sequences }) => {
    const [a, b] = sequences.map((s) => factors.spans[s]);
    const between = (t: Tensor): Tensor => gramOf(rowsOf(t, a.start, a.length), rowsOf(t, b.start, b.length));
    return sum(mul(between(rows), between(g)));
  });
  return stack(products);
}

/**
 * |G_iᵀ X_i|² of each sequence as a differentiable function of x `[primal rows, in]` and g `[rows, out]`, whose value is known.
 */
export function sequenceSquares(x: Tensor, g: Tensor, value: Tensor, factors: SequenceFactors): Tensor {
  const { streams } = factors;
  return fused({
    name: 'sequenceSquares',
    inputs: [x, g],
    forward: () => ({ output: value.alias(null), saved: [] }),
    definition: (a, b) => {
      const rows = spread(a, streams);
      const part = (t: Tensor, { start, length }: Span): Tensor => gatherRows(t, rowIndices(start, length, t));
      return stack(factors.spans.map((span) => sum(square(matmul(transpose(part(b, span)), part(rows, span))))));
    },
    backward: ({ g: cotangent, saved: [a, b], needs }) => {
      const shape: FactorShape = {
        lengths: factors.spans.map((s) => s.length),
        primalRows: streams.primalRows,
        in: a.shape[1],
        out: b.shape[1],
      };
      const rows = factors.rowsOf(a);
      const plain = contiguous(b.detach());
      const perRow = gatherRows(reshape(mul(cotangent.detach(), 2), [-1, 1]), streams.rowSequence);
      const scaled = cast(mul(plain, perRow), plain.dtype);
      const [forRows, forG] = [emptyLike(rows), emptyLike(plain)];
      const derivative = derivativeForms(shape) ? throughGradients : throughInnerProducts;
      derivative(factors, a, { rows, g: plain, scaled }, { rows: forRows, g: forG });
      const merged = streams.rowMap && needs[0] ? scatterRows(forRows, streams.rowMap, streams.primalRows) : forRows;
      return [merged, forG];
    },
  });
}

const rowIndices = (start: number, length: number, like: Tensor): Tensor => {
  const ids = emptyLike(like, [length], 'int32');
  if (length > 0) launch('arange', [ids], [start, 1]);
  return ids;
};

interface Factors {
  rows: Tensor;
  g: Tensor;
}

/** Derivatives 2 a G V and 2 a X Vᵀ with V = G_iᵀ X_i formed. */
function throughGradients(
  factors: SequenceFactors,
  _x: Tensor,
  { rows, g, scaled }: Factors & { scaled: Tensor },
  into: Factors,
): void {
  const gradient = emptyLike(rows, [g.shape[1], rows.shape[1]]);
  for (const { start, length } of factors.spans) {
    if (length === 0) continue;
    const of = (t: Tensor): Tensor => rowsOf(t, start, length);
    gradientInto(gradient, of(scaled), of(rows));
    matmulInto(of(into.g), of(rows), transpose(gradient));
    matmulInto(of(into.rows), of(g), gradient);
  }
}

/** Derivatives 2 a (G Gᵀ) X and 2 a (X Xᵀ) G. */
function throughInnerProducts(
  factors: SequenceFactors,
  x: Tensor,
  { rows, g, scaled }: Factors & { scaled: Tensor },
  into: Factors,
): void {
  const grams = factors.gramsOf(x);
  for (const [s, { start, length }] of factors.spans.entries()) {
    if (length === 0) continue;
    const of = (t: Tensor): Tensor => rowsOf(t, start, length);
    matmulInto(of(into.g), cast(grams[s], g.dtype), of(scaled));
    matmulInto(of(into.rows), cast(gramOf(of(scaled), of(g)), rows.dtype), of(rows));
  }
}
