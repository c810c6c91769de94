// Cases of a transformer block's fused ops: RMSNorm, rotary embedding, SwiGLU, attention over packed segments, LoRA linear.

import { mul, silu } from '../../../src/ops/elementwise.js';
import { adaptedLinears, adaptedLinearsDefinition, loraLinear } from '../../../src/ops/lora.js';
import { SegmentLayout } from '../../../src/ops/segments.js';
import {
  addRmsNorm,
  addRmsNormDefinition,
  attentionDefinition,
  groupedQueryAttention,
  rmsNorm,
  rmsNormDefinition,
  rotaryDefinition,
  rotaryEmbedding,
  swiglu,
} from '../../../src/ops/transformer.js';
import { mapBroadcast, roundTo } from '../host.js';
import { accumulator, type InputSpec, ids, input, integers, type Layout, type OpCase, opCase } from '../op-case.js';
import * as reference from '../reference.js';

type More = Partial<OpCase> & { note?: string };

const eps = 1e-5;
const rmsNormCases = (): OpCase[] => {
  const of = (x: InputSpec, weight: InputSpec, more: More = {}): OpCase =>
    opCase({
      op: 'rmsNorm',
      opClass: 'fused',
      inputs: [x, weight],
      run: (_, a, w) => rmsNorm(a, w, eps),
      reference: (_, a, w) => reference.rmsNorm(a, w, eps),
      definition: (_, a, w) => rmsNormDefinition(a, w, eps),
      rows: [0],
      params: { eps },
      ...more,
    });
  return [
    of(input([3, 5]), input([5])),
    of(input([2, 2, 3], -1, 1, 'transposed'), input([3], 0.5, 1.5)),
    of(input([4]), input([4]), { rows: [] }),
    // The gradient of one column is all cancellation: only float64 can tell.
    of(input([3, 1]), input([1]), { dtypes: ['float64'] }),
    of(input([37, 131], -3, 3, 'transposed'), input([131], 0.5, 1.5), { size: 'large' }),
    of(input([37, 576], -3, 3, 'sliced'), input([576], 0.5, 1.5, 'sliced'), { size: 'large' }),
    of(input([700, 96], -3, 3), input([96], 0.5, 1.5), { size: 'large' }),
    of(input([1024, 576]), input([576]), { size: 'bench', cost: { elements: 2 * 1024 * 576 } }),
  ];
};

const addRmsNormCases = (): OpCase[] => {
  const of = (x: InputSpec, delta: InputSpec, weight: InputSpec, more: More = {}): OpCase =>
    opCase({
      op: 'addRmsNorm',
      opClass: 'fused',
      inputs: [x, delta, weight],
      run: (_, a, d, w) => addRmsNorm(a, d, w, eps),
      reference: (at, a, d, w) => {
        const sum = mapBroadcast((p, q) => roundTo(at.dtype, p + q), [a, d]);
        return [sum, reference.rmsNorm(sum, w, eps)];
      },
      definition: (_, a, d, w) => addRmsNormDefinition(a, d, w, eps),
      rows: [0, 1],
      ...more,
    });
  const wide = (rows: number, width: number, layout?: Layout): InputSpec => input([rows, width], -3, 3, layout);
  const weight = (width: number, layout?: Layout): InputSpec => input([width], 0.5, 1.5, layout);
  return [
    of(input([3, 5]), input([3, 5]), input([5])),
    of(input([2, 3], -1, 1, 'transposed'), input([2, 3], -1, 1, 'sliced'), weight(3)),
    of(wide(37, 131, 'transposed'), wide(37, 131), weight(131), { size: 'large' }),
    of(wide(37, 576, 'sliced'), wide(37, 576), weight(576, 'sliced'), { size: 'large' }),
    of(wide(700, 96), wide(700, 96), weight(96), { size: 'large' }),
    of(input([1024, 576]), input([1024, 576]), input([576]), { size: 'bench', cost: { elements: 4 * 1024 * 576 } }),
  ];
};

