// keelgrad/analyze: what DPO and SPO do to probabilities, as library functions. Each measurement is a function of a model and token
// ids that returns numbers; each report turns these into sentences, charts and tables; writeReport puts a report into a folder.
import '../ops/methods.js';

export { type PreferenceExample, type PreparedData, preparePreferenceData } from '../data/tokenize.js';
export type { Chart } from './charts.js';
export {
  type DynamicsOptions,
  dynamicsReport,
  followDynamics,
  type MethodDynamics,
  type ProbeLook,
} from './dynamics.js';
export {
  dpoStepFlow,
  enumerateOutputs,
  type FlowCase,
  type FlowStatistics,
  firstOrderFlow,
  flowStatistics,
  gramOf,
  type MassFlow,
  outputGradients,
  outputLogProbs,
} from './enumerable.js';
export {
  followMass,
  type MassShift,
  type MassShiftOptions,
  massShiftReport,
  type SampledResponse,
} from './mass-shift.js';
export { drawSvg, type Report, type Table, writeReport } from './report.js';
export type { ModelSource } from './runs.js';
export {
  type GridLook,
  type GridRun,
  type SensitivityOptions,
  type Sweep,
  sensitivityReport,
  sweep,
} from './sensitivity.js';
export { logProbsOf, type PairGradients, pairGradients, type Sequence, variableGroups } from './sequences.js';
export {
  type GroupShares,
  type GroupTerms,
  type LowerTerm,
  measureTerms,
  type TermNorms,
  type TermShares,
  type TermsOptions,
  termShares,
} from './terms.js';
export { termsReport } from './terms-report.js';
export {
  analyzeTheory,
  type Corollary1,
  type Corollary1Bounds,
  type Corollary2,
  corollary1,
  corollary2,
  type SequenceChange,
  type TheoryOptions,
  type TheoryPair,
  type TheoryResult,
} from './theory.js';
export { theoryReport } from './theory-report.js';
export { type ToyFlow, type ToyOptions, toyFlow } from './toy.js';
