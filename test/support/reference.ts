// What each op means, in plain float64 loops written from the definition. Slow on purpose; shares no code with src/.
import { broadcastShape, build, type Host, host, pick, sizeOf } from './host.js';

export const sigmoid = (x: number): number => (x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x)));
export const softplus = (x: number): number => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

/** Folds elements of `x` over `axes`, in row-major order. */
export function reduce(
  x: Host,
  axes: readonly number[],
  keepDims: boolean,
  start: number,
  f: (a: number, b: number) => number,
): Host {
  const kept = x.shape.map((n, i) => (axes.includes(i) ? 1 : n));
  const out = new Float64Array(sizeOf(kept)).fill(start);
  const target = build(kept, (_, at) => at);
  build(x.shape, (index, at) => {
    const to = pick(target, index);
    out[to] = f(out[to], x.values[at]);
    return 0;
  });
  return host(keepDims ? kept : x.shape.filter((_, i) => !axes.includes(i)), out);
}

export function matmul(a: Host, b: Host): Host {
  const left = a.shape.length === 1 ? host([1, a.shape[0]], a.values) : a;
  const right = b.shape.length === 1 ? host([b.shape[0], 1], b.values) : b;
  const [m, k, n] = [left.shape.at(-2)!, left.shape.at(-1)!, right.shape.at(-1)!];
  const batch = broadcastShape(left.shape.slice(0, -2), right.shape.slice(0, -2));
  const out = host([...batch, m, n], new Float64Array(sizeOf(batch) * m * n));
  const matrices = (x: Host): Host => build(x.shape.slice(0, -2), (_, at) => at);
  const [as, bs] = [matrices(left), matrices(right)];
  build(batch, (index, at) => {
    const [x, y] = [left.values.subarray(pick(as, index) * m * k), right.values.subarray(pick(bs, index) * k * n)];
    for (let i = 0; i < m; i++)
      for (let l = 0; l < k; l++)
        for (let j = 0; j < n; j++) out.values[(at * m + i) * n + j] += x[i * k + l] * y[l * n + j];
    return 0;
  });
  const shape = out.shape.filter(
    (_, i) =>
      !(a.shape.length === 1 && i === out.shape.length - 2) && !(b.shape.length === 1 && i === out.shape.length - 1),
  );
  return host(shape, out.values);
}

/** x weightᵀ + bias on rows, without index arithmetic per element: for the larger cases too. */
export function linear(x: Host, weight: Host, bias?: Host): Host {
  const [outputs, inputs] = weight.shape;
  const rows = x.values.length / inputs;
  const values = new Float64Array(rows * outputs);
  for (let r = 0; r < rows; r++)
    for (let o = 0; o < outputs; o++) {
      let total = bias ? bias.values[o] : 0;
      for (let i = 0; i < inputs; i++) total += x.values[r * inputs + i] * weight.values[o * inputs + i];
      values[r * outputs + o] = total;
    }
  return host([...x.shape.slice(0, -1), outputs], values);
}

/** f on every row of the last axis; f returns one number or a row of `width`. */
function mapRows(x: Host, shape: readonly number[], f: (row: Float64Array) => ArrayLike<number>): Host {
  const width = x.shape.at(-1)!;
  const values: number[] = [];
  for (let at = 0; at < x.values.length; at += width) values.push(...Array.from(f(x.values.subarray(at, at + width))));
  return host(shape, values);
}

export function logSumExpOf(row: Float64Array): number {
  const top = row.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  if (!Number.isFinite(top)) return top;
  return top + Math.log(row.reduce((a, b) => a + Math.exp(b - top), 0));
}

export const softmax = (x: Host): Host =>
  mapRows(x, x.shape, (row) => {
    const lse = logSumExpOf(row);
    return row.map((v) => Math.exp(v - lse));
  });
export const logSoftmax = (x: Host): Host =>
  mapRows(x, x.shape, (row) => {
    const lse = logSumExpOf(row);
    return row.map((v) => v - lse);
  });
export const logSumExp = (x: Host): Host => mapRows(x, x.shape.slice(0, -1), (row) => [logSumExpOf(row)]);

export const rmsNorm = (x: Host, weight: Host, eps: number): Host =>
  mapRows(x, x.shape, (row) => {
    const scale = 1 / Math.sqrt(row.reduce((a, b) => a + b * b, 0) / row.length + eps);
    return row.map((v, i) => v * scale * weight.values[i]);
  });

