// What one small op costs: the price of JavaScript, the boundary and the executor, without arithmetic to speak of.
import { load } from './build.mjs';
import { measure } from './harness.mjs';

const count = 1000;

export async function latencyWork({ device, time, peer }) {
  const { Tensor } = await load('src/tensor/tensor.js');
  const { scope } = await load('src/tensor/scope.js');
  const { synchronize } = await load('src/tensor/storage.js');
  const { grad } = await load('src/autograd/transforms.js');
  const { add, square } = await load('src/ops/elementwise.js');
  const { sum } = await load('src/ops/reduce.js');

  const ones = (...shape) => Tensor.from(new Float32Array(shape.reduce((a, b) => a * b)).fill(1), { shape, device });
  const [a, b, x] = [ones(4, 4), ones(4, 4), ones(16)];
  const squares = grad((t) => sum(square(t)));

  /** `run` a thousand times, then one wait: time is per call. */
  const work = (name, what, run) => ({
    section: 'latency',
    name,
    dtype: 'float32',
    run: async () => {
      const many = () => {
        for (let i = 0; i < count; i++) run();
        synchronize(device);
      };
      const { best, median, samples } = await measure(many, { time });
      const theirs = what && (await peer?.time({ kind: 'latency', op: name, what, time: time / 1e3 }));
      return { best: best / count, median: median / count, samples, peer: theirs ?? undefined };
    },
  });

  return [
    work('add [4,4]', 'add', () => add(a, b).dispose()),
    work('gradient of the sum of 16 squares', 'gradient', () => scope(() => void squares(x))),
    work('add [4,4], sum, item()', 'item', () => scope(() => sum(add(a, b)).item())),
  ];
}
