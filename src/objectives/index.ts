// keelgrad/objectives: losses and objectives as pure functions.
import '../ops/methods.js';

export { sequenceLogProbs } from './logprobs.js';
export {
  completeParameters,
  dpoLoss,
  type FDivergence,
  implicitReward,
  ktoKl,
  type LabelledLogProbs,
  lengthDesensitizedWeights,
  margin,
  type NllReduction,
  nextBetaDpoMean,
  type PairLogProbs,
  type PreferenceLossName,
  type PreferenceLossOptions,
  type PreferenceParameters,
  preferenceLoss,
  preferenceLosses,
  type Reward,
  responseLoss,
  wpoWeights,
} from './preference.js';
export {
  addNormGradient,
  addNormGradientByDifferences,
  addRegularizer,
  type RegularizerMethod,
  type RegularizerOptions,
  type RegularizerProblem,
  type RegularizerValue,
  regularizerValue,
  squaredGradientNorms,
} from './regularizer.js';
export { dftLoss, dynamicLogProbs, type SftReduction, sftLoss } from './sft.js';
export { type SpoParts, type SpoWeights, spoObjective } from './spo.js';
