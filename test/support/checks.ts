// What is checked of a case. Each check throws an Error that names the worst element; none knows the test runner, so that
// another device's runner can use them as they are.
import { gradcheck, gradgradcheck } from '../../src/autograd/gradcheck.js';
import { vjp } from '../../src/autograd/transforms.js';
import { concat, contiguous, reshape } from '../../src/ops/movement.js';
import { isFloating } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import type { Device } from '../../src/tensor/storage.js';
import type { Tensor } from '../../src/tensor/tensor.js';
import { type Host, host, randomSource, roundTo, sizeOf } from './host.js';
import { call, dtypeOf, hostInputs, type OpCase, type Place, toTensor } from './op-case.js';
import { type OpClass, type Tolerance, toleranceOf } from './tolerances.js';

/** Inputs of a case as tensors. */
export const tensorInputs = (c: OpCase, at: Place, hosts: readonly Host[] = hostInputs(c, at.dtype)): Tensor[] =>
  hosts.map((x, i) => toTensor(x, at.device, dtypeOf(c.inputs[i], at.dtype)));

// Below the smallest normal number, results may flush to zero.
const tiny: Partial<Record<string, number>> = { float64: 2.3e-308, float32: 1.2e-38, bfloat16: 1.2e-38 };

/** The largest error in units of its tolerance, by class, dtype and kind: how tight the table is. */
export const worstRatios = new Map<string, { ratio: number; name: string }>();

function excess(found: number, expected: number, tolerance: Tolerance, largest: number, floor: number): number {
  if (Object.is(found, expected) || found === expected) return 0;
  if (Number.isNaN(found) || Number.isNaN(expected) || !Number.isFinite(expected)) return Infinity;
  const error = Math.abs(found - expected);
  if (error <= floor) return 0;
  const allowed = tolerance.relative * Math.abs(expected) + tolerance.ofLargest * largest;
  return allowed > 0 ? error / allowed : Infinity;
}

/** Compares a tensor with what was expected of it; `what` names it in the message. */
export function compare(
  what: string,
  found: Tensor,
  expected: Host,
  at: Place,
  opClass: OpClass,
  kind: 'value' | 'gradient',
): void {
  const dtype = expected.dtype ?? at.dtype;
  if (found.dtype !== dtype || `${found.shape}` !== `${expected.shape}`)
    throw new Error(`${what}: expected ${dtype}[${expected.shape}], found ${found.describe()}`);
  const values = found.dataSync();
  // A float32 result of bfloat16 inputs is no better than the products behind it.
  const tolerance = toleranceOf(opClass, dtype === 'float32' ? at.dtype : dtype, kind);
  const wanted = isFloating(dtype) ? expected.values.map((x) => overflowed(dtype, x)) : expected.values;
  const largest = wanted.reduce((a, b) => (Number.isFinite(b) ? Math.max(a, Math.abs(b)) : a), 0);
  const worst = { ratio: 0, at: 0 };
  wanted.forEach((e, i) => {
    const ratio = excess(values[i], e, tolerance, largest, tiny[dtype] ?? 0);
    if (ratio > worst.ratio) Object.assign(worst, { ratio, at: i });
  });
  remember(`${opClass} ${dtype} ${kind}`, worst.ratio, what);
  if (worst.ratio > 1)
    throw new Error(
      `${what}: element ${worst.at} of ${found.describe()}: expected ${wanted[worst.at]}, found ${values[worst.at]} (${worst.ratio.toPrecision(3)} times the tolerance)`,
    );
}

/** What is too large for the dtype is infinite in it. */
const overflowed = (dtype: string, x: number): number =>
  dtype !== 'float64' && Math.abs(x) > 3.4028235e38 && Number.isFinite(x) ? Math.sign(x) * Infinity : x;

function remember(key: string, ratio: number, name: string): void {
  if (ratio > (worstRatios.get(key)?.ratio ?? -1)) worstRatios.set(key, { ratio, name });
}

/** (a) Values against the definition written in float64. */
export function checkValues(c: OpCase, at: Place): void {
  const hosts = hostInputs(c, at.dtype);
  const expected = [c.reference!(at, ...hosts)].flat() as Host[];
  scope(() => {
    const found = call(c, at)(...tensorInputs(c, at, hosts));
    if (found.length !== expected.length)
      throw new Error(`${c.name}: ${found.length} results, ${expected.length} expected`);
    found.forEach((t, i) => {
      compare(`${c.name} ${at.dtype} result ${i}`, t, expected[i], at, c.opClass, 'value');
    });
  });
}

/** A fused op's own definition, in float64, against the reference. */
export function checkDefinition(c: OpCase, device: Device): void {
  const at: Place = { device, dtype: 'float64' };
  const hosts = hostInputs(c, 'float64');
  const expected = [c.reference!(at, ...hosts)].flat() as Host[];
  scope(() => {
    const found = [c.definition!(at, ...tensorInputs(c, at, hosts))].flat() as Tensor[];
    found.forEach((t, i) => {
      compare(`${c.name} definition ${i}`, t, expected[i], at, c.opClass, 'value');
    });
  });
}

/** Which inputs gradients are taken for. */
export const isVariable = (c: OpCase): boolean[] =>
  c.inputs.map((spec) => !spec.fixed && (spec.kind === 'value' || spec.kind === 'accumulator'));