/** Pairs (i, i + D/2) of each head, turned by the angle whose cosine and sine stand in the table. */
export function rotary(x: Host, positions: Host, table: Host, inverse: boolean): Host {
  const half = x.shape[2] / 2;
  return build(x.shape, ([t, head, d]) => {
    const pair = d % half;
    const cos = pick(table, [positions.values[t], pair]);
    const sin = pick(table, [positions.values[t], half + pair]) * (inverse ? -1 : 1);
    const a = pick(x, [t, head, pair]);
    const b = pick(x, [t, head, half + pair]);
    return d < half ? a * cos - b * sin : b * cos + a * sin;
  });
}

/** A segment as tests write it; start and positions follow from the order. */
export interface Part {
  length: number;
  parent?: number;
}

/** The rows that each row attends to, in order: its parent's, then its own up to itself. */
export function contexts(parts: readonly Part[]): number[][] {
  const starts = parts.map((_, i) => parts.slice(0, i).reduce((n, p) => n + p.length, 0));
  const range = (from: number, count: number): number[] => Array.from({ length: count }, (_, i) => from + i);
  return parts.flatMap((part, s) =>
    range(0, part.length).map((i) => [
      ...((part.parent ?? -1) >= 0 ? range(starts[part.parent!], parts[part.parent!].length) : []),
      ...range(starts[s], i + 1),
    ]),
  );
}

export function attention(q: Host, k: Host, v: Host, parts: readonly Part[], scale: number): Host {
  const [rows, heads, width] = q.shape;
  const group = heads / k.shape[1];
  const out = new Float64Array(q.values.length);
  contexts(parts).forEach((context, t) => {
    for (let h = 0; h < heads; h++) {
      const from = (t * heads + h) * width;
      const keyAt = (j: number): number => (j * k.shape[1] + Math.floor(h / group)) * width;
      const scores = Float64Array.from(context, (j) => {
        let dot = 0;
        for (let d = 0; d < width; d++) dot += q.values[from + d] * k.values[keyAt(j) + d];
        return scale * dot;
      });
      const lse = logSumExpOf(scores);
      context.forEach((j, n) => {
        const p = Math.exp(scores[n] - lse);
        for (let d = 0; d < width; d++) out[from + d] += p * v.values[keyAt(j) + d];
      });
    }
  });
  return host([rows, heads, width], out);
}

/** What the vocabulary head answers: log-probabilities of targets, and statistics of each row. */
export function vocabHead(hidden: Host, weight: Host, rows: Host, ids: Host): { logProbs: Host; statistics: Host[] } {
  const logits = linear(hidden, weight);
  const width = weight.shape[0];
  const row = (r: number): Float64Array => logits.values.subarray(r * width, (r + 1) * width);
  const count = hidden.shape[0];
  const perRow = (f: (logits: Float64Array, logProbs: Float64Array) => number): Host =>
    host(
      [count],
      Array.from({ length: count }, (_, r) => {
        const lse = logSumExpOf(row(r));
        return f(
          row(r),
          row(r).map((x) => x - lse),
        );
      }),
    );
  return {
    logProbs: host(
      [ids.values.length],
      ids.values.map((id, n) => row(rows.values[n])[id] - logSumExpOf(row(rows.values[n]))),
    ),
    statistics: [
      perRow((_, logP) => -logP.reduce((a, l) => a + l * Math.exp(l), 0)),
      perRow((x) => x.indexOf(Math.max(...x))),
      perRow((x) => x.reduce((a, b) => a + b, 0) / width),
      perRow((_, logP) => logSumExpOf(logP.map((l) => 2 * l))),
    ],
  };
}

/** Philox4x32-10 (Salmon et al., 2011), in BigInt arithmetic: the four words of block `counter`. */
export function philox(seed: bigint, counter: bigint): number[] {
  const mask = 0xffffffffn;
  let [c0, c1, c2, c3] = [counter & mask, (counter >> 32n) & mask, 0n, 0n];
  let [k0, k1] = [seed & mask, (seed >> 32n) & mask];
  for (let round = 0; round < 10; round++) {
    const p0 = 0xd2511f53n * c0;
    const p1 = 0xcd9e8d57n * c2;
    [c0, c1, c2, c3] = [(p1 >> 32n) ^ c1 ^ k0, p1 & mask, (p0 >> 32n) ^ c3 ^ k1, p0 & mask];
    k0 = (k0 + 0x9e3779b9n) & mask;
    k1 = (k1 + 0xbb67ae85n) & mask;
  }
  return [c0, c1, c2, c3].map(Number);
}