const turn = (position: number, pair: number): number => position / 100 ** (pair / 3);
/** [P, D]: cosines, then sines. */
const table = (count: number, width: number): InputSpec => ({
  ...accumulator([count, width]),
  fixed: true,
  value: (_, at) => {
    const [position, column] = [Math.floor(at / width), at % width];
    const pair = column % (width / 2);
    return column < width / 2 ? Math.cos(turn(position, pair)) : Math.sin(turn(position, pair));
  },
});

const rotaryCases = (): OpCase[] => {
  const of = (x: InputSpec, positions: InputSpec, inverse: boolean, more: More = {}): OpCase => {
    const width = x.shape[2];
    const limit = 1 + Math.max(50, ...x.shape);
    return opCase({
      op: 'rotaryEmbedding',
      opClass: 'fused',
      inputs: [x, positions, table(limit, width)],
      run: (_, a, p, t) => rotaryEmbedding(a, p, t, inverse),
      reference: (_, a, p, t) => reference.rotary(a, p, t, inverse),
      definition: (_, a, p, t) => rotaryDefinition(a, p, t, inverse),
      rows: [0, 1],
      note: inverse ? 'inverse' : '',
      params: { inverse },
      ...more,
    });
  };
  return [
    of(input([3, 2, 4]), integers([3], [0, 1, 7]), false),
    of(input([3, 2, 4]), integers([3], [5, 1, 5]), true),
    of(input([2, 1, 2]), integers([2], [3, 0]), false),
    of(input([3, 2, 4], -1, 1, 'transposed'), integers([3], [2, 3, 4]), false),
    of(input([33, 3, 64]), ids(33, 50), false, { size: 'large' }),
    of(input([33, 3, 128], -1, 1, 'sliced'), ids(33, 50), true, { size: 'large' }),
    of(input([21, 2, 10]), ids(21, 50), false, { size: 'large' }),
    of(input([1024, 9, 64]), ids(1024, 1024), false, { size: 'bench', cost: { elements: 2 * 1024 * 9 * 64 } }),
  ];
};

const swigluCases = (): OpCase[] => {
  const of = (shape: number[], layouts: [Layout, Layout], more: More = {}): OpCase =>
    opCase({
      op: 'swiglu',
      opClass: 'fused',
      inputs: [input(shape, -3, 3, layouts[0]), input(shape, -3, 3, layouts[1])],
      run: (_, gate, up) => swiglu(gate, up),
      reference: (_, gate, up) => mapBroadcast((a, b) => a * reference.sigmoid(a) * b, [gate, up]),
      definition: (_, gate, up) => mul(silu(gate), up),
      rows: [0, 1],
      ...more,
    });
  return [
    of([3, 5], ['contiguous', 'contiguous']),
    of([2, 2, 3], ['sliced', 'transposed']),
    of([19, 131], ['sliced', 'sliced'], { size: 'large' }),
    of([300, 259], ['contiguous', 'transposed'], { size: 'large' }),
    of([1024, 1536], ['contiguous', 'contiguous'], { size: 'bench', cost: { elements: 3 * 1024 * 1536 } }),
  ];
};

interface AttentionShape {
  parts: readonly reference.Part[];
  heads: [query: number, key: number];
  width: number;
  layout?: Layout;
  scale?: number;
}

const visiblePairs = (parts: readonly reference.Part[]): number =>
  parts.reduce(
    (n, p) => n + p.length * (((p.parent ?? -1) >= 0 ? parts[p.parent!].length : 0) + (p.length + 1) / 2),
    0,
  );

