// The vocabulary head's backward by sequence, as an op: the cotangent of its rows, and of its weight what per-sequence
// sinks need. Its derivative is the tangent kernel's; [targets, vocabulary] never exists.
import type { Contribution, GradientShares } from '../autograd/tape.js';
import { launch } from '../native/launch.js';
import { accumulationDType } from '../tensor/dtype.js';
import type { Tensor } from '../tensor/tensor.js';
import { forKernel, rowsOf } from './backward.js';
import { add, addInPlace, equal, exp, mul, neg, sub } from './elementwise.js';
import { fusedOutputs } from './fused.js';
import {
  cast,
  concat,
  emptyLike,
  fill,
  gatherRows,
  ones,
  reshape,
  slice,
  transpose,
  unsqueeze,
  zeros,
} from './movement.js';
import { linear, matmul } from './product.js';
import { sum } from './reduce.js';
import { logSoftmax } from './softmax.js';
import type { SequenceStreams } from './streams.js';

export interface HeadSaved {
  /** `[N]` log of the sum of exponentials, and int32 targets. */
  lse: Tensor;
  ids: Tensor;
}

/**
 * The gradient of the head's weight by sequence, sum over its targets n of D[n]ᵀ hidden[n], D = onehot - softmax: known by
 * its inner products, already added to the shares of its sink.
 */
export class HeadContribution implements Contribution {
  readonly kind = 'head';
  readonly shape: readonly number[];
  /** `[N, H]`. */
  readonly hidden: Tensor;
  /** `[groups, M, M]`: inner products of the rows of D of a head group; null where squares are not wanted. */
  readonly gram: Tensor | null;
  /** `[N, P]`: D at its group's probes (see HeadProbes); null as well. */
  readonly probes: Tensor | null;
  /** `[V, H]`: the sum over all sequences, differentiable; null where it was not asked for. */
  readonly dense: Tensor | null;
  readonly streams: SequenceStreams;
  private readonly weight: Tensor;
  private readonly saved: HeadSaved;

  constructor(
    hidden: Tensor,
    weight: Tensor,
    saved: HeadSaved,
    streams: SequenceStreams,
    products: { gram?: Tensor | null; probes?: Tensor | null; dense?: Tensor | null },
  ) {
    this.hidden = hidden;
    this.weight = weight;
    this.saved = saved;
    this.streams = streams;
    this.gram = products.gram ?? null;
    this.probes = products.probes ?? null;
    this.dense = products.dense ?? null;
    this.shape = weight.shape;
  }

  /** The same contribution over other tensors: `keep` makes one of each that squares need. */
  kept(keep: (t: Tensor) => Tensor): HeadContribution {
    const { gram, probes } = this;
    const products = { gram: gram && keep(gram), probes: probes && keep(probes) };
    return new HeadContribution(keep(this.hidden), this.weight, this.saved, this.streams, products);
  }

  /** The sum over all sequences. Not differentiable. */
  materialize(): Tensor {
    const dtype = accumulationDType(this.weight.dtype);
    const out = zeros(this.shape, { dtype, device: this.weight.device });
    const { lse, ids } = this.saved;
    const seeds = ones([ids.size], { dtype, device: ids.device });
    const rows = this.streams.targetOrder;
    const kernel = [seeds, this.hidden, this.weight, lse, rows, ids].map(forKernel);
    if (ids.size > 0) launch('vocabHeadBackward', [null, out, ...kernel, null]);
    return out;
  }
}

