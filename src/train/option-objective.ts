// Options on what is trained and on SPO's levels: rows of the option table. Data only.
import { followMethods, groups, type OptionSpec } from './option-spec.js';

export const objectiveOptions = {
  train: {
    type: 'string',
    methods: ['sft', 'dpo'],
    group: groups.objective,
    placeholder: 'WHAT',
    choices: ['lora', 'full', 'both'],
    default: 'lora',
    absent: { spo: 'spo always trains both levels, backbone and adapters' },
    help: 'what is trained',
  },
  sftLoss: {
    type: 'string',
    methods: ['sft'],
    group: groups.objective,
    placeholder: 'NAME',
    choices: ['nll', 'dft'],
    default: 'nll',
    help: 'nll, or dft (dynamic fine-tuning: each token weighed by its own probability)',
  },
  sftReduction: {
    type: 'string',
    methods: ['sft', 'spo'],
    group: groups.objective,
    placeholder: 'NAME',
    choices: ['token-mean', 'sum'],
    default: { sft: 'token-mean', spo: 'sum' },
    help: 'token-mean (over the batch) or sum (over tokens, mean over records)',
  },
} as const satisfies Record<string, OptionSpec>;

export const spoOptions = {
  lambda: {
    type: 'number',
    methods: ['spo', 'analyze dynamics', 'analyze mass-shift'],
    group: groups.objective,
    min: 0,
    default: 1,
    help: 'weight of the lower-level penalty L_SFT - L*_SFT',
  },
  gamma: {
    type: 'number',
    methods: ['spo', 'analyze dynamics', 'analyze mass-shift'],
    group: groups.objective,
    min: 0,
    default: 0,
    help: 'weight of the regularizer max(0, |g_chosen| - |g_rejected|)',
  },
  normOver: {
    type: 'string',
    methods: ['spo'],
    group: groups.objective,
    placeholder: 'WHAT',
    choices: ['all', 'adapters', 'backbone'],
    default: 'all',
    help: 'parameters over which the regularizer takes its norms',
  },
  lowerSteps: {
    type: 'integer',
    methods: ['spo', ...followMethods],
    group: groups.objective,
    min: 0,
    default: 1,
    help: 'gradient steps of the lower level; 0 leaves it out',
  },
  lowerLearningRate: {
    type: 'number',
    methods: ['spo', ...followMethods],
    group: groups.objective,
    above: 0,
    default: 2e-5,
    remedy: 'use --lower-steps 0 for no lower level',
    alsoCalled: ['lower-lr'],
    help: 'step size of the lower level',
  },
} as const satisfies Record<string, OptionSpec>;
