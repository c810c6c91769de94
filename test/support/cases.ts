// THE case list over all ops. It drives the tests against definitions, gradient checks, sentinels, instruction sets,
// determinism, completeness and the benchmark, on whatever devices a run has.
import '../../src/ops/methods.js';
import { elementwiseCases } from './cases/elementwise.js';
import { headCases } from './cases/head.js';
import { kernelCases } from './cases/kernels.js';
import { movementCases } from './cases/movement.js';
import { optimizerCases } from './cases/optimizer.js';
import { productCases } from './cases/product.js';
import { randomCases } from './cases/random.js';
import { reduceCases } from './cases/reduce.js';
import { softmaxCases } from './cases/rows.js';
import { sequenceGradientCases } from './cases/sequence-gradient.js';
import { tangentCases } from './cases/tangents.js';
import { transformerCases } from './cases/transformer.js';
import type { OpCase } from './op-case.js';

export const families: Readonly<Record<string, () => OpCase[]>> = {
  elementwise: elementwiseCases,
  reduce: reduceCases,
  movement: movementCases,
  softmax: softmaxCases,
  product: productCases,
  transformer: transformerCases,
  head: headCases,
  random: randomCases,
  optimizer: optimizerCases,
  kernels: kernelCases,
  sequenceGradient: sequenceGradientCases,
  tangents: tangentCases,
};

/** Every case, of every size. Names are unique. */
export const allCases = (): OpCase[] => Object.values(families).flatMap((family) => family());

/** The cases that are checked; the rest is timed only. */
export const checkedCases = (): OpCase[] => allCases().filter((c) => c.size !== 'bench');
