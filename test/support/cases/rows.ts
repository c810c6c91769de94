// Cases of softmax, log-softmax and log-sum-exp along the last axis.
import { logSoftmax, logSumExp, softmax } from '../../../src/ops/softmax.js';
import type { Tensor } from '../../../src/tensor/tensor.js';
import type { Host } from '../host.js';
import { given, type InputSpec, input, type OpCase, opCase } from '../op-case.js';
import * as reference from '../reference.js';

const ops: Record<string, { run: (x: Tensor) => Tensor; reference: (x: Host) => Host }> = {
  softmax: { run: softmax, reference: reference.softmax },
  logSoftmax: { run: logSoftmax, reference: reference.logSoftmax },
  logSumExp: { run: logSumExp, reference: reference.logSumExp },
};

function rowCases(name: string): OpCase[] {
  const of = (spec: InputSpec, more: Partial<OpCase> & { note?: string } = {}): OpCase =>
    opCase({
      op: name,
      opClass: 'rows',
      inputs: [spec],
      run: (_, x) => ops[name].run(x),
      reference: (_, x) => ops[name].reference(x),
      rows: [0],
      ...more,
    });
  const masked = [0.5, -Infinity, 1, -Infinity, 2, -Infinity];
  return [
    of(input([2, 5], -3, 3)),
    of(input([4], -3, 3), { rows: [] }),
    of(input([2, 2, 3], -3, 3, 'transposed')),
    of(input([3, 1], -3, 3)),
    // A thread block of a GPU for the row, under the sanitizers too.
    of(input([1, 1030], -3, 3), { dtypes: ['float32'], differentiable: false }),
    of(input([7, 131], -20, 20, 'transposed'), { size: 'large' }),
    of(input([5, 3, 67], -20, 20, 'sliced'), { size: 'large' }),
    of(input([40, 5000], -20, 20), { size: 'large' }),
    of(given([2, 6], [...masked, 1e4, -1e4, 1e4, 9e3, 0, 1]), { size: 'large', note: 'masked and far apart' }),
    of(input([1024, 4096], -5, 5), { size: 'bench', cost: { elements: 2 * 1024 * 4096 } }),
  ];
}

export const softmaxCases = (): OpCase[] => Object.keys(ops).flatMap(rowCases);