/** [cotangent of hidden, contribution to weight] behind vocabHead with one target a row and cotangents of 1. */
export function headBackward(
  hidden: Tensor,
  weight: Tensor,
  saved: HeadSaved,
  streams: SequenceStreams,
  shares: GradientShares | null,
): [Tensor, HeadContribution] {
  const { table, ids: probeIds, maxTargets: side, maxProbes } = streams.probes;
  const wide = accumulationDType(hidden.dtype);
  const count = hidden.shape[0];
  const squares = shares?.squares ?? false;
  const dense = shares?.dense ?? false;
  /** Places of the outputs behind dhidden. */
  const at = { gram: squares ? 1 : -1, probes: squares ? 2 : -1, dense: dense ? (squares ? 3 : 1) : -1 };
  const shapes = [
    ...(squares
      ? [
          [streams.headGroups.length, side, side],
          [count, maxProbes],
        ]
      : []),
    ...(dense ? [weight.shape] : []),
  ];
  const outputs = fusedOutputs({
    name: 'vocabHeadBackward',
    inputs: [hidden, weight],
    definition: (h, w) => {
      const { dhidden, gram, probes, total } = headBackwardDefinition(h, w, saved.ids, streams);
      return [dhidden, ...(squares ? [gram, probes] : []), ...(dense ? [total] : [])];
    },
    forward: () => {
      const dhidden = emptyLike(hidden);
      const products = shapes.map((shape) => fill(emptyLike(hidden, shape, wide), 0));
      const results = [dhidden, ...products];
      const kernel = [hidden, weight, saved.lse, saved.ids].map(forKernel);
      const ones = dense ? fill(emptyLike(hidden, [2, count], wide), 1) : null;
      const into = dense ? [results[at.dense], null] : [shares?.first ?? null, shares?.second ?? null];
      const inner = [results[at.gram] ?? null, results[at.probes] ?? null];
      if (count > 0)
        launch(
          'vocabHeadSequences',
          [dhidden, ...inner, ...into, ...kernel, table, probeIds, ones ?? shares?.byTarget ?? null],
          [shares?.secondTargets ?? 0],
        );
      return { outputs: results, saved: [saved.lse, saved.ids, ...results] };
    },
    backward: ({ cotangents, saved: [h, w, lse, ids, ...results], needs }) => {
      const kernel = [h, w, lse, ids].map(forKernel);
      const dh = emptyLike(kernel[0]);
      const dweight = needs[1] ? fill(emptyLike(w, w.shape, wide), 0) : null;
      const [hiddenDot, gramDot, probesDot, denseDot] = [0, at.gram, at.probes, at.dense].map(
        (i) => cotangents[i] ?? null,
      );
      const dots = {
        hidden: hiddenDot ? forKernel(hiddenDot) : fill(emptyLike(kernel[0]), 0),
        gram: gramDot && symmetric(gramDot),
        probes: probesDot && forKernel(probesDot),
      };
      const weightDot = denseDot && forKernel(cast(denseDot, w.dtype));
      const known = { weight: kernel[1], ids, dhidden: results[0], gram: results[at.gram], probes: results[at.probes] };
      const shift = weightDot ? null : headShift(known, dots, streams);
      if (count > 0)
        launch('vocabHeadTangent', [
          ...[dh, dweight, dots.hidden, dots.gram, dots.probes, weightDot, ...kernel, table, probeIds],
          shift,
        ]);
      return [dh, dweight];
    },
  });
  const products = { gram: outputs[at.gram], probes: outputs[at.probes], dense: outputs[at.dense] };
  return [outputs[0], new HeadContribution(hidden, weight, saved, streams, products)];
}

/** (x + xᵀ) / 2 of each matrix. */
const symmetric = (x: Tensor): Tensor => forKernel(mul(add(x.detach(), transpose(x.detach())), 0.5));

interface HeadValues {
  weight: Tensor;
  ids: Tensor;
  dhidden: Tensor;
  gram: Tensor | undefined;
  probes: Tensor | undefined;
}

/**
 * sum over v of softmax[n, v] l[n, v], l the derivative for D (see vocabHeadTangent in native/ops/kernels.def), without a pass
 * over the vocabulary: softmax = onehot - D, and the products of D with the weight, with D and at ids are known.
 */
