// What each op refuses, and how it says so. Every message names the op, what was expected and what was found. `later`: the
// arithmetic finds it, and the next read of the result reports it.

import { launch } from '../../../src/native/launch.js';
import * as elementwise from '../../../src/ops/elementwise.js';
import { vocabHead } from '../../../src/ops/head.js';
import * as lora from '../../../src/ops/lora.js';
import * as movement from '../../../src/ops/movement.js';
import { arange, cast } from '../../../src/ops/movement.js';
import { linear, matmul } from '../../../src/ops/product.js';
import { max, mean, min, sum, sumTo } from '../../../src/ops/reduce.js';
import { SegmentLayout } from '../../../src/ops/segments.js';
import { logSumExp, softmax } from '../../../src/ops/softmax.js';
import * as transformer from '../../../src/ops/transformer.js';
import type { DType } from '../../../src/tensor/dtype.js';
import type { Device } from '../../../src/tensor/storage.js';
import { Tensor } from '../../../src/tensor/tensor.js';

export interface ErrorCase {
  op: string;
  name: string;
  run: (make: Make) => unknown;
  message: RegExp;
  later?: boolean;
}

/** Makes a tensor of ones, twos, ... of a shape; integers of given values. */
export interface Make {
  (shape: readonly number[], dtype?: DType): Tensor;
  ids: (...values: number[]) => Tensor;
}

export function makeOn(device: Device): Make {
  const make = (shape: readonly number[], dtype: DType = 'float32'): Tensor => {
    const size = shape.reduce((a, b) => a * b, 1);
    return Tensor.from(
      Float64Array.from({ length: size }, (_, i) => i + 1),
      { shape, dtype, device },
    );
  };
  const ids = (...values: number[]): Tensor => Tensor.from(Int32Array.from(values), { device });
  return Object.assign(make, { ids });
}

const refuse = (op: string, name: string, run: ErrorCase['run'], message: RegExp): ErrorCase => ({
  op,
  name,
  run,
  message,
});
const refuseLater = (op: string, name: string, run: ErrorCase['run'], message: RegExp): ErrorCase => ({
  ...refuse(op, name, run, message),
  later: true,
});

const elementwiseErrors: ErrorCase[] = [
  ...elementwise.unaryNames.map((op) =>
    refuse(
      op,
      'integers',
      (t) => elementwise.unary(op, t([2], 'int32')),
      RegExp(`\\[${op}\\] expected float.*i32\\[2\\]`),
    ),
  ),
  ...elementwise.binaryNames.map((op) =>
    refuse(
      op,
      'shapes that do not broadcast',
      (t) => elementwise.binary(op, t([2, 3]), t([2])),
      RegExp(`\\[${op}\\] expected shapes that broadcast, found \\[2,3\\] and \\[2\\]`),
    ),
  ),
  ...elementwise.compareNames.map((op) =>
    refuse(op, 'shapes that do not broadcast', (t) => elementwise.compare(op, t([4]), t([3])), /found \[4\] and \[3\]/),
  ),
  refuse('add', 'float16', (t) => elementwise.add(t([2], 'float16'), t([2], 'float16')), /\[add\] expected.*f16.*cast/),
  refuse('mul', 'bool', (t) => elementwise.mul(t([2], 'bool'), 2), /\[mul\] expected.*bool\[2\]/),
  refuse(
    'where',
    'a condition that is not bool',
    (t) => elementwise.where(t([2]), t([2]), t([2])),
    /\[where\] expected a bool condition, found f32\[2\]/,
  ),
  refuse(
    'where',
    'shapes that do not broadcast',
    (t) => elementwise.where(cast(t([2]), 'bool'), t([3]), t([3])),
    /\[where\].*\[2\] and \[3\]/,
  ),
];

const reduceErrors: ErrorCase[] = [
  refuse(
    'sum',
    'an axis out of range',
    (t) => sum(t([2, 3]), { axes: 2 }),
    /\[sum\] expected an axis from -2 to 1, found 2/,
  ),
  refuse('mean', 'an axis out of range', (t) => mean(t([2]), { axes: -2 }), /\[mean\] expected an axis/),
  refuse('max', 'nothing to reduce', (t) => max(t([0, 3]), { axes: 0 }), /\[reduceMax\] expected at least one element/),
  refuse('min', 'nothing to reduce', (t) => min(t([0])), /\[reduceMin\] expected at least one element/),
  refuse('sumTo', 'a shape that does not broadcast', (t) => sumTo(t([2, 3]), [2]), /\[(sumTo|reshape)\] expected/),
];

