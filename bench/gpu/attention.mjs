// Causal grouped-query attention, forward and backward, beside PyTorch's scaled_dot_product_attention with its flash backend.
import { launch } from '../../src/native/launch.js';
import { SegmentLayout } from '../../src/ops/segments.js';
import { empty, random } from './tensors.mjs';
import { formatTime, timeDevice } from './timing.mjs';

export async function attention(context) {
  const { device, size, peer, rows } = context;
  const { num_attention_heads: heads, num_key_value_heads: groups, hidden_size, head_dim } = size.qwen;
  const width = head_dim ?? hidden_size / heads;
  const { count, length } = size.sequences;
  const layout = SegmentLayout.sequences(Array(count).fill(length));
  const { segments } = layout.on(device);
  const T = count * length;
  const [q, dq, out, dout] = Array.from({ length: 4 }, () => random([T, heads, width], { device }));
  const [k, v, dk, dv] = Array.from({ length: 4 }, () => random([T, groups, width], { device }));
  const lse = empty([T, heads], { device, dtype: 'float32' });
  const scale = [1 / Math.sqrt(width)];
  const runs = {
    forward: () => launch('attention', [out, lse, q, k, v, segments], scale),
    backward: () => launch('attentionBackward', [dq, dk, dv, dout, q, k, v, out, lse, segments, null, null], scale),
  };
  const flops = 2 * count * length * (length + 1) * heads * width;
  for (const [name, run] of Object.entries(runs)) {
    const seconds = timeDevice(device, run);
    const theirs = await peer.measure('attention', { count, length, heads, groups, width, pass: name });
    const work = name === 'forward' ? flops : 2.5 * flops;
    const rate = (s) => `${formatTime(s)}, ${((1e-12 * work) / s).toFixed(0)} TFLOP/s`;
    rows.push({
      section: 'attention',
      name: `${name}, ${count} x ${length}, ${heads} heads over ${groups}, d ${width}`,
      goal: '>= 0.8',
      ours: rate(seconds),
      ...(theirs.seconds && {
        peer: rate(theirs.seconds),
        ratio: (theirs.seconds / seconds).toFixed(2),
        met: theirs.seconds / seconds >= 0.8,
        note: theirs.note,
      }),
    });
  }
  for (const t of [q, dq, out, dout, k, v, dk, dv, lse]) t.dispose();
  layout.dispose();
}