function headShift(
  { weight, ids, dhidden, gram, probes }: HeadValues,
  dots: { hidden: Tensor; gram: Tensor | null; probes: Tensor | null },
  streams: SequenceStreams,
): Tensor | null {
  if (!gram || !probes) return null;
  const wide = gram.dtype;
  const expected = sub(cast(gatherRows(weight, ids), wide), cast(dhidden.detach(), wide));
  const shift = sum(mul(cast(dots.hidden, wide), expected), { axes: 1 });
  const bare = { gram: gram.detach(), probes: probes.detach() };
  streams.headGroups.forEach(({ rows, targets }, s) => {
    const [n, first] = [targets.length, targets.start];
    if (n === 0) return;
    const own = { into: rowsOf(shift, first, n), probes: rowsOf(bare.probes, first, n) };
    if (dots.gram) {
      const atTargets = transpose(slice(own.probes, 1, rows.length, rows.length + n));
      const products = sub(atTargets, squareOf(bare.gram, s, n));
      addInPlace(own.into, mul(sum(mul(squareOf(dots.gram, s, n), products), { axes: 1 }), 2));
    }
    if (dots.probes) {
      const probability = sub(probesOneHot(ids, streams, s, wide), slice(own.probes, 1, 0, rows.length + n));
      const dot = slice(rowsOf(dots.probes, first, n), 1, 0, rows.length + n);
      addInPlace(own.into, sum(mul(dot, probability), { axes: 1 }));
    }
  });
  return shift;
}

/** The n x n corner of a group's matrix. */
export const squareOf = (x: Tensor, s: number, n: number): Tensor => {
  const one = reshape(slice(x, 0, s, s + 1), x.shape.slice(1));
  return slice(slice(one, 0, 0, n), 1, 0, n);
};

/** `[n, probes]`: whether a probe's id is a target's. */
function probesOneHot(ids: Tensor, streams: SequenceStreams, s: number, dtype: Tensor['dtype']): Tensor {
  const { rows, targets } = streams.headGroups[s];
  const start = streams.headGroups.slice(0, s).reduce((n, q) => n + q.rows.length + q.targets.length, 0);
  const own = unsqueeze(rowsOf(streams.probes.ids, start, rows.length + targets.length), 0);
  return cast(equal(unsqueeze(rowsOf(ids.detach(), targets.start, targets.length), 1), own), dtype);
}

/** The same from primitive ops: holds [N, V]. */
function headBackwardDefinition(
  h: Tensor,
  w: Tensor,
  ids: Tensor,
  streams: SequenceStreams,
): Record<'dhidden' | 'gram' | 'probes' | 'total', Tensor> {
  const wide = accumulationDType(h.dtype);
  const p = exp(logSoftmax(cast(linear(h, w), wide)));
  const words = cast(unsqueeze(vocabulary(w), 0), 'int32');
  const d = add(neg(p), cast(equal(unsqueeze(ids, 1), words), wide));
  const { maxTargets, maxProbes } = streams.probes;
  const pad = (x: Tensor, rows: number, columns: number): Tensor => padTo(padTo(x, 0, rows), 1, columns);
  const each = streams.headGroups.map(({ rows, targets: { start, length } }, s) => {
    const own = slice(d, 0, start, start + length);
    const first = streams.headGroups.slice(0, s).reduce((n, q) => n + q.rows.length + q.targets.length, 0);
    const probeIds = rowsOf(streams.probes.ids, first, rows.length + length);
    const probes = transpose(gatherRows(transpose(own), probeIds));
    return { gram: pad(matmul(own, transpose(own)), maxTargets, maxTargets), probes: padTo(probes, 1, maxProbes) };
  });
  const gram = concat(each.map((e) => unsqueeze(e.gram, 0)));
  const narrow = cast(d, h.dtype);
  return {
    dhidden: matmul(narrow, w),
    gram,
    probes: concat(each.map((e) => e.probes)),
    total: cast(matmul(transpose(narrow), h), wide),
  };
}

const vocabulary = (w: Tensor): Tensor => {
  const ids = emptyLike(w, [w.shape[0]], 'int32');
  launch('arange', [ids], [0, 1]);
  return ids;
};

function padTo(x: Tensor, axis: number, length: number): Tensor {
  if (x.shape[axis] === length) return x;
  const shape = x.shape.map((n, i) => (i === axis ? length - n : n));
  return concat([x, fill(emptyLike(x, shape), 0)], axis);
}
