// Every option of every command, once: types, checks, defaults, help and config keys all come from this table.
// Data only: it imports nothing but the table of dtypes and knows nothing of models, data or the command line's parser.
import { type DType, policyOf } from '../tensor/dtype.js';

export const methods = ['sft', 'dpo', 'spo', 'score', 'demo', 'info'] as const;
export type Method = (typeof methods)[number];
export type TrainMethod = 'sft' | 'dpo' | 'spo';

export type Scalar = string | number | boolean;
export type Value = Scalar | readonly string[] | readonly number[];

/** Option values by key, for rules that look at several. */
export type Chosen = Readonly<Record<string, Value | undefined>>;

/** A default that depends on other options: on what was given, and on defaults that are plain values. */
export interface DefaultRule {
  /** What the help page prints. */
  readonly text: string;
  readonly value: (chosen: Chosen) => Value;
}

/** No value unless given; help pages print what that means. */
export interface NoDefault {
  readonly without: string;
}

export type Default = Value | DefaultRule | NoDefault;

export interface OptionSpec {
  /** `strings` and `numbers` are lists, comma-separated on the command line. */
  readonly type: 'string' | 'integer' | 'number' | 'boolean' | 'strings' | 'numbers';
  readonly methods: readonly Method[];
  readonly group: string;
  /** What stands for the value on a help page. */
  readonly placeholder?: string;
  /** Names of the same thing elsewhere: not accepted, but suggested from. */
  readonly alsoCalled?: readonly string[];
  readonly choices?: readonly string[];
  /** One for all methods, or one per method. */
  readonly default?: Default | { readonly [M in Method]?: Default };
  readonly required?: true;
  readonly min?: number;
  readonly max?: number;
  /** Exclusive bounds. */
  readonly above?: number;
  readonly below?: number;
  /** Advice for a value outside of the bounds or choices. */
  readonly remedy?: string;
  /** Why a command that a user may expect to have this option does not. */
  readonly absent?: { readonly [M in Method]?: string };
  readonly help: string;
  /** The help of one command where it differs. */
  readonly helpOf?: { readonly [M in Method]?: string };
}

const train = ['sft', 'dpo', 'spo'] as const;
const trainAndScore = ['sft', 'dpo', 'spo', 'score'] as const;

const fromLora = (lora: number, other: number): DefaultRule => ({
  text: `${other.toExponential()}; ${lora.toExponential()} with --train lora`,
  value: (chosen) => (chosen.train === 'lora' ? lora : other),
});

/** SPO's two learning rates follow `--learning-rate` where they are not given themselves. */
const levelRate: DefaultRule = {
  text: '1e-5, or --learning-rate',
  value: (chosen) => (chosen.learningRate as number | undefined) ?? 1e-5,
};

/** The seven linear maps of a Llama or Qwen2 block. */
export const linearNames = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'] as const;

const files = 'Model and data';
const objective = 'Objective';
const lora = 'Adapter (LoRA)';
const optimizer = 'Optimizer';
const batches = 'Steps and batches';
const machine = 'Machine and run';