const movementErrors: ErrorCase[] = [
  refuse('reshape', 'another size', (t) => movement.reshape(t([2, 3]), [4]), /\[reshape\] expected 6 elements.*\[4\]/),
  refuse(
    'reshape',
    'two unknown lengths',
    (t) => movement.reshape(t([4]), [-1, -1]),
    /\[reshape\] expected 4 elements/,
  ),
  refuse('permute', 'no permutation', (t) => movement.permute(t([2, 3]), [0, 0]), /\[permute\] expected a permutation/),
  refuse('transpose', 'one axis', (t) => movement.transpose(t([2])), /\[transpose\] expected an axis/),
  refuse(
    'broadcastTo',
    'a shape that does not fit',
    (t) => movement.broadcastTo(t([2, 3]), [3, 3]),
    /\[broadcastTo\].*\[2,3\].*\[3,3\]/,
  ),
  refuse('unsqueeze', 'an axis out of range', (t) => movement.unsqueeze(t([2]), 3), /\[unsqueeze\] expected an axis/),
  refuse('squeeze', 'a longer axis', (t) => movement.squeeze(t([2, 1]), 0), /\[squeeze\] expected length 1 at axis 0/),
  refuse(
    'slice',
    'an end out of range',
    (t) => movement.slice(t([2, 3]), 1, 1, 4),
    /\[slice\].*<= 3 along axis 1, found 1 to 4/,
  ),
  refuse('slice', 'a fraction', (t) => movement.slice(t([3]), 0, 0.5, 2), /\[slice\] expected/),
  refuse('concat', 'nothing', () => movement.concat([]), /\[concat\] expected at least one tensor/),
  refuse(
    'concat',
    'other lengths',
    (t) => movement.concat([t([2, 3]), t([2, 2])]),
    /\[concat\] expected.*f32\[2,3\].*f32\[2,2\]/,
  ),
  refuse('concat', 'other dtypes', (t) => movement.concat([t([2]), t([2], 'float64')]), /\[concat\] expected/),
  refuse('stack', 'other shapes', (t) => movement.stack([t([2]), t([3])]), /\[concat\] expected/),
  refuse(
    'copyInto',
    'another shape',
    (t) => movement.copyInto(t([2]), t([3])),
    /\[copyInto\] expected shape \[2\], found \[3\]/,
  ),
  refuse(
    'gatherRows',
    'ids that are no int32',
    (t) => movement.gatherRows(t([2, 3]), t([2])),
    /\[gatherRows\] expected int32 ids/,
  ),
  refuse(
    'gatherRows',
    'a vector as table',
    (t) => movement.gatherRows(t([2]), t.ids(0)),
    /\[gatherRows\] expected a table \[V, D\]/,
  ),
  refuseLater(
    'gatherRows',
    'an id out of range',
    (t) => movement.gatherRows(t([2, 3]), t.ids(0, 2)),
    /\[gatherRows\].*2/,
  ),
  refuseLater('gatherRows', 'a negative id', (t) => movement.gatherRows(t([2, 3]), t.ids(-1)), /\[gatherRows\].*-1/),
  refuse(
    'scatterRows',
    'ids that are no int32',
    (t) => movement.scatterRows(t([2, 3]), t([2]), 4),
    /\[scatterRows\] expected int32/,
  ),
  refuse(
    'scatterRows',
    'another count of ids',
    (t) => movement.scatterRows(t([2, 3]), t.ids(1), 4),
    /\[scatterRows\] expected/,
  ),
  refuseLater(
    'scatterRows',
    'an id out of range',
    (t) => movement.scatterRows(t([1, 3]), t.ids(4), 4),
    /\[scatterAddRows\].*4/,
  ),
  refuse(
    'gatherLast',
    'another count of ids',
    (t) => movement.gatherLast(t([2, 3]), t.ids(0)),
    /\[gatherLast\] expected x \[R, V\]/,
  ),
  refuseLater(
    'gatherLast',
    'an id out of range',
    (t) => movement.gatherLast(t([2, 3]), t.ids(0, 3)),
    /\[gatherLast\].*3/,
  ),
  refuse(
    'scatterLast',
    'another count of ids',
    (t) => movement.scatterLast(t([2]), t.ids(0), 4),
    /\[scatterLast\] expected/,
  ),
  refuseLater(
    'scatterLast',
    'an id out of range',
    (t) => movement.scatterLast(t([1]), t.ids(5), 4),
    /\[scatterLast\].*5/,
  ),
  refuseLater(
    'sequenceGradient',
    'rows of two lengths',
    (t) => gradientOf(t([3, 2]), t([4, 5]), t([2, 5]), t([2])),
    /\[sequenceGradient\] expected rows g \[T, O\] and x \[T, I\].*\[3, 2\], float32 \[4, 5\]/,
  ),
  refuseLater(
    'sequenceGradient',
    'a matrix of another shape',
    (t) => gradientOf(t([3, 2]), t([3, 5]), t([2, 4]), t([2])),
    /\[sequenceGradient\] expected contiguous float32 of 10 numbers, found float32 of 8/,
  ),
  refuseLater(
    'sequenceGradient',
    'a matrix of another dtype',
    (t) => gradientOf(t([3, 2]), t([3, 5]), t([2, 5], 'float64'), t([2])),
    /\[sequenceGradient\] expected contiguous float32 of 10 numbers, found float64 of 10/,
  ),
  refuseLater(
    'sequenceGradient',
    'no coefficients',
    (t) => gradientOf(t([3, 2]), t([3, 5]), t([2, 5]), null),
    /\[sequenceGradient\] expected coefficients/,
  ),
  refuseLater('argmax', 'nothing to choose from', (t) => movement.argmax(t([2, 0])), /\[argmax\] expected/),
  refuse('argmax', 'no axis', (t) => movement.argmax(t([])), /\[argmax\] expected at least one axis/),
  refuseLater('arange', 'bool', () => arange(3, { dtype: 'bool' }), /\[arange\] expected float32, float64 or int32/),
];

