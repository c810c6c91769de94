// Cases of the kernels behind per-sequence gradients (native/ops/kernels.def): the backward by sequence and the tangents of
// backward kernels. Launched directly; what they mean is the vjp, in float64, of the vjp of a definition.

import { vjp } from '../../../src/autograd/transforms.js';
import { launch } from '../../../src/native/launch.js';
import { add, equal, exp, mul, neg, silu } from '../../../src/ops/elementwise.js';
import {
  arange,
  broadcastTo,
  cast,
  concat,
  emptyLike,
  fill,
  gatherRows,
  slice,
  transpose,
  unsqueeze,
} from '../../../src/ops/movement.js';
import { linear, matmul } from '../../../src/ops/product.js';
import { SegmentLayout } from '../../../src/ops/segments.js';
import { logSoftmax } from '../../../src/ops/softmax.js';
import { attentionDefinition, rmsNormDefinition } from '../../../src/ops/transformer.js';
import { accumulationDType } from '../../../src/tensor/dtype.js';
import { scope } from '../../../src/tensor/scope.js';
import { Tensor } from '../../../src/tensor/tensor.js';
import { type Host, host } from '../host.js';
import {
  accumulator,
  type InputSpec,
  ids,
  input,
  integers,
  type OpCase,
  opCase,
  type Place,
  toTensor,
} from '../op-case.js';
import type * as reference from '../reference.js';

const base = { differentiable: false, opClass: 'fused' } as const;
type Outputs = (...x: Tensor[]) => Tensor[];

const wide = (x: Tensor, shape: readonly number[]): Tensor => fill(emptyLike(x, shape, accumulationDType(x.dtype)), 0);
const toHost = (t: Tensor): Host => host(t.shape, t.dataSync());
const inWide = (at: Place, x: Host): Host => host(x.shape, x.values, accumulationDType(at.dtype));
/** Outputs of f, and cotangents of its inputs from those of its outputs, in float64. */
function evaluated(f: Outputs, inputs: readonly Host[], dots: readonly (Host | null)[]) {
  return scope(() => {
    const tensors = inputs.map((x) => toTensor(x, 'cpu', 'float64'));
    const [outputs, [given]] = vjp(
      (xs: Tensor[]) => f(...xs),
      [tensors],
      (ys: Tensor[]) =>
        ys.map((y, i) => {
          const dot = dots[i];
          return dot ? toTensor(dot, 'cpu', 'float64') : fill(emptyLike(y), 0);
        }),
    );
    return { outputs: outputs.map(toHost), cotangents: (given as Tensor[]).map(toHost) };
  });
}

/** The backward of `f` as a function of (cotangent, inputs). */
const backwardOf =
  (f: (...x: Tensor[]) => Tensor): Outputs =>
  (g, ...inputs) =>
    vjp((xs: Tensor[]) => f(...xs), [inputs], g)[1][0];

const rowsBy = (x: Tensor, map: Host): Tensor => {
  const index = toTensor(map, 'cpu', 'int32');
  const flat = x.reshape([x.shape[0], -1]);
  return gatherRows(flat, index).reshape([map.values.length, ...x.shape.slice(1)]);
};

/** Rows 0, 0, ..., 1, 1, ...: the sequence of each row. */
const sequencesOf = (lengths: readonly number[]): number[] => lengths.flatMap((n, s) => Array<number>(n).fill(s));

