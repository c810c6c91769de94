// keelgrad/objectives: losses and objectives as pure functions.
import '../ops/methods.js';

export { sequenceLogProbs } from './logprobs.js';
export {
  dpoLoss,
  margin,
  type PairLogProbs,
  type PreferenceLossName,
  type PreferenceLossOptions,
  preferenceLoss,
  preferenceLosses,
} from './preference.js';
export {
  addNormGradient,
  addRegularizer,
  type RegularizerProblem,
  type RegularizerValue,
  regularizerValue,
  squaredGradientNorms,
} from './regularizer.js';
export { type SftReduction, sftLoss } from './sft.js';
export { type SpoParts, type SpoWeights, spoObjective } from './spo.js';
