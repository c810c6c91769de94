// Cases of what the contract (native/ops/kernels.def) offers beyond the ops of src/ops: cotangent row maps, probes of the
// vocabulary head, products into a wider dtype. Launched directly; what they mean is the vjp of the op's definition.
import { vjp } from '../../../src/autograd/transforms.js';
import { launch } from '../../../src/native/launch.js';
import { mul, silu } from '../../../src/ops/elementwise.js';
import { headDefinition } from '../../../src/ops/head.js';
import { emptyLike, fill } from '../../../src/ops/movement.js';
import { SegmentLayout } from '../../../src/ops/segments.js';
import { attentionDefinition, rmsNormDefinition } from '../../../src/ops/transformer.js';
import { accumulationDType, type DType } from '../../../src/tensor/dtype.js';
import { scope } from '../../../src/tensor/scope.js';
import type { Tensor } from '../../../src/tensor/tensor.js';
import { build, type Host, host, pick } from '../host.js';
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
import * as reference from '../reference.js';

const base = { differentiable: false, opClass: 'fused' } as const;

/** Cotangents of `inputs` in float64, by the definition. */
function pulledBack(f: (...x: Tensor[]) => Tensor, inputs: readonly Host[], cotangent: Host): Host[] {
  return scope(() => {
    const tensors = inputs.map((x) => toTensor(x, 'cpu', 'float64'));
    const [, [given]] = vjp((xs: Tensor[]) => f(...xs), [tensors], toTensor(cotangent, 'cpu', 'float64'));
    return given.map((g) => host(g.shape, g.dataSync()));
  });
}

const wideOf = (dtype: DType): DType => accumulationDType(dtype);
const zerosWide = (like: Tensor): Tensor => fill(emptyLike(like, like.shape, wideOf(like.dtype)), 0);
const int32 = (values: Host): Tensor => toTensor(values, 'cpu', 'int32');

/** Rows of a host array: what cotangent rows see of primal ones. */
const rowsOf = (x: Host, map: Host): Host =>
  build([map.values.length, ...x.shape.slice(1)], (i) => pick(x, [map.values[i[0]], ...i.slice(1)]));

const rowMap = (count: number, limit: number): InputSpec => ids(count, limit);

function rmsNormBackward(rows: number, primal: number, width: number): OpCase {
  const eps = 1e-5;
  return opCase({
    ...base,
    op: 'rmsNormBackward',
    inputs: [input([rows, width]), input([primal, width]), input([width]), rowMap(rows, primal), input([rows, width])],
    run: (at, dy, x, weight, map, dsum) => {
      const rstd = emptyLike(x, [primal], wideOf(at.dtype));
      launch('rmsNorm', [emptyLike(x), rstd, x, weight], [eps]);
      const [dx, dweight] = [emptyLike(dy), zerosWide(weight)];
      launch('rmsNormBackward', [dx, dweight, dy, x, weight, rstd, map, null]);
      const only = [emptyLike(dy), zerosWide(weight)];
      launch('rmsNormBackward', [only[0], null, dy, x, weight, rstd, map, dsum]);
      launch('rmsNormBackward', [null, only[1], dy, x, weight, rstd, map, null]);
      return [dx, dweight, ...only];
    },
    reference: (at, dy, x, weight, map, dsum) => {
      const [dx, dw] = pulledBack((a, w) => rmsNormDefinition(a, w, eps), [rowsOf(x, map), weight], dy);
      const wide = host(dw.shape, dw.values, wideOf(at.dtype));
      const added = host(
        dx.shape,
        dx.values.map((v, i) => v + dsum.values[i]),
      );
      return [dx, wide, added, wide];
    },
    note: 'row map',
  });
}

function swigluBackward(rows: number, primal: number, width: number): OpCase {
  return opCase({
    ...base,
    op: 'swigluBackward',
    inputs: [input([rows, width]), input([primal, width], -3, 3), input([primal, width]), rowMap(rows, primal)],
    run: (_, dy, gate, up, map) => {
      const grads = [emptyLike(dy), emptyLike(dy)];
      launch('swigluBackward', [...grads, dy, gate, up, map]);
      return grads;
    },
    reference: (_, dy, gate, up, map) =>
      pulledBack((a, b) => mul(silu(a), b), [rowsOf(gate, map), rowsOf(up, map)], dy),
    note: 'row map',
  });
}

/** Two cotangent streams over each shared prompt: the branches' gradients to it stay apart. */
function attentionBackward(parts: readonly reference.Part[], heads: [number, number], width: number): OpCase {
  const primal = new SegmentLayout(parts);
  const streams = parts.flatMap((p, i) => ((p.parent ?? -1) >= 0 ? [p.parent!, i] : []));
  const apart = new SegmentLayout(
    streams.map((s, i) => ({ length: parts[s].length, parent: i % 2 === 1 ? i - 1 : undefined })),
  );
  const map = streams.flatMap((s) => {
    const { start, length } = primal.segments[s];
    return Array.from({ length }, (_, i) => start + i);
  });
  const scale = 1 / Math.sqrt(width);
  const [q, k] = heads.map((h) => input([primal.total, h, width]));
  return opCase({
    ...base,
    op: 'attentionBackward',
    inputs: [input([apart.total, heads[0], width]), q, k, k, integers([map.length], map)],
    run: (at, dout, ...rest) => {
      const [a, b, c, rows] = rest;
      const [out, lse] = [emptyLike(a), emptyLike(a, a.shape.slice(0, 2), wideOf(at.dtype))];
      const segments = primal.on(at.device).segments;
      launch('attention', [out, lse, a, b, c, segments], [scale]);
      const grads = heads.concat(heads[1]).map((h) => emptyLike(a, [apart.total, h, width]));
      const cotangentSegments = apart.on(at.device).segments;
      launch('attentionBackward', [...grads, dout, a, b, c, out, lse, segments, cotangentSegments, rows], [scale]);
      return grads;
    },
    reference: (_, dout, ...rest) => {
      const [a, b, c, rows] = rest;
      const inputs = [a, b, c].map((x) => rowsOf(x, rows));
      return pulledBack((x, y, z) => attentionDefinition(x, y, z, apart, scale), inputs, dout);
    },
    note: `cotangent segments of ${parts.map((p) => p.length)}`,
  });
}

