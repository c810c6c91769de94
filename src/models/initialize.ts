// Fresh weights for a configuration: models that are trained from nothing.
// A pure function of configuration and seed, the same on every machine and device.
import { mul } from '../ops/elementwise.js';
import { fill, zeros } from '../ops/movement.js';
import { randomNormal } from '../ops/random.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import { type Device, withTag } from '../tensor/storage.js';
import { Tensor } from '../tensor/tensor.js';
import { CausalLM } from './causal-lm.js';
import type { ModelConfig } from './config.js';
import { type ParameterMap, parameterShapes } from './parameters.js';

export interface InitializeOptions {
  seed: number;
  dtype?: 'float32' | 'float64';
  device?: Device;
}

/** Matrices normal with the configuration's `initializer_range`, biases 0, norm weights 1: the rule of transformers. */
export function initializeParameters(config: ModelConfig, options: InitializeOptions): ParameterMap {
  const parameters: ParameterMap = new Map();
  let offset = 0;
  const make = (name: string, shape: number[]): Tensor => {
    if (name.endsWith('.bias')) return zeros(shape, options);
    if (shape.length === 1) return fill(Tensor.empty(shape, options), 1);
    const unit = randomNormal(shape, { ...options, offset });
    offset += unit.size;
    return mul(unit, config.initializerRange);
  };
  withTag('weights', () => {
    for (const [name, shape] of parameterShapes(config))
      parameters.set(name, detachFromScope(scope(() => make(name, shape))));
  });
  return parameters;
}

/** A model with fresh weights. */
export const createModel = (config: ModelConfig, options: InitializeOptions): CausalLM =>
  new CausalLM(config, initializeParameters(config, options));
