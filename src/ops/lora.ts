// Linears that read one input, with low-rank adapters (LoRA, Hu et al. 2021) where they have them: y = x wᵀ + bias +
// scale · (x aᵀ) bᵀ. Owns the order of the products, forward and backward; the copies of a and b that they read are a caller's.
//
// The adapters' products are thin: what counts is how often rows pass through memory. The a's are stacked, so that x is read
// once for all of them. The product with b comes first and the base product is added to it: an output is then written by
// the thin product and read behind the arithmetic of the base product, instead of read and written by the thin one; and it
// is rounded once at its full size. Backward likewise: dx starts as dlow a and every base product is added to it, where
// separate linears make a dx each, to be added up. What passes through memory behind no arithmetic, in bfloat16 with 4096
// rows and rank 16 (H100, 3.35 TB/s), beside separate linears whose thin products come second:
//   q, k, v   896 -> 896, 128, 128   forward 17 MB,  5 us, of 41 MB;   backward to x 7 MB, 2 us, of 88 MB
//   gate, up  896 -> 4864, 4864      forward 87 MB, 26 us, of 174 MB;  backward to x 7 MB, 2 us, of 51 MB
// [x | low] [w | scale b]ᵀ as one product would save the forward's writes, too, but needs a copy of w beside b, made again
// whenever either changes, and room behind the rows of x from every op that makes them.
import type { BackwardContext, Cotangent } from '../autograd/tape.js';
import type { DType } from '../tensor/dtype.js';
import { scope } from '../tensor/scope.js';
import type { Tensor } from '../tensor/tensor.js';
import { linearBackward, linearsBackward } from './backward.js';
import { add, mul } from './elementwise.js';
import { fusedOutputs } from './fused.js';
import { cast, copyInto, emptyLike, fill, slice } from './movement.js';
import { biasCotangent, LinearContribution, linear, matmulInto, requireLinear } from './product.js';

/** A low-rank change of a weight `[out, in]`: scale · b a, with a `[r, in]` and b `[out, r]`. */
export interface Adapter {
  readonly a: Tensor;
  readonly b: Tensor;
}

/** One of the linears that read an input. */
export interface AdaptedLinear {
  readonly weight: Tensor;
  readonly bias: Tensor | null;
  readonly adapter: Adapter | null;
}

/** What the products read of several adapters: all a's stacked, `[sum of r, in]`, and the b's, in the dtype of the input. */
export interface LowRank {
  readonly a: Tensor;
  readonly b: readonly Tensor[];
}

/** adaptedLinears from primitive ops. */
export const adaptedLinearsDefinition = (x: Tensor, linears: readonly AdaptedLinear[], scale: number): Tensor[] =>
  linears.map(({ weight, bias, adapter }) => {
    const base = linear(x, weight, bias);
    if (!adapter) return base;
    const [a, b] = [adapter.a, adapter.b].map((t) => cast(t, x.dtype));
    return add(base, mul(linear(linear(x, a), b), scale));
  });

const isStacked = (adapters: readonly Adapter[], dtype: DType): boolean =>
  adapters.length === 1 && adapters[0].a.dtype === dtype && adapters[0].a.contiguous;

/** Memory for what the products read; a null means the adapter's own tensor. */
export function lowRankBuffers(adapters: readonly Adapter[], dtype: DType): { a: Tensor | null; b: (Tensor | null)[] } {
  const [{ a }] = adapters;
  const rank = adapters.reduce((r, t) => r + t.a.shape[0], 0);
  return {
    a: isStacked(adapters, dtype) ? null : emptyLike(a, [rank, a.shape[1]], dtype),
    b: adapters.map(({ b }) => (b.dtype === dtype ? null : emptyLike(b, b.shape, dtype))),
  };
}

/** Writes the adapters' values into their buffers. */
export function fillLowRank(adapters: readonly Adapter[], into: ReturnType<typeof lowRankBuffers>): void {
  scope(() => {
    let at = 0;
    adapters.forEach(({ a, b }, i) => {
      if (into.a) copyInto(slice(into.a, 0, at, at + a.shape[0]), a.detach());
      at += a.shape[0];
      const own = into.b[i];
      if (own) copyInto(own, b.detach());
    });
  });
}

/** What the products read: the buffers, and the adapters' own tensors, off the tape, where there are none. */
export const lowRankOf = (adapters: readonly Adapter[], into: ReturnType<typeof lowRankBuffers>): LowRank => ({
  a: (into.a ?? adapters[0].a).detach(),
  b: adapters.map(({ b }, i) => (into.b[i] ?? b).detach()),
});