function rmsNormTangent(lengths: number[], primal: number, width: number): OpCase {
  const eps = 1e-5;
  const rows = lengths.reduce((a, b) => a + b, 0);
  const sequence = integers([rows], sequencesOf(lengths));
  return opCase({
    ...base,
    op: 'rmsNormTangent',
    inputs: [
      input([rows, width]),
      accumulator([lengths.length, width]),
      input([rows, width]),
      input([primal, width]),
      input([width], 0.5, 1.5),
      ids(rows, primal),
      sequence,
    ],
    run: (_, dxDot, weightDot, dy, x, weight, map, rowSequence) => {
      const rstd = wide(x, [primal]);
      launch('rmsNorm', [emptyLike(x), rstd, x, weight], [eps]);
      const outputs = [emptyLike(dy), emptyLike(dy), wide(weight, weight.shape)];
      launch('rmsNormTangent', [...outputs, dxDot, weightDot, dy, x, weight, rstd, map, rowSequence]);
      const plain = [emptyLike(dy), emptyLike(dy)];
      launch('rmsNormTangent', [...plain, null, dxDot, null, dy, x, weight, rstd, map, null]);
      return [...outputs, ...plain];
    },
    reference: (at, dxDot, weightDot, dy, x, weight, map, rowSequence) => {
      const backward: Outputs = (g, rowsOfX, w) => {
        const repeated = broadcastTo(unsqueeze(w, 0), [lengths.length, width]);
        const f = (a: Tensor, weights: Tensor): Tensor => {
          const each = gatherRows(weights, toTensor(rowSequence, 'cpu', 'int32'));
          return mul(rmsNormDefinition(a, fill(emptyLike(a, [width]), 1), eps), each);
        };
        return vjp(f, [rowsOfX, repeated], g)[1];
      };
      const spread = scope(() => toHost(rowsBy(toTensor(x, 'cpu', 'float64'), map)));
      const inputs = [dy, spread, weight];
      const [forG, forX, forWeight] = evaluated(backward, inputs, [dxDot, weightDot]).cotangents;
      const plain = evaluated(backward, inputs, [dxDot, null]).cotangents;
      return [forG, forX, inWide(at, forWeight), plain[0], plain[1]];
    },
  });
}

function swigluTangent(rows: number, primal: number, width: number): OpCase {
  const wideRange = input([primal, width], -3, 3);
  return opCase({
    ...base,
    op: 'swigluTangent',
    inputs: [input([rows, width]), input([rows, width]), input([rows, width]), wideRange, wideRange, ids(rows, primal)],
    run: (_, dgateDot, dupDot, dy, gate, up, map) => {
      const outputs = [dy, dy, dy].map((t) => emptyLike(t));
      launch('swigluTangent', [...outputs, dgateDot, dupDot, dy, gate, up, map]);
      return outputs;
    },
    reference: (_, dgateDot, dupDot, dy, gate, up, map) => {
      const spread = [gate, up].map((t) => scope(() => toHost(rowsBy(toTensor(t, 'cpu', 'float64'), map))));
      return evaluated(
        backwardOf((a, b) => mul(silu(a), b)),
        [dy, ...spread],
        [dgateDot, dupDot],
      ).cotangents;
    },
  });
}

