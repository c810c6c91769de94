// Cases of random numbers: Philox words, uniforms and normals against an implementation in BigInt arithmetic.
import { randomBits, randomNormal, randomUniform } from '../../../src/ops/random.js';
import { host, roundTo } from '../host.js';
import { type OpCase, opCase, type Place } from '../op-case.js';
import { philox } from '../reference.js';

const seed = 0x0123456789abcdefn;
const offset = 4294967290;

/** Word i of the stream that starts at block `offset`. */
function words(count: number): number[] {
  const out: number[] = [];
  for (let block = 0; out.length < count; block++) out.push(...philox(seed, BigInt(offset + block)));
  return out;
}

const unit53 = (high: number, low: number): number => ((high >>> 5) * 2 ** 26 + (low >>> 6)) * 2 ** -53;

function uniforms(at: Place, count: number): number[] {
  if (at.dtype !== 'float64') {
    const places = at.dtype === 'bfloat16' ? 8 : 24;
    return words(count)
      .slice(0, count)
      .map((w) => (w >>> (32 - places)) * 2 ** -places);
  }
  const w = words(2 * count);
  return Array.from({ length: count }, (_, i) => unit53(w[2 * i], w[2 * i + 1]));
}

function normals(at: Place, count: number): number[] {
  const narrow = at.dtype !== 'float64';
  const place: Place = narrow ? { ...at, dtype: 'float32' } : at;
  const u = uniforms(place, count + (count % 2));
  return Array.from({ length: count }, (_, i) => {
    const [a, b] = [u[i - (i % 2)] + (narrow ? 2 ** -24 : 2 ** -53), u[i - (i % 2) + 1]];
    const radius = Math.sqrt(-2 * Math.log(a));
    return radius * (i % 2 === 0 ? Math.cos(2 * Math.PI * b) : Math.sin(2 * Math.PI * b));
  });
}

const counts = [1, 7, 64, 1001]; // cheap in every check
const options = (at: Place) => ({ seed, offset, device: at.device, dtype: at.dtype });

const of = (op: string, count: number, more: Pick<OpCase, 'run' | 'reference'> & Partial<OpCase>): OpCase =>
  opCase({ op, opClass: 'exact', inputs: [], differentiable: false, note: `${count}`, ...more });

const timed = (op: string, run: OpCase['run']): OpCase =>
  opCase({
    op,
    opClass: 'exact',
    inputs: [],
    run,
    differentiable: false,
    size: 'bench',
    cost: { elements: 1 << 20 },
    note: `${1 << 20}`,
  });

export const randomCases = (): OpCase[] => [
  ...counts.flatMap((count) => [
    of('randomBits', count, {
      run: (at) => randomBits([count], options(at)),
      reference: () =>
        host(
          [count],
          words(count)
            .slice(0, count)
            .map((w) => w | 0),
          'int32',
        ),
    }),
    of('randomUniform', count, {
      run: (at) => randomUniform([count], options(at)),
      reference: (at) => host([count], uniforms(at, count)),
    }),
    of('randomNormal', count, {
      // Logarithm and sine differ in their last places between libraries, and sines may be small.
      opClass: 'rows',
      run: (at) => randomNormal([count], options(at)),
      reference: (at) =>
        host(
          [count],
          normals(at, count).map((x) => roundTo(at.dtype, x)),
        ),
    }),
  ]),
  timed('randomBits', (at) => randomBits([1 << 20], options(at))),
  timed('randomUniform', (at) => randomUniform([1 << 20], options(at))),
  timed('randomNormal', (at) => randomNormal([1 << 20], options(at))),
];
