// The backward passes of the transformer's fused ops, as ops themselves: kernels with a definition and a derivative (their
// tangent kernels), so that second order needs neither T x T nor a definition's temporaries. Each takes streams: cotangent
// rows then are those of the sequences, rows of the op's inputs those of the packed axis.
import { record } from '../autograd/tape.js';
import { launch } from '../native/launch.js';
import { accumulationDType } from '../tensor/dtype.js';
import type { Tensor } from '../tensor/tensor.js';
import { add, mul, rsqrt, silu, square } from './elementwise.js';
import { fusedOutputs, vjpOf } from './fused.js';
import {
  broadcastTo,
  cast,
  contiguous,
  emptyLike,
  fill,
  gatherRows,
  reshape,
  scatterRows,
  unsqueeze,
} from './movement.js';
import { LinearContribution, linear, matmulInto } from './product.js';
import { mean } from './reduce.js';
import type { SegmentLayout } from './segments.js';
import type { SequenceStreams, Span } from './streams.js';
import { attentionDefinition } from './transformer.js';

/** Contiguous and off the tape, for kernels. */
export const forKernel = (x: Tensor): Tensor => (x.contiguous ? x.detach() : contiguous(x.detach()));

const zeros = (like: Tensor, shape: readonly number[], dtype = like.dtype): Tensor =>
  fill(emptyLike(like, shape, dtype), 0);
const zerosFor = (cotangent: Tensor | null, like: Tensor, shape = like.shape): Tensor =>
  cotangent ? forKernel(cotangent) : zeros(like, shape);

/** Rows of the packed axis as each sequence sees them. */
export function spread(x: Tensor, streams: SequenceStreams | null): Tensor {
  if (!streams?.rowMap) return x;
  const flat = reshape(x, [x.shape[0], -1]);
  return reshape(gatherRows(flat, streams.rowMap), [streams.rows, ...x.shape.slice(1)]);
}

/** Rows of sequences summed into those of the packed axis: the adjoint of `spread`. */
export function merge(x: Tensor, streams: SequenceStreams | null): Tensor {
  if (!streams?.rowMap) return x;
  const flat = reshape(x, [x.shape[0], -1]);
  return reshape(scatterRows(flat, streams.rowMap, streams.primalRows), [streams.primalRows, ...x.shape.slice(1)]);
}

/** Rows summed by sequence, `[S, n]` in the accumulation dtype. */
export const bySequence = (rows: Tensor, streams: SequenceStreams): Tensor =>
  scatterRows(cast(rows, accumulationDType(rows.dtype)), streams.rowSequence, streams.sequences.length);

/** g w: the cotangent of x behind y = x wᵀ, for g `[R, out]`, w `[out, in]`. Its own gradient for w is a contribution. */
export const linearBackward = (g: Tensor, w: Tensor): Tensor => linearsBackward([g], [w]);

/** The same of several linears of one x: the sum of g w. */
export function linearsBackward(gs: readonly Tensor[], ws: readonly Tensor[]): Tensor {
  const out = emptyLike(gs[0], [gs[0].shape[0], ws[0].shape[1]]);
  gs.forEach((g, i) => {
    matmulInto(out, g, ws[i], { accumulate: i > 0 });
  });
  const inputs = [...gs, ...ws];
  return record('linearBackward', inputs, [out], inputs, ({ g: dot, saved, needs }) => [
    ...gs.map((_, i) => (needs[i] ? linear(dot, saved[gs.length + i]) : null)),
    ...gs.map((_, i) => (needs[gs.length + i] ? new LinearContribution(dot, saved[i]) : null)),
  ])[0];
}

/** x / sqrt(mean(x²) + eps) times a weight of each row. */
const normOfRows = (x: Tensor, weights: Tensor, eps: number): Tensor =>
  mul(mul(x, rsqrt(add(mean(square(x), { axes: -1, keepDims: true }), eps))), weights);

/**
 * Cotangents behind rmsNorm: of x, by row of g, with `sum` added to them where it is given; and of the weight, `[S, H]` by
 * sequence in the accumulation dtype (one row without streams).
 */
