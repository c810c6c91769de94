// Kernels that move memory and compute little: their share of the bandwidth of a copy. Bytes are those that must move, each input
// read once and each output written once; inputs rotate among buffers larger than the L2 cache.
import { launch } from '../../src/native/launch.js';
import { fill } from '../../src/ops/movement.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { draws, empty, int32, random } from './tensors.mjs';
import { formatTime, timeDevice } from './timing.mjs';

const bytesOf = (tensors) =>
  tensors.reduce((n, t) => n + t.size * { bfloat16: 2, float32: 4, float64: 8, int32: 4 }[t.dtype], 0);

/** The better of our copy and PyTorch's, in bytes read and written a second. */
async function copyBandwidth({ device, size, peer, rows }) {
  const x = random([size.copied], { device, dtype: 'float32' });
  const out = empty([size.copied], { device, dtype: 'float32' });
  const bytes = 2 * bytesOf([x]);
  const ours = bytes / timeDevice(device, () => launch('copy', [out, x]));
  const { seconds } = await peer.measure('copy', { elements: size.copied });
  const theirs = seconds ? bytes / seconds : 0;
  for (const t of [x, out]) t.dispose();
  const rate = (r) => `${(r / 1e9).toFixed(0)} GB/s`;
  rows.push({
    section: 'share of copy bandwidth',
    name: `copy of ${(bytes / 2e6).toFixed(0)} MB`,
    ours: rate(ours),
    ...(seconds && { peer: rate(theirs), ratio: (ours / theirs).toFixed(2) }),
  });
  return Math.max(ours, theirs);
}

/** Pieces of work: `make` gives { run, moved } over fresh buffers, moved counting the tensors that must move. */
function works({ device, size }) {
  const { hidden_size: H, intermediate_size: F, num_attention_heads: heads, head_dim } = size.qwen;
  const [T, D] = [size.tokens, head_dim ?? H / heads];
  const bf16 = (...shape) => random(shape, { device });
  const wide = (...shape) => random(shape, { device, dtype: 'float32' });
  const zeros = (...shape) => fill(empty(shape, { device, dtype: 'float32' }), 0);
  const weight = bf16(H);
  const positions = int32(draws(T, 1024), device);
  const table = wide(1024, D);
  const work = (name, kind, shape, make) => ({ name, kind, shape, make });
  return [
    work('RMSNorm forward', 'rmsNorm', [T, H], () => {
      const [y, x, rstd] = [bf16(T, H), bf16(T, H), wide(T)];
      return { moved: [y, x, rstd], run: () => launch('rmsNorm', [y, rstd, x, weight], [1e-6]) };
    }),
    work('residual sum and RMSNorm, forward', 'addRmsNorm', [T, H], () => {
      const [sum, y, x, delta, rstd] = [bf16(T, H), bf16(T, H), bf16(T, H), bf16(T, H), wide(T)];
      const run = () => launch('addRmsNorm', [sum, y, rstd, x, delta, weight], [1e-6]);
      return { moved: [sum, y, x, delta, rstd], run };
    }),
    work('residual sum and RMSNorm, backward', 'addRmsNormBackward', [T, H], () => {
      const [dx, dy, dsum, x, rstd] = [bf16(T, H), bf16(T, H), bf16(T, H), bf16(T, H), wide(T)];
      const run = () => launch('rmsNormBackward', [dx, null, dy, x, weight, rstd, null, dsum]);
      return { moved: [dx, dy, dsum, x, rstd], run };
    }),
    work('RMSNorm backward, input', 'rmsNormBackward', [T, H], () => {
      const [dx, dy, x, rstd] = [bf16(T, H), bf16(T, H), bf16(T, H), wide(T)];
      return {
        moved: [dx, dy, x, rstd],
        run: () => launch('rmsNormBackward', [dx, null, dy, x, weight, rstd, null, null]),
      };
    }),
    work('RMSNorm backward, input and weight', 'rmsNormBackwardWeight', [T, H], () => {
      const [dx, dy, x, rstd, dw] = [bf16(T, H), bf16(T, H), bf16(T, H), wide(T), wide(H)];
      return {
        moved: [dx, dy, x, rstd],
        run: () => launch('rmsNormBackward', [dx, dw, dy, x, weight, rstd, null, null]),
      };
    }),
    work('SwiGLU forward', 'swiglu', [T, F], () => {
      const [y, gate, up] = [bf16(T, F), bf16(T, F), bf16(T, F)];
      return { moved: [y, gate, up], run: () => launch('swiglu', [y, gate, up]) };
    }),
    work('SwiGLU backward', 'swigluBackward', [T, F], () => {
      const all = Array.from({ length: 5 }, () => bf16(T, F));
      return { moved: all, run: () => launch('swigluBackward', [...all, null]) };
    }),
    work('rotary', 'rotary', [T, heads, D], () => {
      const [y, x] = [bf16(T, heads, D), bf16(T, heads, D)];
      return { moved: [y, x], run: () => launch('rotary', [y, x, positions, table], [0]) };
    }),
    work('AdamW, float32 masters with bfloat16 weights', 'adamw', [size.optimized], () => {
      const [p, m, v] = [wide(size.optimized), wide(size.optimized), zeros(size.optimized)];
      const [g, low] = [wide(size.optimized), bf16(size.optimized)];
      const scalars = Tensor.from(Float64Array.of(1e-6, 10, 1, 0), { device });
      const run = () => launch('adamw', [scalars, p, m, v, g, low], [0.9, 0.999, 1e-8, 0.01]);
      return { moved: [p, p, m, m, v, v, g, low], run };
    }),
  ];
}

async function measure({ device, size, peer, rows }, { name, kind, shape, make }, bandwidth) {
  const sets = [make()];
  const bytes = bytesOf(sets[0].moved);
  while (sets.length * bytes < size.rotation) sets.push(make());
  const seconds = timeDevice(device, (i) => sets[i % sets.length].run());
  const theirs = await peer.measure('memoryBound', { op: kind, shape, sets: sets.length });
  for (const { moved } of sets) for (const t of new Set(moved)) t.dispose();
  const share = bytes / seconds / bandwidth;
  const tell = (s) => `${formatTime(s)}, ${(bytes / s / 1e9).toFixed(0)} GB/s`;
  rows.push({
    section: 'share of copy bandwidth',
    name: `${name} [${shape}]`,
    goal: '>= 85 %',
    ours: `${tell(seconds)}, ${(100 * share).toFixed(0)} %`,
    met: share >= 0.85,
    ...(theirs.seconds && { peer: formatTime(theirs.seconds), ratio: (theirs.seconds / seconds).toFixed(2) }),
  });
}

export async function memoryBound(context) {
  const bandwidth = await copyBandwidth(context);
  for (const work of works(context)) await measure(context, work, bandwidth);
}