export const optionTable = {
  model: {
    type: 'string',
    methods: trainAndScore,
    group: files,
    placeholder: 'DIR',
    required: true,
    alsoCalled: ['model-name-or-path'],
    help: 'Hugging Face folder of a Llama or Qwen2 model',
  },
  data: {
    type: 'string',
    methods: trainAndScore,
    group: files,
    placeholder: 'FILE',
    required: true,
    help: 'records, one JSON object a line or one JSON array',
  },
  output: {
    type: 'string',
    methods: ['sft', 'dpo', 'spo', 'demo'],
    group: files,
    placeholder: 'DIR',
    required: true,
    default: { demo: 'keelgrad-demo' },
    alsoCalled: ['output-dir'],
    help: 'folder for what the run writes',
  },
  adapter: {
    type: 'string',
    methods: trainAndScore,
    group: files,
    placeholder: 'DIR',
    help: 'PEFT adapter to start from; its rank, alpha and targets hold',
    helpOf: { score: 'PEFT adapter on top of the model' },
  },
  overwrite: {
    type: 'boolean',
    methods: train,
    group: files,
    default: false,
    help: 'replace the earlier run in --output; other files there stay',
  },
  saveDtype: {
    type: 'string',
    methods: train,
    group: files,
    placeholder: 'TYPE',
    choices: ['float32', 'float64', 'bfloat16', 'float16'],
    default: {
      text: 'float32; float64 with --dtype float64',
      value: (chosen: Chosen) => policyOf(chosen.dtype as DType).files,
    },
    help: 'dtype of saved weights',
  },

  train: {
    type: 'string',
    methods: ['sft', 'dpo'],
    group: objective,
    placeholder: 'WHAT',
    choices: ['lora', 'full', 'both'],
    default: 'lora',
    absent: { spo: 'spo always trains both levels, backbone and adapters' },
    help: 'what is trained',
  },
  sftReduction: {
    type: 'string',
    methods: ['sft', 'spo'],
    group: objective,
    placeholder: 'NAME',
    choices: ['token-mean', 'sum'],
    default: { sft: 'token-mean', spo: 'sum' },
    help: 'token-mean (over the batch) or sum (over tokens, mean over records)',
  },
  beta: {
    type: 'number',
    methods: ['dpo', 'spo'],
    group: objective,
    default: { dpo: 0.1, spo: 0.5 },
    above: 0,
    help: 'temperature of the preference loss',
  },
  lossType: {
    type: 'strings',
    methods: ['dpo'],
    group: objective,
    placeholder: 'NAME[,NAME]',
    choices: ['sigmoid', 'ipo', 'robust', 'sft'],
    default: ['sigmoid'],
    alsoCalled: ['loss'],
    help: 'preference loss; several make a weighted sum',
  },
  lossWeights: {
    type: 'numbers',
    methods: ['dpo'],
    group: objective,
    placeholder: 'W[,W]',
    min: 0,
    default: {
      text: '1 each',
      value: (chosen: Chosen) => (chosen.lossType as readonly string[]).map(() => 1),
    },
    help: 'one weight for each loss of --loss-type',
  },
  labelSmoothing: {
    type: 'number',
    methods: ['dpo'],
    group: objective,
    min: 0,
    below: 0.5,
    default: 0,
    help: 'share of flipped labels that --loss-type robust assumes',
  },
  reference: {
    type: 'string',
    methods: ['dpo', 'spo'],
    group: objective,
    placeholder: 'WHICH',
    choices: ['initial', 'base', 'none'],
    default: 'initial',
    help: 'initial (the policy as it starts, its adapter included), base (the model alone) or none',
  },
  lambda: {
    type: 'number',
    methods: ['spo'],
    group: objective,
    min: 0,
    default: 1,
    help: 'weight of the lower-level penalty L_SFT - L*_SFT',
  },
  gamma: {
    type: 'number',
    methods: ['spo'],
    group: objective,
    min: 0,
    default: 0,
    help: 'weight of the regularizer max(0, |g_chosen| - |g_rejected|)',
  },
  normOver: {
    type: 'string',
    methods: ['spo'],
    group: objective,
    placeholder: 'WHAT',
    choices: ['all', 'adapters', 'backbone'],
    default: 'all',
    help: 'parameters over which the regularizer takes its norms',
  },
  lowerSteps: {
    type: 'integer',
    methods: ['spo'],
    group: objective,
    min: 0,
    default: 1,
    help: 'gradient steps of the lower level; 0 leaves it out',
  },
  lowerLearningRate: {
    type: 'number',
    methods: ['spo'],
    group: objective,
    above: 0,
    default: 2e-5,
    remedy: 'use --lower-steps 0 for no lower level',
    alsoCalled: ['lower-lr'],
    help: 'step size of the lower level',
  },

  loraR: {
    type: 'integer',
    methods: train,
    group: lora,
    min: 1,
    default: 16,
    alsoCalled: ['rank'],
    help: 'rank',
  },
  loraAlpha: {
    type: 'number',
    methods: train,
    group: lora,
    above: 0,
    default: 32,
    help: 'scale: alpha / r, or alpha / sqrt(r) with --rslora',
  },
  loraDropout: {
    type: 'number',
    methods: train,
    group: lora,
    min: 0,
    below: 1,
    default: { sft: 0.05, dpo: 0, spo: 0 },
    help: 'dropout on the input of adapters',
    helpOf: { dpo: 'always 0: preference losses have no dropout', spo: 'always 0: preference losses have no dropout' },
  },
  loraTargets: {
    type: 'strings',
    methods: train,
    group: lora,
    placeholder: 'NAME[,NAME]',
    default: {
      text: 'all seven linears',
      value: () => linearNames,
    },
    alsoCalled: ['target-modules'],
    help: 'linears with an adapter: names, module paths, or all-linear',
  },
  rslora: {
    type: 'boolean',
    methods: train,
    group: lora,
    default: false,
    alsoCalled: ['use-rslora'],
    help: 'rank-stabilized scale',
  },

  learningRate: {
    type: 'number',
    methods: train,
    group: optimizer,
    min: 0,
    default: {
      sft: fromLora(2e-4, 2e-5),
      dpo: fromLora(1e-5, 1e-6),
      spo: { without: 'that of each level' },
    },
    alsoCalled: ['lr'],
    help: 'step size',
    helpOf: { spo: 'step size of both levels at once' },
  },
  learningRateBackbone: {
    type: 'number',
    methods: ['spo'],
    group: optimizer,
    min: 0,
    default: levelRate,
    alsoCalled: ['lr-backbone'],
    help: 'step size of the backbone',
  },
  learningRateAdapters: {
    type: 'number',
    methods: ['spo'],
    group: optimizer,
    min: 0,
    default: levelRate,
    alsoCalled: ['lr-adapters'],
    help: 'step size of the adapters',
  },
  lrSchedule: {
    type: 'string',
    methods: train,
    group: optimizer,
    placeholder: 'NAME',
    choices: ['linear', 'cosine', 'constant', 'constant_with_warmup'],
    default: 'linear',
    alsoCalled: ['lr-scheduler-type'],
    help: 'course of the learning rate after warmup',
  },
  warmupSteps: {
    type: 'integer',
    methods: train,
    group: optimizer,
    min: 0,
    default: 0,
    remedy: 'a fraction of all steps is --warmup-ratio',
    help: 'steps over which the learning rate rises from 0',
  },
  warmupRatio: {
    type: 'number',
    methods: train,
    group: optimizer,
    min: 0,
    max: 1,
    remedy: 'a number of steps is --warmup-steps',
    help: 'the same as a fraction of all steps, rounded up',
  },
  optimizer: {
    type: 'string',
    methods: train,
    group: optimizer,
    placeholder: 'NAME',
    choices: ['adamw', 'sgd'],
    default: 'adamw',
    alsoCalled: ['optim'],
    help: 'update rule',
  },
  adamBeta1: {
    type: 'number',
    methods: train,
    group: optimizer,
    min: 0,
    below: 1,
    default: 0.9,
    alsoCalled: ['beta1'],
    help: 'decay of the first moment',
  },
  adamBeta2: {
    type: 'number',
    methods: train,
    group: optimizer,
    min: 0,
    below: 1,
    default: 0.999,
    alsoCalled: ['beta2'],
    help: 'decay of the second moment',
  },
  adamEpsilon: {
    type: 'number',
    methods: train,
    group: optimizer,
    above: 0,
    default: 1e-8,
    alsoCalled: ['eps'],
    help: "added to the second moment's root",
  },
  momentum: {
    type: 'number',
    methods: train,
    group: optimizer,
    min: 0,
    below: 1,
    default: 0,
    help: 'momentum of sgd',
  },
  weightDecay: {
    type: 'number',
    methods: train,
    group: optimizer,
    min: 0,
    default: 0,
    help: 'decoupled weight decay',
  },
  weightDecayParams: {
    type: 'string',
    methods: train,
    group: optimizer,
    placeholder: 'WHICH',
    choices: ['matrices', 'all'],
    default: 'matrices',
    help: 'matrices (no biases, no norm weights) or all',
  },
  maxGradNorm: {
    type: 'number',
    methods: train,
    group: optimizer,
    min: 0,
    default: 1,
    help: 'clips the joint norm of all gradients; 0 is off',
  },

  epochs: {
    type: 'number',
    methods: train,
    group: batches,
    above: 0,
    default: { sft: 3, dpo: 1, spo: 3 },
    remedy: 'use --max-steps for a number of steps',
    alsoCalled: ['num-train-epochs'],
    help: 'passes over the data',
  },
  maxSteps: {
    type: 'integer',
    methods: train,
    group: batches,
    min: 1,
    help: 'exactly so many steps, cycling over the data, instead of epochs',
  },
  batchSize: {
    type: 'integer',
    methods: trainAndScore,
    group: batches,
    min: 1,
    default: { sft: 8, dpo: 4, spo: 4, score: 4 },
    alsoCalled: ['per-device-train-batch-size'],
    help: 'pairs at once',
    helpOf: { sft: 'records at once' },
  },
  gradientAccumulationSteps: {
    type: 'integer',
    methods: train,
    group: batches,
    min: 1,
    default: 1,
    help: 'batches that make one step',
  },
  maxLength: {
    type: 'integer',
    methods: trainAndScore,
    group: batches,
    min: 2,
    default: { sft: 1024, dpo: 1024, spo: 1024, score: { without: 'off' } },
    help: 'tokens kept of a sequence; a prompt that fills them drops the record',
  },
  shuffle: {
    type: 'boolean',
    methods: train,
    group: batches,
    default: true,
    help: "keep the file's order",
  },

  device: {
    type: 'string',
    methods: trainAndScore,
    group: machine,
    placeholder: 'NAME',
    choices: ['auto', 'cpu', 'cuda'],
    default: 'auto',
    help: 'auto (a GPU that can be used, else the CPU), cpu or cuda',
  },
  dtype: {
    type: 'string',
    methods: trainAndScore,
    group: machine,
    placeholder: 'TYPE',
    choices: ['float32', 'bfloat16', 'float64'],
    default: 'float32',
    help: 'dtype of computation',
  },
  threads: {
    type: 'integer',
    methods: ['sft', 'dpo', 'spo', 'score', 'demo'],
    group: machine,
    min: 1,
    max: 256,
    default: { without: 'one for each core' },
    help: 'CPU threads',
  },
  seed: {
    type: 'integer',
    methods: ['sft', 'dpo', 'spo', 'demo'],
    group: machine,
    min: 0,
    default: 42,
    help: 'seed of order, adapter initialization and dropout',
  },
  json: {
    type: 'boolean',
    methods: ['score', 'info'],
    group: machine,
    default: false,
    help: 'print JSON, numbers unrounded',
  },
} as const satisfies Record<string, OptionSpec>;

export type OptionTable = typeof optionTable;
export type OptionKey = keyof OptionTable;