function attentionCase({ parts, heads, width, layout = 'contiguous', scale }: AttentionShape, more: More = {}): OpCase {
  const segments = new SegmentLayout(parts);
  const factor = scale ?? 1 / Math.sqrt(width);
  const [queries, keys] = heads.map((h) => [segments.total, h, width]);
  return opCase({
    op: 'groupedQueryAttention',
    opClass: 'fused',
    inputs: [input(queries, -2, 2, layout), input(keys, -2, 2, layout), input(keys, -1, 1, layout)],
    run: (_, q, k, v) => groupedQueryAttention(q, k, v, segments, scale),
    reference: (_, q, k, v) => reference.attention(q, k, v, parts, factor),
    definition: (_, q, k, v) => attentionDefinition(q, k, v, segments, factor),
    note: `segments ${parts.map((p) => `${p.length}${(p.parent ?? -1) >= 0 ? `<${p.parent}` : ''}`).join(' ')}`,
    params: { parts, heads, width },
    ...more,
  });
}

const shared = (prompt: number, ...branches: number[]): reference.Part[] => [
  { length: prompt },
  ...branches.map((length) => ({ length, parent: 0 })),
];
const pairs = (count: number, prompt: number, branch: number): reference.Part[] =>
  Array.from({ length: count }, (_, i) => [
    { length: prompt },
    { length: branch, parent: 3 * i },
    { length: branch, parent: 3 * i },
  ]).flat();

const attentionCases = (): OpCase[] => {
  const large: More = { size: 'large' };
  const timed = (shape: AttentionShape): OpCase =>
    attentionCase(shape, {
      size: 'bench',
      cost: { flops: 4 * visiblePairs(shape.parts) * shape.heads[0] * shape.width },
    });
  return [
    attentionCase({ parts: [{ length: 3 }], heads: [1, 1], width: 4 }),
    attentionCase({ parts: shared(2, 2, 1), heads: [2, 1], width: 4 }),
    attentionCase({ parts: [{ length: 2 }, { length: 3 }], heads: [2, 2], width: 2, scale: 0.9 }),
    attentionCase({ parts: shared(2, 1, 2), heads: [2, 1], width: 4, layout: 'transposed' }),
    attentionCase({ parts: [{ length: 1 }, { length: 2, parent: 0 }, { length: 2 }], heads: [4, 2], width: 2 }),
    attentionCase({
      parts: [{ length: 0 }, { length: 3, parent: 0 }, { length: 2, parent: 0 }],
      heads: [1, 1],
      width: 4,
    }),
    // Beyond the kernels' head dimensions: several blocks of rows, too.
    attentionCase({ parts: shared(2, 2, 1), heads: [2, 1], width: 258 }, large),
    attentionCase({ parts: shared(130, 140, 3), heads: [2, 1], width: 300, layout: 'sliced' }, large),
    attentionCase({ parts: shared(17, 33, 5), heads: [3, 1], width: 64 }, large),
    attentionCase({ parts: shared(5, 70, 66), heads: [4, 2], width: 128, layout: 'sliced' }, large),
    attentionCase({ parts: shared(150, 131, 20), heads: [2, 1], width: 16 }, large),
    attentionCase({ parts: [{ length: 300 }], heads: [2, 2], width: 64 }, large),
    attentionCase({ parts: [{ length: 129 }, { length: 64 }, { length: 65 }], heads: [2, 1], width: 80 }, large),
    attentionCase(
      { parts: [...pairs(2, 9, 7), { length: 40 }], heads: [6, 2], width: 20, layout: 'transposed' },
      large,
    ),
    timed({ parts: pairs(4, 128, 128), heads: [9, 3], width: 64 }),
    timed({ parts: [{ length: 1024 }], heads: [14, 2], width: 64 }),
    timed({ parts: [{ length: 1024 }], heads: [8, 8], width: 128 }),
  ];
};