function freshLowRank(adapters: readonly Adapter[], dtype: DType): LowRank | null {
  if (adapters.length === 0) return null;
  const buffers = lowRankBuffers(adapters, dtype);
  fillLowRank(adapters, buffers);
  return lowRankOf(adapters, buffers);
}

/** Where a linear's parts stand among the op's inputs, and its columns among the stacked ranks. */
interface Place {
  readonly weight: number;
  readonly bias: number | null;
  readonly adapter: {
    readonly a: number;
    readonly b: number;
    readonly index: number;
    readonly columns: Columns;
  } | null;
}
type Columns = readonly [start: number, end: number];

function layOut(x: Tensor, linears: readonly AdaptedLinear[]): { inputs: Tensor[]; places: Place[] } {
  const inputs = [x];
  const put = (t: Tensor): number => inputs.push(t) - 1;
  let [index, rank] = [0, 0];
  const places = linears.map(({ weight, bias, adapter }): Place => {
    const place = { weight: put(weight), bias: bias && put(bias) };
    if (!adapter) return { ...place, adapter: null };
    const columns: Columns = [rank, rank + adapter.a.shape[0]];
    rank = columns[1];
    return { ...place, adapter: { a: put(adapter.a), b: put(adapter.b), index: index++, columns } };
  });
  return { inputs, places };
}

function requireAdapted(x: Tensor, { weight, bias, adapter }: AdaptedLinear): void {
  requireLinear('adaptedLinears', x, weight, bias);
  const [a, b] = [adapter?.a, adapter?.b];
  const fits =
    !a ||
    !b ||
    (a.ndim === 2 &&
      b.ndim === 2 &&
      a.shape[1] === x.shape[1] &&
      b.shape[0] === weight.shape[0] &&
      b.shape[1] === a.shape[0]);
  if (x.ndim !== 2 || !fits)
    throw new RangeError(
      `[adaptedLinears] expected x [R, in], weight [out, in], a [r, in], b [out, r], found ${[x, weight, a, b].filter(Boolean).map(String).join(', ')}`,
    );
}

/** A matrix seen from its other side. */
const turned = (w: Tensor): Tensor => w.view([w.shape[1], w.shape[0]], [w.strides[1], w.strides[0]]);

/**
 * Linears of one input `[R, in]`, x weightᵀ + bias + scale · (x aᵀ) bᵀ each, the last term where there is an adapter. Adapters may
 * be float32 beside a bfloat16 weight: they are rounded for the products, their gradients are not.
 *
 * @param low what the products read of the adapters, where the caller keeps it; made here otherwise
 */
export function adaptedLinears(
  x: Tensor,
  linears: readonly AdaptedLinear[],
  scale: number,
  low: LowRank | null = null,
): readonly Tensor[] {
  for (const part of linears) requireAdapted(x, part);
  const { inputs, places } = layOut(x, linears);
  return fusedOutputs({
    name: 'adaptedLinears',
    inputs,
    forward: () => {
      const adapters = linears.flatMap(({ adapter }) => (adapter ? [adapter] : []));
      return forward(x, linears, places, low ?? freshLowRank(adapters, x.dtype), scale);
    },
    definition: (...given) => adaptedLinearsDefinition(given[0], partsOf(given, places), scale),
    differentiable: true,
    streamed: true,
    backward: (context) =>
      context.differentiable
        ? composedBackward(context, places, scale)
        : backward(context, inputs.length, places, scale),
  });
}

/** One linear: see adaptedLinears. */
export const loraLinear = (
  x: Tensor,
  weight: Tensor,
  bias: Tensor | null,
  a: Tensor,
  b: Tensor,
  scale: number,
): Tensor => adaptedLinears(x, [{ weight, bias, adapter: { a, b } }], scale)[0];

const partsOf = (inputs: readonly Tensor[], places: readonly Place[]): AdaptedLinear[] =>
  places.map(({ weight, bias, adapter }) => ({
    weight: inputs[weight],
    bias: bias === null ? null : inputs[bias],
    adapter: adapter && { a: inputs[adapter.a], b: inputs[adapter.b] },
  }));

