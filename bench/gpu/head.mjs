// The vocabulary head, forward and backward, beside PyTorch's matmul, log_softmax and gather: time, and memory beyond inputs and
// results.
import { launch } from '../../src/native/launch.js';
import { inChild } from './child.mjs';
import { draws, empty, int32, random } from './tensors.mjs';
import { formatBytes, formatTime, timeDevice } from './timing.mjs';

export function headWork({ device, size }, withWeight) {
  const [R, V, H] = [size.headRows, size.qwen.vocab_size, size.qwen.hidden_size];
  const f32 = { device, dtype: 'float32' };
  const [hidden, dhidden, weight] = [random([R, H], { device }), empty([R, H], { device }), random([V, H], { device })];
  const [logProbs, lse, g] = [empty([R], f32), empty([R], f32), random([R], f32)];
  const dweight = withWeight ? random([V, H], f32) : null;
  const rows = int32(
    Array.from({ length: R }, (_, i) => i),
    device,
  );
  const ids = int32(draws(R, V), device);
  const run = () => {
    launch('vocabHead', [logProbs, lse, null, null, hidden, weight, rows, ids, null]);
    launch('vocabHeadBackward', [dhidden, dweight, g, hidden, weight, lse, rows, ids, null]);
  };
  const all = [hidden, dhidden, weight, logProbs, lse, g, dweight, rows, ids];
  return { run, dispose: () => all.forEach((t) => void t?.dispose()), shape: { rows: R, vocabulary: V, width: H } };
}

export async function head(context) {
  const { device, peer, rows } = context;
  for (const withWeight of [false, true]) {
    const { bytes } = inChild(context, 'head', { withWeight });
    const { run, dispose, shape } = headWork(context, withWeight);
    const seconds = timeDevice(device, run, { seconds: 1 });
    dispose();
    const theirs = await peer.measure('head', { ...shape, withWeight });
    const name = `${shape.rows} x ${shape.vocabulary}, gradient of hidden${withWeight ? ' and weight' : ''}`;
    const given = theirs.seconds !== undefined;
    rows.push({
      section: 'vocabulary head, forward and backward',
      name: `time, ${name}`,
      goal: '> 1',
      ours: formatTime(seconds),
      ...(given && {
        peer: formatTime(theirs.seconds),
        ratio: (theirs.seconds / seconds).toFixed(2),
        met: theirs.seconds > seconds,
      }),
    });
    rows.push({
      section: 'vocabulary head, forward and backward',
      name: `memory, ${name}`,
      goal: '< 10 %',
      ours: bytes === undefined ? 'not measured: no nvidia-smi' : formatBytes(bytes),
      ...(given &&
        bytes !== undefined && {
          peer: formatBytes(theirs.bytes),
          ratio: (theirs.bytes / Math.max(bytes, 1)).toFixed(1),
          met: bytes < 0.1 * theirs.bytes,
        }),
    });
  }
}