/** The case's op as a function of its variables; the other inputs are closed over. */
function ofVariables(c: OpCase, inputs: readonly Tensor[], f: (...x: Tensor[]) => Tensor[]) {
  const variable = isVariable(c);
  return (xs: readonly Tensor[]): Tensor[] => {
    let next = 0;
    return f(...inputs.map((t, i) => (variable[i] ? xs[next++] : t)));
  };
}

/** All results in one tensor. */
const joined = (results: readonly Tensor[]): Tensor =>
  results.length === 1 ? results[0] : concat(results.map((t) => reshape(t, [-1])));

/** (b) and (c) Finite differences in float64, of the op or of its gradient. */
export function checkDerivative(c: OpCase, device: Device, order: 1 | 2): void {
  const at: Place = { device, dtype: 'float64' };
  scope(() => {
    const inputs = tensorInputs(c, at);
    const f = ofVariables(c, inputs, call(c, at));
    const variables = inputs.filter((_, i) => isVariable(c)[i]);
    if (order === 1) gradcheck((...xs) => f(xs), variables);
    else gradgradcheck((...xs) => joined(f(xs)), variables);
  });
}

/** Cotangents for the results, as their dtypes hold them. */
function cotangentsFor(c: OpCase, results: readonly Tensor[]): Host[] {
  const random = randomSource(`${c.name} cotangents`);
  return results.map((y) =>
    host(
      y.shape,
      Float64Array.from({ length: sizeOf(y.shape) }, () => roundTo(y.dtype, 2 * random() - 1)),
      y.dtype,
    ),
  );
}

interface Evaluated {
  results: Tensor[];
  gradients: Tensor[];
  cotangents: Host[];
}

/** Results of a case and its gradients for all variables. Call inside a scope. */
export function evaluate(c: OpCase, at: Place, hosts: readonly Host[], cotangents?: readonly Host[]): Evaluated {
  const inputs = tensorInputs(c, at, hosts);
  if (!c.differentiable) return { results: call(c, at)(...inputs), gradients: [], cotangents: [] };
  const f = ofVariables(c, inputs, call(c, at));
  let used: readonly Host[] = [];
  const [results, [gradients]] = vjp(f, [inputs.filter((_, i) => isVariable(c)[i])], (ys: Tensor[]) => {
    used = cotangents ?? cotangentsFor(c, ys);
    return used.map((u, i) => toTensor(u, at.device, ys[i].dtype));
  });
  return { results, gradients: gradients as Tensor[], cotangents: [...used] };
}

/** (d) Gradients in a dtype against the vjp, in float64 on the CPU, of the definition (or of the op where it is primitive). */
export function checkGradients(c: OpCase, at: Place): void {
  const hosts = hostInputs(c, at.dtype);
  scope(() => {
    const { gradients, cotangents } = evaluate(c, at, hosts);
    const oracle: OpCase = c.definition ? { ...c, run: c.definition } : c;
    const exact = evaluate(oracle, { device: 'cpu', dtype: 'float64' }, hosts, cotangents).gradients;
    const variables = c.inputs.filter((_, i) => isVariable(c)[i]);
    gradients.forEach((g, i) => {
      const expected = host(g.shape, exact[i].dataSync(), dtypeOf(variables[i], at.dtype));
      compare(`${c.name} ${at.dtype} gradient ${i}`, g, expected, at, c.gradientClass, 'gradient');
    });
  });
}

/** Raw bytes of results and gradients: for comparisons bit by bit. */
export async function bytesOf(c: OpCase, at: Place): Promise<Uint8Array[]> {
  const hosts = hostInputs(c, at.dtype);
  const compact = scope(() => {
    const { results, gradients } = evaluate(c, at, hosts);
    return [...results, ...gradients].map((t) => contiguous(t));
  });
  const bytes = await Promise.all(compact.map((t) => t.bytes()));
  for (const t of compact) t.dispose();
  return bytes;
}

/** Rows [from, to) of axis 0. */
const rowsOf = (x: Host, from: number, to: number): Host => {
  const width = x.values.length / x.shape[0];
  return { ...x, shape: [to - from, ...x.shape.slice(1)], values: x.values.slice(from * width, to * width) };
};

/** A row's value has the same bits alone, in a few rows and among all. */
export function checkRows(c: OpCase, at: Place): void {
  const hosts = hostInputs(c, at.dtype);
  const count = hosts[c.rows[0]].shape[0];
  const run = (from: number, to: number): Uint8Array =>
    scope(() => {
      const part = hosts.map((x, i) => (c.rows.includes(i) ? rowsOf(x, from, to) : x));
      const [y] = call(c, at)(...tensorInputs(c, at, part));
      const compact = y.asContiguous();
      const wide = compact.dtype === 'bfloat16' ? compact.cast('float32') : compact;
      return new Uint8Array(wide.dataSync().slice().buffer);
    });
  const all = run(0, count);
  const size = all.length / count;
  for (const [from, to] of pieces(count)) {
    const alone = run(from, to);
    for (let i = 0; i < alone.length; i++)
      if (alone[i] !== all[from * size + i])
        throw new Error(`${c.name} ${at.dtype}: rows ${from} to ${to} alone differ from the same rows among ${count}`);
  }
}

const pieces = (count: number): [number, number][] =>
  [
    [0, 1],
    [count - 1, count],
    [Math.floor(count / 3), Math.min(count, Math.floor(count / 3) + 5)],
    [Math.min(1, count - 1), count],
  ] as [number, number][];
