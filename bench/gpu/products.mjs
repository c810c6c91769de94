// bfloat16 products of Qwen2.5-0.5B's shapes through our dispatch, beside torch.matmul: the layers' forward products and the
// two products of their gradients, and the vocabulary head.
import { launch } from '../../src/native/launch.js';
import { empty, random, turned } from './tensors.mjs';
import { formatTime, timeDevice } from './timing.mjs';

const SECTION = 'bf16 products of Qwen2.5-0.5B';

/** [name, outputs, inputs] of the linear layers. */
const layers = (c) => [
  ['q and o', c.hidden_size, c.hidden_size],
  ['k and v', 2 * c.hidden_size * (c.num_key_value_heads / c.num_attention_heads), c.hidden_size],
  ['gate or up', c.intermediate_size, c.hidden_size],
  ['gate and up, stacked', 2 * c.intermediate_size, c.hidden_size],
  ['down', c.hidden_size, c.intermediate_size],
];

/** out = left @ right, with right as it lies or as the transposed view of what is given. */
async function measure(context, name, [M, N, K], operands) {
  const { device, peer, rows } = context;
  const { left, right, out, accumulate = 0 } = operands();
  const seconds = timeDevice(device, () => launch('matmul', [out, left, right, null], [1, accumulate]));
  const theirs = await peer.measure('product', { M, N, K, layout: name.split(': ')[1] });
  for (const t of [left, right, out]) t.dispose();
  const rate = (s) => `${formatTime(s)}, ${((2e-12 * M * N * K) / s).toFixed(0)} TFLOP/s`;
  rows.push({
    section: SECTION,
    name: `${name} [${M}, ${K}] x [${K}, ${N}]`,
    goal: 'within 5 %',
    ours: rate(seconds),
    ...(theirs.seconds && {
      peer: rate(theirs.seconds),
      ratio: (theirs.seconds / seconds).toFixed(2),
      met: theirs.seconds / seconds >= 1 / 1.05,
    }),
  });
}

export async function products(context) {
  const { device, size } = context;
  const T = size.tokens;
  const bf16 = { device };
  for (const [name, N, K] of layers(size.qwen)) {
    await measure(context, `${name}: forward`, [T, N, K], () => ({
      left: random([T, K], bf16),
      right: turned(random([N, K], bf16)),
      out: empty([T, N], bf16),
    }));
    await measure(context, `${name}: input gradient`, [T, K, N], () => ({
      left: random([T, N], bf16),
      right: random([N, K], bf16),
      out: empty([T, K], bf16),
    }));
    // Into the float32 buffer of the gradient, as training does; PyTorch writes bfloat16.
    await measure(context, `${name}: weight gradient`, [N, K, T], () => ({
      left: turned(random([T, N], bf16)),
      right: random([T, K], bf16),
      out: random([N, K], { device, dtype: 'float32' }),
      accumulate: 1,
    }));
  }
  const [R, V, H] = [size.headRows, size.qwen.vocab_size, size.qwen.hidden_size];
  await measure(context, 'head: forward', [R, V, H], () => ({
    left: random([R, H], bf16),
    right: turned(random([V, H], bf16)),
    out: empty([R, V], bf16),
  }));
}