/** Cotangent rows: branches as sequences of their own, each after its prompt; or, if `shared`, the primal rows. */
function attentionTangent(
  parts: readonly reference.Part[],
  heads: [number, number],
  width: number,
  shared = false,
): OpCase {
  const primal = new SegmentLayout(parts);
  const branches = parts.flatMap((p, i) => ((p.parent ?? -1) >= 0 ? [[p.parent!, i]] : []));
  const apart = shared
    ? primal
    : SegmentLayout.sequences(branches.map((b) => b.reduce((n, s) => n + parts[s].length, 0)));
  const map = (shared ? parts.map((_, s) => s) : branches.flat()).flatMap((s) => {
    const { start, length } = primal.segments[s];
    return Array.from({ length }, (_, i) => start + i);
  });
  const scale = 1 / Math.sqrt(width);
  const of = (rows: number, which: 0 | 1): InputSpec => input([rows, heads[which], width]);
  const [q, k] = [of(primal.total, 0), of(primal.total, 1)];
  const dots = [of(apart.total, 0), of(apart.total, 1), of(apart.total, 1)];
  return opCase({
    ...base,
    op: 'attentionTangent',
    inputs: [...dots, of(apart.total, 0), q, k, k, integers([map.length], map)],
    run: (at, qDot, kDot, vDot, dout, a, b, c, rows) => {
      const [out, lse] = [emptyLike(a), wide(a, a.shape.slice(0, 2))];
      const segments = primal.on(at.device).segments;
      launch('attention', [out, lse, a, b, c, segments], [scale]);
      const outputs = [dout, qDot, kDot, vDot].map((t) => emptyLike(t));
      const own = shared ? [null, null] : [apart.on(at.device).segments, rows];
      launch('attentionTangent', [...outputs, qDot, kDot, vDot, dout, a, b, c, out, lse, segments, ...own], [scale]);
      return outputs;
    },
    reference: (_, qDot, kDot, vDot, dout, ...rest) => {
      const rows = rest[3];
      const spread = rest.slice(0, 3).map((t) => scope(() => toHost(rowsBy(toTensor(t, 'cpu', 'float64'), rows))));
      const backward = backwardOf((x, y, z) => attentionDefinition(x, y, z, apart, scale));
      return evaluated(backward, [dout, ...spread], [qDot, kDot, vDot]).cotangents;
    },
    note: `${shared ? 'segments' : 'sequences'} of ${parts.map((p) => p.length)}`,
  });
}

interface HeadShape {
  /** Rows and probes of each sequence. */
  sequences: readonly (readonly [rows: number, probes: number])[];
  width: number;
  words: number;
}

function headTable({ sequences }: HeadShape) {
  const totals = (which: 0 | 1): number[] =>
    sequences.map((_, s) => sequences.slice(0, s).reduce((n, q) => n + q[which], 0));
  const [rows, probes] = [totals(0), totals(1)];
  return {
    rows: sequences.reduce((n, q) => n + q[0], 0),
    probes: sequences.reduce((n, q) => n + q[1], 0),
    side: Math.max(...sequences.map((q) => q[0])),
    probeSide: Math.max(...sequences.map((q) => q[1])),
    table: sequences.flatMap((q, s) => [rows[s], q[0], probes[s], q[1]]),
  };
}

/** [dhidden, gram, probes, sum of Dᵀ hidden] from the dense D. */
const headBackward =
  (shape: HeadShape, target: Host, probeIds: Host): Outputs =>
  (h, w) => {
    const { side, probeSide, table } = headTable(shape);
    const words = cast(unsqueeze(arange(w.shape[0], { device: 'cpu' }), 0), 'int32');
    const hot = cast(equal(unsqueeze(toTensor(target, 'cpu', 'int32'), 1), words), 'float64');
    const d = add(hot, neg(exp(logSoftmax(linear(h, w)))));
    const pad = (x: Tensor, axis: number, length: number): Tensor =>
      concat(
        [
          x,
          fill(
            emptyLike(
              x,
              x.shape.map((n, i) => (i === axis ? length - n : n)),
            ),
            0,
          ),
        ],
        axis,
      );
    const each = shape.sequences.map(([rows, probes], s) => {
      const own = slice(d, 0, table[4 * s], table[4 * s] + rows);
      const at = Int32Array.from(probeIds.values.slice(table[4 * s + 2], table[4 * s + 2] + probes));
      return {
        gram: unsqueeze(pad(pad(matmul(own, transpose(own)), 0, side), 1, side), 0),
        probes: pad(transpose(gatherRows(transpose(own), Tensor.from(at, { device: 'cpu' }))), 1, probeSide),
      };
    });
    return [matmul(d, w), concat(each.map((e) => e.gram)), concat(each.map((e) => e.probes)), matmul(transpose(d), h)];
  };

function headInputs(shape: HeadShape): InputSpec[] {
  const { rows, probes, table } = headTable(shape);
  return [
    input([rows, shape.width], -0.5, 0.5),
    input([shape.words, shape.width], -0.5, 0.5),
    ids(rows, shape.words),
    integers([shape.sequences.length, 4], table),
    ids(probes, shape.words),
  ];
}

