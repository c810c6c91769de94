// A training session: model, data and options put together into steps. Files and progress are its callers' business.
import { planSteps as planData, type StepPlan } from '../data/batches.js';
import { KeelgradError } from '../errors.js';
import type { CausalLM } from '../models/causal-lm.js';
import { countParameters } from '../models/parameters.js';
import { Optimizer, type OptimizerOptions } from '../optim/optimizer.js';
import type { Tensor } from '../tensor/tensor.js';
import { watchDisplacement } from './displacement.js';
import type { RunStep, TrainHooks } from './hooks.js';
import { train } from './loop.js';
import { prepareTask, type SessionData } from './make-task.js';
import { rampNotice } from './notices.js';
import { planSteps, type ResolvedTrainOptions, type SftOptions } from './options.js';
import { watchPenalty } from './penalty-watch.js';
import { type GroupName, parametersOf, Trainable } from './task.js';

export type { SessionData } from './make-task.js';

export interface Session {
  readonly plan: StepPlan;
  readonly groups: readonly GroupName[];
  readonly trainableParameters: number;
  steps(): AsyncGenerator<RunStep, void, void>;
  /** The weights of a group in the master dtype: what is saved. */
  masters(group: GroupName): ReadonlyMap<string, Tensor>;
  dispose(): void;
}

/** Which groups of parameters a method and its options train. */
export function trainedGroups(options: ResolvedTrainOptions): GroupName[] {
  const what = options.method === 'spo' ? 'both' : options.train;
  if (what === 'both') return ['backbone', 'adapters'];
  return what === 'full' ? ['backbone'] : ['adapters'];
}

function stepPlan(options: ResolvedTrainOptions, count: number): { plan: StepPlan; warmupSteps: number } {
  const { batchSize, gradientAccumulationSteps, epochs, maxSteps, shuffle, seed } = options;
  const plan = planData(count, { batchSize, gradientAccumulationSteps, epochs, maxSteps, shuffle, seed });
  const { warmupSteps } = planSteps(options as SftOptions, plan.stepsPerEpoch);
  return { plan, warmupSteps };
}

function optimizerOptions(options: ResolvedTrainOptions): OptimizerOptions {
  const decays = options.weightDecayParams === 'all' ? (): boolean => true : undefined;
  const common = { weightDecay: options.weightDecay, decays };
  return options.optimizer === 'sgd'
    ? { kind: 'sgd', momentum: options.momentum, ...common }
    : { kind: 'adamw', beta1: options.adamBeta1, beta2: options.adamBeta2, epsilon: options.adamEpsilon, ...common };
}

/** Out of memory for its state, it leaves no gradient buffers behind. */
function makeOptimizer(trainable: Trainable, options: ResolvedTrainOptions): Optimizer {
  try {
    return new Optimizer(trainable.parameterGroups(), optimizerOptions(options));
  } catch (error) {
    trainable.dispose();
    throw error;
  }
}

function learningRates(options: ResolvedTrainOptions): Record<GroupName, number> {
  if (options.method === 'spo')
    return { backbone: options.learningRateBackbone, adapters: options.learningRateAdapters };
  return { backbone: options.learningRate, adapters: options.learningRate };
}

/**
 * Puts a session together; computes reference log-probabilities. The model's parameters are trained in place.
 *
 * @throws KeelgradError where there is nothing to train on, or no adapters where adapters are to be trained
 */
export async function openSession(
  model: CausalLM,
  data: SessionData,
  options: ResolvedTrainOptions,
  hooks: Pick<TrainHooks, 'signal' | 'onPhase' | 'onMessage' | 'onUpdate'> = {},
): Promise<Session> {
  if (data.examples.length === 0)
    throw new KeelgradError(
      `no record is left to train on (${data.dropped.promptTooLong + data.dropped.noTarget} dropped); raise max length, or check the data`,
    );
  const groups = trainedGroups(options);
  if (groups.includes('adapters') && !model.lora)
    throw new KeelgradError(
      options.method === 'spo'
        ? 'the model has no adapters to train, and spo always trains both levels, backbone and adapters; load it with lora, or use dpo'
        : 'the model has no adapters to train; load it with lora, or train the full model',
    );
  const watched = (steps: ReturnType<typeof train>): ReturnType<typeof train> => {
    if (options.method === 'dpo') return watchDisplacement(steps, hooks.onMessage);
    if (options.method === 'sft') return steps;
    return watchPenalty(steps, { dtype: model.dtype, lambda: options.lambda }, hooks.onMessage);
  };
  const { plan, warmupSteps } = stepPlan(options, data.examples.length);
  const notice = options.method === 'spo' ? rampNotice(options, plan.totalSteps) : undefined;
  if (notice) hooks.onMessage?.(notice);
  const makeTask = await prepareTask({ model, data, options, visited: plan.visited(), hooks });
  const trainable = new Trainable(model, groups);
  const optimizer = makeOptimizer(trainable, options);
  const task = makeTask(trainable, () => optimizer.masters('backbone'));
  const loop = {
    plan,
    optimizer,
    learningRates: learningRates(options),
    schedule: { name: options.lrSchedule, warmupSteps },
    maxGradNorm: options.maxGradNorm,
    signal: hooks.signal,
    onUpdate: hooks.onUpdate && ((updates: number) => hooks.onUpdate?.(model, updates)),
  };
  return {
    plan,
    groups,
    trainableParameters: groups.reduce((n, g) => n + countParameters(parametersOf(model, g)), 0),
    steps: () => watched(train(task, loop)),
    masters: (group) => optimizer.masters(group),
    dispose: () => {
      optimizer.dispose();
      trainable.dispose();
      task.dispose?.();
    },
  };
}
