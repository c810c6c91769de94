// Cases of the vocabulary head: several targets a row, rows without one, statistics, vocabularies beyond a block.
import { headDefinition, vocabHead } from '../../../src/ops/head.js';
import { host } from '../host.js';
import { type InputSpec, ids, input, integers, type OpCase, opCase } from '../op-case.js';
import * as reference from '../reference.js';

type More = Partial<OpCase> & { note?: string };

const accumulation = (dtype: string): 'float64' | 'float32' => (dtype === 'float64' ? 'float64' : 'float32');

function headCase(hidden: InputSpec, weight: InputSpec, rows: InputSpec, targets: InputSpec, more: More = {}): OpCase {
  return opCase({
    op: 'vocabHead',
    opClass: 'head',
    inputs: [hidden, weight, rows, targets],
    run: (_, h, w, r, t) => vocabHead(h, w, r, t).logProbs,
    reference: (at, h, w, r, t) => {
      const { shape, values } = reference.vocabHead(h, w, r, t).logProbs;
      return host(shape, values, accumulation(at.dtype));
    },
    definition: (_, h, w, r, t) => headDefinition(h, w, r, t),
    ...more,
  });
}

const statistics = (hidden: InputSpec, weight: InputSpec, more: More = {}): OpCase =>
  headCase(hidden, weight, integers([2], [0, 1]), integers([2], [1, 2]), {
    run: (_, h, w, r, t) => {
      const { logProbs, statistics: s } = vocabHead(h, w, r, t, { statistics: true });
      return [logProbs, s!.entropy, s!.argmax, s!.meanLogit, s!.logSumSquares];
    },
    reference: (at, h, w, r, t) => {
      const answer = reference.vocabHead(h, w, r, t);
      return [answer.logProbs, ...answer.statistics].map((x) => host(x.shape, x.values, accumulation(at.dtype)));
    },
    definition: undefined,
    differentiable: false,
    note: 'statistics',
    ...more,
  });

/** Log-probabilities of given ids at every row: targets in all combinations, for the reference. */
const probes = (hidden: InputSpec, weight: InputSpec, wanted: readonly number[]): OpCase =>
  headCase(hidden, weight, integers([1], [0]), integers([wanted.length], wanted), {
    run: (_, h, w, r, t) => {
      const { logProbs, probeLogProbs } = vocabHead(h, w, r, t.slice(0, 0, 1), { probes: t });
      return [logProbs, probeLogProbs!];
    },
    reference: (at, h, w, r, t) => {
      const [count, asked] = [h.shape[0], t.values.length];
      const all = Array.from({ length: count * asked }, (_, i) => i);
      const rows = host(
        [all.length],
        Float64Array.from(all, (i) => Math.floor(i / asked)),
      );
      const ids = host(
        [all.length],
        Float64Array.from(all, (i) => t.values[i % asked]),
      );
      const first = host([1], t.values.slice(0, 1));
      const answers = [reference.vocabHead(h, w, r, first), reference.vocabHead(h, w, rows, ids)];
      const shapes = [[1], [count, asked]];
      return answers.map((x, i) => host(shapes[i], x.logProbs.values, accumulation(at.dtype)));
    },
    definition: undefined,
    differentiable: false,
    note: 'probes',
  });

const several = integers([5], [0, 0, 2, 3, 2]);

const bench = (rows: number, width: number, vocabulary: number): OpCase =>
  headCase(
    input([rows, width], -0.3, 0.3),
    input([vocabulary, width], -0.3, 0.3),
    integers(
      [rows],
      Array.from({ length: rows }, (_, i) => i),
    ),
    ids(rows, vocabulary),
    { size: 'bench', cost: { flops: 2 * rows * width * vocabulary } },
  );

export const headCases = (): OpCase[] => [
  headCase(input([4, 3]), input([5, 3]), several, integers([5], [1, 4, 0, 0, 1])),
  headCase(input([2, 3]), input([1, 3]), integers([2], [1, 0]), integers([2], [0, 0]), { note: 'one word' }),
  headCase(input([3, 4], -1, 1, 'transposed'), input([4, 4], -1, 1, 'transposed'), integers([1], [1]), ids(1, 4)),
  headCase(input([33, 40]), input([1500, 40]), ids(50, 33), ids(50, 1500), { size: 'large' }),
  headCase(input([40, 64], -1, 1, 'sliced'), input([4203, 64], -1, 1, 'sliced'), ids(64, 40), ids(64, 4203), {
    size: 'large',
  }),
  headCase(input([3, 200], -2, 2), input([2050, 200]), ids(3, 3), ids(3, 2050), { size: 'large', note: 'peaked' }),
  headCase(input([4, 8]), input([9, 8]), ids(0, 4), ids(0, 9), {
    size: 'large',
    differentiable: false,
    note: 'no target',
  }),
  statistics(input([4, 3]), input([7, 3])),
  statistics(input([19, 64], -1, 1, 'transposed'), input([4099, 64])),
  probes(input([4, 3]), input([7, 3]), [6, 0, 2]),
  probes(input([19, 64]), input([4099, 64]), [4098, 17, 2048, 2047, 17]),
  bench(512, 576, 49152),
  bench(128, 896, 151936),
];
