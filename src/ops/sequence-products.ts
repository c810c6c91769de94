// Products of one sequence's factors: of a weight's gradient G_iᵀ X_i for every sequence i, its square, without or with the
// gradient itself. <G_iᵀ X_i, G_iᵀ X_i> = <X_i X_iᵀ, G_i G_iᵀ>: whichever costs less. What follows for X and G is
// sequence-squares.ts's business.
import { launch } from '../native/launch.js';
import { accumulationDType } from '../tensor/dtype.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { rowsOf, spread } from './backward.js';
import { mul } from './elementwise.js';
import { contiguous, emptyLike, stack, transpose } from './movement.js';
import { matmulInto } from './product.js';
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
export function gramOf(a: Tensor, b: Tensor = a): Tensor {
  const out = emptyLike(a, [a.shape[0], b.shape[0]], accumulationDType(a.dtype));
  if (out.size > 0) matmulInto(out, a, transpose(b));
  return out;
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

/** int32 indices of consecutive rows. */
export const rowIndices = (start: number, length: number, like: Tensor): Tensor => {
  const ids = emptyLike(like, [length], 'int32');
  if (length > 0) launch('arange', [ids], [start, 1]);
  return ids;
};