function logSumExpOf(hidden: Tensor, weight: Tensor): Tensor {
  const lse = wide(hidden, [hidden.shape[0]]);
  const zero = fill(emptyLike(hidden, [1], 'int32'), 0);
  launch('vocabHead', [wide(hidden, [1]), lse, null, null, hidden, weight, zero, zero, null]);
  return lse;
}

function vocabHeadSequences(shape: HeadShape): OpCase {
  const { rows, side, probeSide } = headTable(shape);
  const secondRows = shape.sequences[0][0];
  return opCase({
    ...base,
    op: 'vocabHeadSequences',
    inputs: [...headInputs(shape), accumulator([2, rows])],
    run: (_, hidden, weight, target, table, probeIds, coefficients) => {
      const lse = logSumExpOf(hidden, weight);
      const dhidden = emptyLike(hidden);
      const [gram, probes] = [wide(hidden, [shape.sequences.length, side, side]), wide(hidden, [rows, probeSide])];
      const [first, second] = [wide(weight, weight.shape), wide(weight, weight.shape)];
      const given = [hidden, weight, lse, target, table, probeIds];
      launch('vocabHeadSequences', [dhidden, gram, probes, first, second, ...given, coefficients], [secondRows]);
      const only = emptyLike(hidden);
      launch('vocabHeadSequences', [only, null, null, null, null, ...given, null], [0]);
      return [dhidden, gram, probes, first, second, only];
    },
    reference: (at, hidden, weight, target, _table, probeIds, coefficients) => {
      const run = (scale: (row: number) => number): Host[] => {
        const scaled = host(
          hidden.shape,
          hidden.values.map((v, i) => v * scale(Math.floor(i / shape.width))),
        );
        // The weight's gradient is linear in the hidden rows that D multiplies.
        const f: Outputs = (h, w, c) => {
          const [dhidden, gram, probes] = headBackward(shape, target, probeIds)(h, w);
          const words = cast(unsqueeze(arange(shape.words, { device: 'cpu' }), 0), 'int32');
          const hot = cast(equal(unsqueeze(toTensor(target, 'cpu', 'int32'), 1), words), 'float64');
          const d = add(hot, neg(exp(logSoftmax(linear(h, w)))));
          return [dhidden, gram, probes, matmul(transpose(d), c)];
        };
        return evaluated(f, [hidden, weight, scaled], []).outputs;
      };
      const [dhidden, gram, probes, first] = run((r) => coefficients.values[r]);
      const second = run((r) => (r < secondRows ? coefficients.values[rows + r] : 0))[3];
      return [dhidden, ...[gram, probes, first, second].map((x) => inWide(at, x)), dhidden];
    },
    note: `sequences ${shape.sequences.map((s) => s.join('+')).join(' ')}`,
  });
}

/** Symmetric matrices and zeros beyond each sequence, from any values. */
function masked(shape: HeadShape, x: Host, kind: 'gram' | 'probes'): Host {
  const { side, probeSide, table } = headTable(shape);
  const values = new Float64Array(x.values.length);
  shape.sequences.forEach(([rows, probes], s) => {
    for (let i = 0; i < rows; i++)
      for (let j = 0; j < (kind === 'gram' ? rows : probes); j++) {
        const at = kind === 'gram' ? (s * side + i) * side + j : (table[4 * s] + i) * probeSide + j;
        values[at] = kind === 'gram' ? x.values[(s * side + Math.min(i, j)) * side + Math.max(i, j)] : x.values[at];
      }
  });
  return host(x.shape, values, x.dtype);
}