const productErrors: ErrorCase[] = [
  refuse(
    'matmul',
    'lengths that differ',
    (t) => matmul(t([2, 3]), t([2, 3])),
    /\[matmul\] expected.*f32\[2,3\].*f32\[2,3\].*transpose/,
  ),
  refuse('matmul', 'batches that differ', (t) => matmul(t([2, 2, 3]), t([3, 3, 2])), /\[matmul\].*\[2\] and \[3\]/),
  refuse('matmul', 'integers', (t) => matmul(t([2, 2], 'int32'), t([2, 2], 'int32')), /\[matmul\] expected floating/),
  refuse('matmul', 'a scalar', (t) => matmul(t([]), t([2, 2])), /\[matmul\] expected/),
  refuse(
    'linear',
    'lengths that differ',
    (t) => linear(t([2, 3]), t([4, 2])),
    /\[linear\] expected x \[\.\.\., in\].*f32\[2,3\].*f32\[4,2\]/,
  ),
  refuse('linear', 'dtypes that differ', (t) => linear(t([2, 3]), t([4, 3], 'float64')), /\[linear\].*one dtype/),
  refuse(
    'linear',
    'a bias of another length',
    (t) => linear(t([2, 3]), t([4, 3]), t([3])),
    /\[linear\] expected.*bias/,
  ),
  refuse(
    'linear',
    'a bias of another dtype',
    (t) => linear(t([2, 3]), t([4, 3]), t([4], 'float64')),
    /\[linear\] expected.*bias/,
  ),
];

const rowErrors: ErrorCase[] = [
  refuse('softmax', 'no axis', (t) => softmax(t([])), /\[softmax\] expected at least one axis/),
  refuseLater('softmax', 'integers', (t) => softmax(t([2], 'int32')), /\[softmax\] expected float/),
  refuse('logSumExp', 'no axis', (t) => logSumExp(t([])), /\[logSumExp\] expected at least one axis/),
];

const layout = new SegmentLayout([{ length: 2 }, { length: 1, parent: 0 }]);
const attend = (t: Make, q: number[], k: number[], v: number[], dtype: DType = 'float32'): Tensor =>
  transformer.groupedQueryAttention(t(q), t(k), t(v, dtype), layout);
const attention = /\[groupedQueryAttention\] expected q \[T, Hq, D\].*T = 3/;

