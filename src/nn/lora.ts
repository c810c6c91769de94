// LoRA adapters (Hu et al. 2021): which linears carry them, how they start, merging.

import { type AdapterConfig, adapterKey, loraScale } from '../io/peft.js';
import type { ParameterMap } from '../models/parameters.js';
import { add, mul, scaleInPlace } from '../ops/elementwise.js';
import { cast, copyInto, zeros } from '../ops/movement.js';
import { matmul } from '../ops/product.js';
import { randomUniform } from '../ops/random.js';
import { accumulationDType, type DType } from '../tensor/dtype.js';
import { detachFromScope, scope } from '../tensor/scope.js';
import { type Device, withTag } from '../tensor/storage.js';

/** Settings of an adapter and the full module paths that carry it. */
export interface LoraSpec {
  config: AdapterConfig;
  modules: readonly string[];
}

/** alpha / r, or alpha / sqrt(r) with rsLoRA. */
export const scaleOf = (spec: LoraSpec): number => loraScale(spec.config);

/**
 * Fresh adapters: A uniform as PEFT's Kaiming initialization with a = √5, that is in ±1/√in; B zero, so that the adapted
 * model equals the base. A pure function of the seed, the same in every dtype up to rounding.
 *
 * @param shapes `[out, in]` by module path
 */
export function initializeAdapters(
  spec: LoraSpec,
  shapes: ReadonlyMap<string, readonly [number, number]>,
  options: { seed: number; dtype: DType; device: Device },
): ParameterMap {
  const adapters: ParameterMap = new Map();
  const { r } = spec.config;
  let offset = 0;
  withTag('weights', () => {
    for (const module of spec.modules) {
      const [out, width] = shapes.get(module)!;
      const a = scope(() => {
        const unit = cast(randomUniform([r, width], { ...options, dtype: 'float32', offset }), options.dtype);
        const bound = 1 / Math.sqrt(width);
        return add(mul(unit, 2 * bound), -bound);
      });
      offset += r * width;
      adapters.set(adapterKey(module, 'A'), detachFromScope(a));
      adapters.set(adapterKey(module, 'B'), detachFromScope(zeros([out, r], options)));
    }
  });
  return adapters;
}

/**
 * Adds (sign 1) or takes back (sign -1) scale · B A to the weights of a backbone, in place. The product and the sum are
 * in float32 or wider: a bfloat16 weight is rounded once.
 */
export function mergeAdapters(backbone: ParameterMap, adapters: ParameterMap, spec: LoraSpec, sign: 1 | -1 = 1): void {
  for (const module of spec.modules)
    scope(() => {
      const weight = backbone.get(`${module}.weight`)!;
      const dtype = accumulationDType(weight.dtype);
      const [a, b] = (['A', 'B'] as const).map((m) => cast(adapters.get(adapterKey(module, m))!, dtype));
      const delta = matmul(b, a);
      scaleInPlace(delta, sign * scaleOf(spec));
      copyInto(weight, add(cast(weight, dtype), delta));
    });
}