function vocabHeadTangent(shape: HeadShape, asGiven = false): OpCase {
  const { rows, side, probeSide } = headTable(shape);
  const count = shape.sequences.length;
  return opCase({
    ...base,
    op: 'vocabHeadTangent',
    inputs: [
      ...headInputs(shape),
      input([rows, shape.width]),
      accumulator([count, side, side]),
      accumulator([rows, probeSide]),
      input([shape.words, shape.width], -0.1, 0.1),
    ],
    run: (at, hidden, weight, target, table, probeIds, hiddenDot, gram, probes, weightDot) => {
      const lse = logSumExpOf(hidden, weight);
      const onDevice = (x: Tensor, kind: 'gram' | 'probes'): Tensor =>
        asGiven ? x : toTensor(masked(shape, toHost(x), kind), at.device, x.dtype);
      const dots = [onDevice(gram, 'gram'), onDevice(probes, 'probes')];
      const given = [hidden, weight, lse, target, table, probeIds];
      const all = [emptyLike(hidden), wide(weight, weight.shape)];
      launch('vocabHeadTangent', [...all, hiddenDot, ...dots, weightDot, ...given, null]);
      const some = [emptyLike(hidden), wide(weight, weight.shape)];
      launch('vocabHeadTangent', [...some, hiddenDot, null, null, null, ...given, null]);
      return [...all, ...some];
    },
    reference: (at, hidden, weight, target, _table, probeIds, hiddenDot, gram, probes, weightDot) => {
      const f = headBackward(shape, target, probeIds);
      const dots = [hiddenDot, masked(shape, gram, 'gram'), masked(shape, probes, 'probes'), weightDot];
      const all = evaluated(f, [hidden, weight], dots).cotangents;
      const some = evaluated(f, [hidden, weight], [hiddenDot]).cotangents;
      return [all[0], inWide(at, all[1]), some[0], inWide(at, some[1])];
    },
    note: `sequences ${shape.sequences.map((s) => s.join('+')).join(' ')}`,
  });
}

const pair = (prompt: number, ...branches: number[]): reference.Part[] => [
  { length: prompt },
  ...branches.map((length) => ({ length, parent: 0 })),
];

/** For the benchmark alone. */
const timed = (c: OpCase): OpCase => ({ ...c, name: `${c.name} timed`, size: 'bench', reference: undefined });
const pairOfResponses: HeadShape = {
  sequences: Array.from({ length: 2 }, () => [128, 384] as const),
  width: 576,
  words: 49152,
};

export const tangentCases = (): OpCase[] => [
  attentionTangent(pair(3, 2, 2), [2, 1], 4),
  attentionTangent(pair(9, 3, 5), [2, 1], 200, true),
  attentionTangent(pair(70, 40, 66), [4, 2], 64),
  attentionTangent(pair(67, 5, 70), [2, 1], 64, true),
  attentionTangent(pair(150, 131, 20), [3, 3], 80),
  timed(attentionTangent(pair(128, 128, 128), [9, 3], 64)),
  rmsNormTangent([4, 3], 5, 5),
  rmsNormTangent([70, 60], 80, 131),
  rmsNormTangent([3, 2], 3, 8200),
  swigluTangent(7, 4, 5),
  swigluTangent(50, 33, 131),
  vocabHeadSequences({
    sequences: [
      [3, 4],
      [2, 5],
    ],
    width: 5,
    words: 11,
  }),
  vocabHeadSequences({
    sequences: [
      [20, 30],
      [27, 35],
      [1, 3],
    ],
    width: 40,
    words: 2100,
  }),
  vocabHeadTangent({
    sequences: [
      [3, 4],
      [2, 5],
    ],
    width: 5,
    words: 11,
  }),
  vocabHeadTangent({
    sequences: [
      [20, 30],
      [27, 35],
      [1, 3],
    ],
    width: 40,
    words: 2100,
  }),
  timed(rmsNormTangent([256, 256], 384, 576)),
  timed(swigluTangent(512, 384, 1536)),
  timed(vocabHeadSequences(pairOfResponses)),
  timed(vocabHeadTangent(pairOfResponses, true)),
];