export function rmsNormBackward(
  g: Tensor,
  x: Tensor,
  weight: Tensor,
  rstd: Tensor,
  sum: Tensor | null,
  eps: number,
  streams: SequenceStreams | null,
): readonly Tensor[] {
  const count = streams?.sequences.length ?? 1;
  const wide = accumulationDType(x.dtype);
  const definition = (dy: Tensor, a: Tensor, w: Tensor, more?: Tensor): readonly Tensor[] => {
    const repeated = broadcastTo(unsqueeze(cast(w, wide), 0), [count, w.size]);
    const f = (rows: Tensor, weights: Tensor): readonly Tensor[] => {
      const each = streams ? gatherRows(weights, streams.rowSequence) : weights;
      return [normOfRows(rows, cast(each, rows.dtype), eps)];
    };
    const [dx, dweight] = vjpOf(f, [spread(a, streams), repeated], [dy], [true, true]) as Tensor[];
    return [more ? add(dx, more) : dx, dweight];
  };
  return fusedOutputs({
    name: 'rmsNormBackward',
    inputs: sum ? [g, x, weight, sum] : [g, x, weight],
    definition,
    forward: () => {
      const [dy, a, w] = [g, x, weight].map(forKernel);
      const more = sum && forKernel(sum);
      const dx = emptyLike(dy);
      const dweight = zeros(w, [count, w.size], wide);
      const run = (span: Span, into: Tensor): void => {
        const rows = (t: Tensor): Tensor => rowsOf(t, span.start, span.length);
        const map = streams?.rowMap ? rows(streams.rowMap) : null;
        const primal = (t: Tensor): Tensor => (map ? t : rows(t));
        const flat = reshape(into, [w.size]);
        const given = [rows(dy), primal(a), w, primal(rstd), map, more && rows(more)];
        if (span.length > 0) launch('rmsNormBackward', [rows(dx), flat, ...given]);
      };
      const whole = { start: 0, length: dy.shape[0] };
      for (const [s, span] of (streams?.sequences.map((q) => q.rows) ?? [whole]).entries())
        run(span, rowsOf(dweight, s, 1));
      return { outputs: [dx, dweight], saved: [rstd] };
    },
    backward: ({ cotangents: [dxDot, weightDot], saved, needs }) => {
      const kernel = saved.slice(0, 3).map(forKernel);
      const [w, r] = [kernel[2], saved[saved.length - 1]];
      const [forG, forX] = [emptyLike(kernel[0]), emptyLike(kernel[0])];
      const dweight = needs[2] ? zeros(w, w.shape, wide) : null;
      const t = zerosFor(dxDot, kernel[0]);
      const v = weightDot && forKernel(weightDot);
      const map = streams?.rowMap ?? null;
      if (t.size > 0)
        launch('rmsNormTangent', [forG, forX, dweight, t, v, ...kernel, r, map, streams?.rowSequence ?? null]);
      return [forG, needs[1] ? merge(forX, streams) : null, dweight, sum ? dxDot : null];
    },
  });
}

/** Rows [start, start + length) of a contiguous tensor: a view off the tape. */
export function rowsOf(t: Tensor, start: number, length: number): Tensor {
  const bytes = { float64: 8, float32: 4, int32: 4, bfloat16: 2, float16: 2, uint8: 1, bool: 1 }[t.dtype];
  return t.view([length, ...t.shape.slice(1)], t.strides, t.byteOffset + start * (t.strides[0] ?? 1) * bytes);
}

/** Cotangents of gate and up behind swiglu, by row of g. */
export function swigluBackward(
  g: Tensor,
  gate: Tensor,
  up: Tensor,
  streams: SequenceStreams | null,
): readonly Tensor[] {
  const map = streams?.rowMap ?? null;
  return fusedOutputs({
    name: 'swigluBackward',
    inputs: [g, gate, up],
    definition: (dy, a, b) =>
      vjpOf((x, y) => [mul(silu(x), y)], [spread(a, streams), spread(b, streams)], [dy], [true, true]) as Tensor[],
    forward: () => {
      const kernel = [g, gate, up].map(forKernel);
      const outputs = [emptyLike(kernel[0]), emptyLike(kernel[0])];
      if (g.size > 0) launch('swigluBackward', [...outputs, ...kernel, map]);
      return { outputs, saved: [] };
    },
    backward: ({ cotangents, saved, needs }) => {
      const kernel = saved.map(forKernel);
      const dots = cotangents.map((c) => zerosFor(c, kernel[0]));
      const results = kernel.map(() => emptyLike(kernel[0]));
      if (kernel[0].size > 0) launch('swigluTangent', [...results, ...dots, ...kernel, map]);
      return results.map((t, i) => (!needs[i] ? null : i === 0 ? t : merge(t, streams)));
    },
  });
}

/** What attention's backward needs beside its inputs. */
export interface AttentionSaved {
  out: Tensor;
  lse: Tensor;
  segments: Tensor;
}

/** Cotangents of q, k and v behind groupedQueryAttention, by row of g. */
export function attentionBackward(
  g: Tensor,
  [q, k, v]: readonly Tensor[],
  { out, lse, segments }: AttentionSaved,
  layout: SegmentLayout,
  scale: number,
  streams: SequenceStreams | null,
): readonly Tensor[] {
  const maps = streams ? [streams.layout.on(g.device).segments, streams.rowMap] : [null, null];
  const shapes = [q, k, v].map((t) => [g.shape[0], ...t.shape.slice(1)]);
  const rowMajor = (t: Tensor): Tensor => (t.strides[2] === 1 ? t.detach() : forKernel(t));
  return fusedOutputs({
    name: 'attentionBackward',
    inputs: [g, q, k, v],
    definition: (dy, ...inputs) =>
      vjpOf(
        (a, b, c) => [attentionDefinition(a, b, c, streams?.layout ?? layout, scale)],
        inputs.map((t) => spread(t, streams)),
        [dy],
        [true, true, true],
      ) as Tensor[],
    forward: () => {
      const outputs = shapes.map((shape) => emptyLike(g, shape));
      const kernel = [g, q, k, v].map(rowMajor);
      if (g.size > 0) launch('attentionBackward', [...outputs, ...kernel, out, lse, segments, ...maps], [scale]);
      return { outputs, saved: [out, lse, segments] };
    },
    backward: ({ cotangents, saved, needs }) => {
      const kernel = saved.slice(0, 4).map(rowMajor);
      const dots = cotangents.map((c, i) => zerosFor(c && rowMajor(c), kernel[0], shapes[i]));
      const results = [kernel[0].shape, ...shapes].map((shape) => emptyLike(kernel[0], shape));
      if (kernel[0].size > 0)
        launch('attentionTangent', [...results, ...dots, ...kernel, ...saved.slice(4), ...maps], [scale]);
      return results.map((t, i) => (!needs[i] ? null : i === 0 ? t : merge(t, streams)));
    },
  });
}
