// Random tensors and models made on the device: nothing is copied from the host.
import { CausalLM } from '../../src/models/causal-lm.js';
import { parameterShapes } from '../../src/models/parameters.js';
import { mul } from '../../src/ops/elementwise.js';
import { cast, fill } from '../../src/ops/movement.js';
import { randomNormal } from '../../src/ops/random.js';
import { detachFromScope, scope } from '../../src/tensor/scope.js';
import { withTag } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';

let seed = 1;

/** Normal numbers of a standard deviation. Never zeros: products of zeros run faster than any others. */
export const random = (shape, { device, dtype = 'bfloat16', scale = 1 }) =>
  detachFromScope(scope(() => cast(mul(randomNormal(shape, { seed: seed++, device }), scale), dtype)));

export const empty = (shape, { device, dtype = 'bfloat16' }) => Tensor.empty(shape, { device, dtype });

export const int32 = (values, device) => Tensor.from(Int32Array.from(values), { device });

/** Numbers in [0, limit), always the same. */
export function draws(count, limit) {
  let state = 1;
  return Array.from({ length: count }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state % limit;
  });
}

/** The transposed view of a matrix. */
export const turned = (t) => t.view([t.shape[1], t.shape[0]], [1, t.shape[1]]);

/** A model with fresh bfloat16 weights, one float32 tensor at a time. */
export function randomModel(config, device) {
  const parameters = new Map();
  withTag('weights', () => {
    for (const [name, shape] of parameterShapes(config)) {
      const norm = shape.length === 1 && !name.endsWith('.bias');
      const t = norm ? fill(empty(shape, { device }), 1) : random(shape, { device, scale: config.initializerRange });
      parameters.set(name, t);
    }
  });
  return new CausalLM(config, parameters);
}