function vocabHeadBackward(rows: number, primal: number, width: number, words: number, targets: number): OpCase {
  const accumulate = (at: Place, x: Host): Host => host(x.shape, x.values, wideOf(at.dtype));
  return opCase({
    ...base,
    op: 'vocabHeadBackward',
    inputs: [
      accumulator([targets]),
      input([primal, width]),
      input([words, width]),
      ids(targets, rows),
      ids(targets, words),
      rowMap(rows, primal),
    ],
    run: (at, g, hidden, weight, row, id, map) => {
      const wide = wideOf(at.dtype);
      const lse = emptyLike(hidden, [primal], wide);
      const zero = fill(emptyLike(id, [1]), 0);
      launch('vocabHead', [emptyLike(hidden, [1], wide), lse, null, null, hidden, weight, zero, zero, null]);
      const dhidden = emptyLike(hidden, [rows, width]);
      const dweight = [zerosWide(weight), fill(emptyLike(weight), 0)];
      launch('vocabHeadBackward', [dhidden, dweight[0], g, hidden, weight, lse, row, id, map]);
      launch('vocabHeadBackward', [null, dweight[1], g, hidden, weight, lse, row, id, map]);
      return [dhidden, ...dweight];
    },
    reference: (at, g, hidden, weight, row, id, map) => {
      const f = (h: Tensor, w: Tensor): Tensor => headDefinition(h, w, int32(row), int32(id));
      const [dhidden, dweight] = pulledBack(f, [rowsOf(hidden, map), weight], g);
      return [dhidden, accumulate(at, dweight), dweight];
    },
    note: 'row map',
  });
}

function probes(rows: number, width: number, words: number, count: number): OpCase {
  return opCase({
    ...base,
    op: 'vocabHead',
    opClass: 'head',
    inputs: [input([rows, width]), input([words, width]), ids(3, rows), ids(3, words), ids(count, words)],
    run: (at, hidden, weight, row, id, probe) => {
      const wide = wideOf(at.dtype);
      const [logProbs, lse, probed] = [[3], [rows], [rows, count]].map((shape) => emptyLike(hidden, shape, wide));
      launch('vocabHead', [logProbs, lse, null, probed, hidden, weight, row, id, probe]);
      return [logProbs, lse, probed];
    },
    reference: (at, hidden, weight, row, id, probe) => {
      const logits = reference.linear(hidden, weight);
      const lse = reference.logSumExp(logits);
      const at2 = (r: number, w: number): number => pick(logits, [r, w]) - lse.values[r];
      const wide = wideOf(at.dtype);
      return [
        build([3], ([n]) => at2(row.values[n], id.values[n]), wide),
        host([rows], lse.values, wide),
        build([rows, count], ([r, n]) => at2(r, probe.values[n]), wide),
      ];
    },
    note: 'probes',
  });
}

/** bfloat16 operands into a float32 product, accumulated: how gradient buffers are filled. */
function wideProduct(m: number, k: number, n: number): OpCase {
  return opCase({
    ...base,
    op: 'matmul',
    opClass: 'head',
    inputs: [input([m, k]), input([n, k])],
    run: (at, a, b) => {
      const out = fill(emptyLike(a, [m, n], wideOf(at.dtype)), 1);
      const transposed = b.view([k, n], [1, k]);
      launch('matmul', [out, a, transposed, null], [2, 1]);
      return out;
    },
    reference: (at, a, b) => {
      const product = reference.linear(a, b);
      return host(
        [m, n],
        product.values.map((x) => 1 + 2 * x),
        wideOf(at.dtype),
      );
    },
    note: 'into the accumulation dtype',
  });
}

export const kernelCases = (): OpCase[] => [
  rmsNormBackward(7, 4, 5),
  rmsNormBackward(130, 70, 67),
  rmsNormBackward(5, 3, 1104), // a row of a GPU's block
  rmsNormBackward(5, 3, 8200), // a row that its registers do not hold
  swigluBackward(7, 4, 5),
  swigluBackward(50, 33, 67),
  attentionBackward([{ length: 3 }, { length: 2, parent: 0 }, { length: 2, parent: 0 }], [2, 1], 4),
  attentionBackward([{ length: 70 }, { length: 40, parent: 0 }, { length: 66, parent: 0 }], [4, 2], 64),
  attentionBackward([{ length: 9 }, { length: 5, parent: 0 }, { length: 66, parent: 0 }], [1, 1], 64), // one split
  attentionBackward([{ length: 70 }, { length: 5, parent: 0 }, { length: 9, parent: 0 }], [2, 1], 128),
  attentionBackward([{ length: 9 }, { length: 66, parent: 0 }, { length: 5, parent: 0 }], [2, 2], 128), // one split
  vocabHeadBackward(7, 4, 5, 11, 9),
  vocabHeadBackward(3, 2, 2, 5, 8200), // so many targets that a GPU sorts them in tiles
  vocabHeadBackward(50, 33, 40, 1500, 80),
  probes(4, 5, 9, 3),
  probes(33, 40, 1500, 7),
  wideProduct(3, 4, 5),
  wideProduct(70, 133, 67),
];