const loraCases = (): OpCase[] => {
  const scale = 1.5;
  const of = (rows: number, from: number, to: number, rank: number, bias: boolean, more: More = {}): OpCase =>
    opCase({
      op: 'loraLinear',
      opClass: 'fused',
      inputs: [
        input([rows, from]),
        input([to, from]),
        accumulator([rank, from]),
        accumulator([to, rank]),
        ...(bias ? [input([to])] : []),
      ],
      run: (_, x, w, a, b, c) => loraLinear(x, w, c ?? null, a, b, scale),
      reference: (_, x, w, a, b, c) =>
        mapBroadcast(
          (y, low) => y + scale * low,
          [reference.linear(x, w, c), reference.linear(reference.linear(x, a), b)],
        ),
      definition: (_, x, weight, a, b, c) =>
        adaptedLinearsDefinition(x, [{ weight, bias: c ?? null, adapter: { a, b } }], scale),
      rows: [0],
      note: bias ? 'bias' : '',
      params: { rank, scale },
      ...more,
    });
  return [
    of(3, 4, 3, 2, false),
    of(2, 3, 2, 1, true),
    of(65, 96, 131, 8, true, { size: 'large' }),
    of(300, 64, 40, 16, false, { size: 'large' }),
    of(1024, 576, 1536, 16, false, {
      size: 'bench',
      cost: { flops: 2 * 1024 * (576 * 1536 + 16 * (576 + 1536)) },
    }),
  ];
};

/** Linears of one input: `[out, rank of the adapter or 0, with a bias]` each. */
const adaptedCases = (): OpCase[] => {
  const scale = 0.75;
  type Part = readonly [to: number, rank: number, bias: boolean];
  const of = (rows: number, from: number, parts: readonly Part[], more: More = {}): OpCase => {
    const specs = parts.map(([to, rank, bias]) => [
      input([to, from]),
      ...(rank > 0 ? [accumulator([rank, from]), accumulator([to, rank])] : []),
      ...(bias ? [input([to])] : []),
    ]);
    /** What each linear takes, from the flat inputs. */
    const apart = <T>(flat: readonly T[]) => {
      let at = 0;
      return parts.map(([, rank, bias]) => {
        const weight = flat[at++];
        const adapter = rank > 0 ? { a: flat[at++], b: flat[at++] } : null;
        return { weight, adapter, bias: bias ? flat[at++] : null };
      });
    };
    return opCase({
      op: 'adaptedLinears',
      opClass: 'fused',
      inputs: [input([rows, from]), ...specs.flat()],
      run: (_, x, ...rest) => adaptedLinears(x, apart(rest), scale),
      reference: (_, x, ...rest) =>
        apart(rest).map(({ weight, bias, adapter }) => {
          const base = reference.linear(x, weight, bias ?? undefined);
          if (!adapter) return base;
          const low = reference.linear(reference.linear(x, adapter.a), adapter.b);
          return mapBroadcast((y, z) => y + scale * z, [base, low]);
        }),
      definition: (_, x, ...rest) => adaptedLinearsDefinition(x, apart(rest), scale),
      rows: [0],
      params: { scale },
      note: parts.map(([to, rank, bias]) => `${to}${rank > 0 ? ` r${rank}` : ''}${bias ? ' bias' : ''}`).join(', '),
      ...more,
    });
  };
  return [
    of(3, 4, [
      [3, 2, true],
      [2, 1, false],
    ]),
    of(2, 3, [
      [2, 0, false],
      [3, 2, false],
      [1, 0, true],
    ]),
    of(2, 3, [
      [2, 0, true],
      [2, 0, false],
    ]),
    of(
      65,
      96,
      [
        [131, 8, true],
        [33, 8, true],
        [33, 8, true],
      ],
      { size: 'large' },
    ),
    of(
      130,
      64,
      [
        [200, 16, false],
        [200, 4, false],
      ],
      { size: 'large' },
    ),
  ];
};

export const transformerCases = (): OpCase[] => [
  ...rmsNormCases(),
  ...addRmsNormCases(),
  ...rotaryCases(),
  ...swigluCases(),
  ...attentionCases(),
  ...loraCases(),
  ...adaptedCases(),
];
