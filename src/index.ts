// keelgrad: the public surface, nothing else.
import './ops/methods.js';

export { type CustomFunction, checkpoint, customFunction } from './autograd/checkpoint.js';
export { type GradcheckOptions, type GradcheckReport, gradcheck, gradgradcheck } from './autograd/gradcheck.js';
export { AccumulatingSink, GradientBuffers } from './autograd/sinks.js';
export { type Contribution, type GradientSink, noGrad } from './autograd/tape.js';
export { grad, hvp, jvp, type TensorTree, valueAndGrad, vjp } from './autograd/transforms.js';
export { type PackedBatch, packPairs, packSequences, sequenceOf } from './data/packing.js';
export { KeelgradError } from './errors.js';
export {
  addLora,
  type LoadOptions,
  type LoraOptions,
  loadAdapter,
  loadModel,
  saveAdapter,
  saveModel,
} from './io/model-folder.js';
export { loadTokenizer, type Tokenizer } from './io/tokenizer.js';
export { CausalLM, type Targets } from './models/causal-lm.js';
export type { ModelConfig } from './models/config.js';
export { countParameters, type ModelParameters, type ParameterMap } from './models/parameters.js';
export { captureGraph, type Graph, type GraphCounts } from './native/graph.js';
export { type RuntimeInfo, runtimeInfo, setThreads } from './native/info.js';
export { mergeAdapters } from './nn/lora.js';
export * from './objectives/index.js';
export * from './ops/index.js';
export {
  type BilevelFunction,
  BilevelOptimizer,
  type BilevelOptions,
  type BilevelProblem,
  type BilevelStep,
  type BilevelTerm,
} from './optim/bilevel/bilevel.js';
export { descend, type LowerLevelOptions, type LowerSolution, type LowerSolver } from './optim/bilevel/lower-level.js';
export {
  type PenaltySchedule,
  type PenaltyScheduleName,
  penaltySchedule,
} from './optim/bilevel/penalty-schedule.js';
export { clipFactor, nonFinite, sumOfSquares } from './optim/clip.js';
export { Optimizer, type OptimizerOptions, type ParameterGroup } from './optim/optimizer.js';
export { type ScheduleName, scheduleFactor } from './optim/schedule.js';
export type { DType, HostArray } from './tensor/dtype.js';
export { OutOfMemoryError } from './tensor/out-of-memory.js';
export { scope } from './tensor/scope.js';
export {
  type Device,
  defaultDevice,
  type MemoryReport,
  type MemoryTag,
  memory,
  resetPeakMemory,
  setDefaultDevice,
  synchronize,
  trimMemory,
} from './tensor/storage.js';
export { Tensor, type TensorOptions } from './tensor/tensor.js';
export { scorePairs } from './train/batch-source.js';
export type { Metrics, RunStep } from './train/hooks.js';
export { type SpoPresetName, spoPresets } from './train/presets.js';
export { dpo, sft, spo, type TrainerOptions } from './train/trainers.js';