function forward(
  x: Tensor,
  linears: readonly AdaptedLinear[],
  places: readonly Place[],
  low: LowRank | null,
  scale: number,
): { outputs: readonly Tensor[]; saved: readonly Tensor[] } {
  return scope(() => {
    const rows = x.shape[0];
    const thin = low && emptyLike(x, [rows, low.a.shape[0]]);
    if (thin) matmulInto(thin, x, turned(low.a));
    const outputs = linears.map(({ weight, bias }, i) => {
      const out = emptyLike(x, [rows, weight.shape[0]]);
      const { adapter } = places[i];
      if (adapter)
        matmulInto(out, slice(thin!, 1, ...adapter.columns), turned(low!.b[adapter.index]), { alpha: scale });
      matmulInto(out, x, turned(weight), { bias, accumulate: adapter !== null });
      return out;
    });
    return { outputs, saved: low ? [thin!, low.a, ...low.b] : [] };
  });
}

function backward(
  { cotangents, saved, needs, streams }: BackwardContext,
  inputs: number,
  places: readonly Place[],
  scale: number,
): Cotangent[] {
  const [thin, a, ...b] = saved.slice(inputs);
  const rows = cotangents.find((g) => g)!.shape[0];
  const dlow = thin ? lowCotangents(cotangents, thin, b, rows, places, scale) : null;
  const results: Cotangent[] = needs.map(() => null);
  if (needs[0]) results[0] = inputCotangent(cotangents, saved, dlow && { dlow, a }, rows, places);
  places.forEach(({ weight, bias, adapter }, i) => {
    const g = cotangents[i];
    if (!g) return;
    if (needs[weight]) results[weight] = new LinearContribution(saved[0], g, 1, streams);
    if (bias !== null && needs[bias]) results[bias] = biasCotangent(g, streams);
    if (!adapter) return;
    const columns = (t: Tensor): Tensor => slice(t, 1, ...adapter.columns);
    if (needs[adapter.a]) results[adapter.a] = new LinearContribution(saved[0], columns(dlow!), 1, streams);
    if (needs[adapter.b]) results[adapter.b] = new LinearContribution(columns(thin), g, scale, streams);
  });
  return results;
}

/** scale · g b of every adapter, `[R, sum of r]`. */
function lowCotangents(
  cotangents: readonly (Tensor | null)[],
  thin: Tensor,
  b: readonly Tensor[],
  rows: number,
  places: readonly Place[],
  scale: number,
): Tensor {
  const dlow = emptyLike(thin, [rows, thin.shape[1]]);
  places.forEach(({ adapter }, i) => {
    if (!adapter) return;
    const into = slice(dlow, 1, ...adapter.columns);
    const g = cotangents[i];
    if (g) matmulInto(into, g, b[adapter.index], { alpha: scale });
    else fill(into, 0);
  });
  return dlow;
}

/** dlow a + the sum of g w. */
function inputCotangent(
  cotangents: readonly (Tensor | null)[],
  saved: readonly Tensor[],
  low: { dlow: Tensor; a: Tensor } | null,
  rows: number,
  places: readonly Place[],
): Tensor {
  const dx = emptyLike(saved[0], [rows, saved[0].shape[1]]);
  if (low) matmulInto(dx, low.dlow, low.a);
  let accumulate = low !== null;
  places.forEach(({ weight }, i) => {
    const g = cotangents[i];
    if (!g) return;
    matmulInto(dx, g, saved[weight], { accumulate });
    accumulate = true;
  });
  return dx;
}

/** The same from differentiable ops. */
function composedBackward(
  { cotangents, saved, needs, streams }: BackwardContext,
  places: readonly Place[],
  scale: number,
): Cotangent[] {
  const x = saved[0];
  const results: Cotangent[] = needs.map(() => null);
  const toInput: { g: Tensor[]; weight: Tensor[] } = { g: [], weight: [] };
  const send = (g: Tensor, weight: Tensor): void => {
    toInput.g.push(g);
    toInput.weight.push(weight);
  };
  partsOf(saved, places).forEach(({ weight, adapter }, i) => {
    const [g, place] = [cotangents[i], places[i]];
    if (!g) return;
    send(g, weight);
    if (needs[place.weight]) results[place.weight] = new LinearContribution(x, g, 1, streams);
    if (place.bias !== null && needs[place.bias]) results[place.bias] = biasCotangent(g, streams);
    if (!adapter || !place.adapter) return;
    const [a, b] = [adapter.a, adapter.b].map((t) => cast(t, x.dtype));
    const dlow = mul(linearBackward(g, b), scale);
    send(dlow, a);
    if (needs[place.adapter.a]) results[place.adapter.a] = new LinearContribution(x, dlow, 1, streams);
    if (needs[place.adapter.b]) results[place.adapter.b] = new LinearContribution(linear(x, a), g, scale, streams);
  });
  if (needs[0]) results[0] = linearsBackward(toInput.g, toInput.weight);
  return results;
}