const transformerErrors: ErrorCase[] = [
  refuse(
    'rmsNorm',
    'a weight of another length',
    (t) => transformer.rmsNorm(t([2, 3]), t([2]), 1e-5),
    /\[rmsNorm\].*f32\[2,3\].*f32\[2\]/,
  ),
  refuse(
    'rmsNorm',
    'a weight of another dtype',
    (t) => transformer.rmsNorm(t([2, 3]), t([3], 'float64'), 1e-5),
    /\[rmsNorm\].*one dtype/,
  ),
  refuse(
    'addRmsNorm',
    'a delta of another shape',
    (t) => transformer.addRmsNorm(t([2, 3]), t([3]), t([3]), 1e-5),
    /\[addRmsNorm\] expected x and delta.*f32\[2,3\].*f32\[3\]/,
  ),
  refuse(
    'addRmsNorm',
    'a weight of another length',
    (t) => transformer.addRmsNorm(t([2, 3]), t([2, 3]), t([2]), 1e-5),
    /\[addRmsNorm\].*f32\[2,3\].*f32\[2\]/,
  ),
  refuse(
    'swiglu',
    'shapes that differ',
    (t) => transformer.swiglu(t([2, 3]), t([2, 4])),
    /\[swiglu\].*f32\[2,3\].*f32\[2,4\]/,
  ),
  refuse(
    'swiglu',
    'dtypes that differ',
    (t) => transformer.swiglu(t([2]), t([2], 'float64')),
    /\[swiglu\].*f32\[2\].*f64\[2\]/,
  ),
  refuse(
    'rotaryEmbedding',
    'an odd width',
    (t) => transformer.rotaryEmbedding(t([1, 1, 3]), t.ids(0), t([2, 3])),
    /\[rotaryEmbedding\].*f32\[1,1,3\]/,
  ),
  refuse(
    'rotaryEmbedding',
    'positions that are no int32',
    (t) => transformer.rotaryEmbedding(t([1, 1, 2]), t([1]), t([2, 2])),
    /\[rotaryEmbedding\].*int32 positions/,
  ),
  refuse(
    'rotaryEmbedding',
    'a table of another dtype',
    (t) => transformer.rotaryEmbedding(t([1, 1, 2]), t.ids(0), t([2, 2], 'float64')),
    /\[rotaryEmbedding\].*f64\[2,2\]/,
  ),
  refuseLater(
    'rotaryEmbedding',
    'a position beyond the table',
    (t) => transformer.rotaryEmbedding(t([1, 1, 2]), t.ids(2), t([2, 2])),
    /\[rotary\].*2/,
  ),
  refuse(
    'groupedQueryAttention',
    'another count of rows',
    (t) => attend(t, [2, 1, 4], [3, 1, 4], [3, 1, 4]),
    attention,
  ),
  refuse(
    'groupedQueryAttention',
    'keys of another count',
    (t) => attend(t, [3, 1, 4], [2, 1, 4], [2, 1, 4]),
    attention,
  ),
  refuse(
    'groupedQueryAttention',
    'heads that do not divide',
    (t) => attend(t, [3, 3, 4], [3, 2, 4], [3, 2, 4]),
    attention,
  ),
  refuse('groupedQueryAttention', 'values unlike keys', (t) => attend(t, [3, 2, 4], [3, 2, 4], [3, 1, 4]), attention),
  refuse(
    'groupedQueryAttention',
    'dtypes that differ',
    (t) => attend(t, [3, 1, 4], [3, 1, 4], [3, 1, 4], 'float64'),
    attention,
  ),
  refuse(
    'loraLinear',
    'a rank that differs',
    (t) => lora.loraLinear(t([2, 3]), t([4, 3]), null, t([2, 3]), t([4, 1]), 1),
    /\[adaptedLinears\] expected/,
  ),
  refuse(
    'loraLinear',
    'an adapter of another width',
    (t) => lora.loraLinear(t([2, 3]), t([4, 3]), null, t([2, 4]), t([4, 2]), 1),
    /\[adaptedLinears\] expected/,
  ),
  refuse(
    'loraLinear',
    'an adapter of another height',
    (t) => lora.loraLinear(t([2, 3]), t([4, 3]), null, t([2, 3]), t([5, 2]), 1),
    /\[adaptedLinears\] expected/,
  ),
  refuse(
    'SegmentLayout',
    'a parent with a parent',
    () => new SegmentLayout([{ length: 1 }, { length: 1, parent: 0 }, { length: 1, parent: 1 }]),
    /\[SegmentLayout\] expected an earlier segment without parent/,
  ),
  refuse(
    'SegmentLayout',
    'a later parent',
    () => new SegmentLayout([{ length: 1, parent: 1 }, { length: 1 }]),
    /\[SegmentLayout\]/,
  ),
];

const headErrors: ErrorCase[] = [
  refuse(
    'vocabHead',
    'widths that differ',
    (t) => vocabHead(t([2, 3]), t([5, 2]), t.ids(0), t.ids(0)),
    /\[vocabHead\].*f32\[2,3\].*f32\[5,2\]/,
  ),
  refuse(
    'vocabHead',
    'ids of another count',
    (t) => vocabHead(t([2, 3]), t([5, 3]), t.ids(0), t.ids(0, 1)),
    /\[vocabHead\] expected int32 rows and ids/,
  ),
  refuseLater(
    'vocabHead',
    'an id out of range',
    (t) => vocabHead(t([2, 3]), t([5, 3]), t.ids(0), t.ids(5)).logProbs,
    /\[vocabHead\].*5/,
  ),
  refuseLater(
    'vocabHead',
    'a row out of range',
    (t) => vocabHead(t([2, 3]), t([5, 3]), t.ids(2), t.ids(0)).logProbs,
    /\[vocabHead\].*2/,
  ),
];

/** `first` after the gradient of rows g and x was added to it. */
function gradientOf(g: Tensor, x: Tensor, first: Tensor, coefficients: Tensor | null): Tensor {
  launch('sequenceGradient', [null, first, null, null, g, x, null, coefficients]);
  return first;
}

export const errorCases: readonly ErrorCase[] = [
  ...elementwiseErrors,
  ...reduceErrors,
  ...movementErrors,
  ...productErrors,
  ...rowErrors,
  ...transformerErrors,
  ...headErrors,
];
