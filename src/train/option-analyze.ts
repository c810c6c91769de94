// Options of `keelgrad analyze` that training does not have: rows of the option table. Data only.
import { groups, type OptionSpec } from './option-spec.js';

const group = groups.analysis;
const looking = ['analyze dynamics', 'analyze mass-shift'] as const;
const mass = ['analyze mass-shift'] as const;
const grids = ['analyze sensitivity', 'analyze terms'] as const;

export const analyzeOptions = {
  pairs: {
    type: 'integer',
    methods: ['analyze theory', 'analyze dynamics', 'analyze sensitivity', 'analyze terms'],
    group,
    min: 1,
    default: { 'analyze theory': 8, 'analyze dynamics': 50, 'analyze sensitivity': 50, 'analyze terms': 4 },
    help: 'pairs to measure on: the last of --data, kept from training where it has more',
    helpOf: {
      'analyze theory': 'pairs to analyze, the first of --data',
      'analyze terms': 'pairs of the one batch, the first of --data',
    },
  },
  stepSizes: {
    type: 'numbers',
    methods: ['analyze theory'],
    group,
    placeholder: 'ETA[,ETA]',
    above: 0,
    default: [1e-3, 1e-4, 1e-5],
    alsoCalled: ['eta'],
    help: 'sizes of the one gradient step, in falling order',
  },
  every: { type: 'integer', methods: looking, group, min: 1, default: 5, help: 'steps between two looks' },
  gradientPairs: {
    type: 'integer',
    methods: ['analyze dynamics'],
    group,
    min: 1,
    default: 4,
    help: 'of those pairs, how many have their gradients taken at every look',
  },
  emaDecay: {
    type: 'number',
    methods: ['analyze dynamics'],
    group,
    min: 0,
    below: 1,
    default: 0.9,
    help: 'weight of the past in smoothed curves',
  },
  prompt: {
    type: 'string',
    methods: mass,
    group,
    placeholder: 'TEXT',
    default: 'Tom has 23 apples and buys 18 more. How many apples does Tom have?',
    help: 'what is asked',
  },
  answer: {
    type: 'string',
    methods: mass,
    group,
    placeholder: 'TEXT',
    default: '41',
    help: 'preferred are responses whose last number is the last of this text',
  },
  samples: { type: 'integer', methods: mass, group, min: 2, default: 100, help: 'responses to sample' },
  maxTokens: { type: 'integer', methods: mass, group, min: 1, default: 48, help: 'longest response' },
  temperature: { type: 'number', methods: mass, group, above: 0, default: 1, help: 'of the samples' },
  perSet: {
    type: 'integer',
    methods: mass,
    group,
    min: 1,
    default: 5,
    help: 'likeliest preferred and dispreferred responses that form pairs',
  },
  lambdas: {
    type: 'numbers',
    methods: grids,
    group,
    placeholder: 'X[,X]',
    min: 0,
    default: { 'analyze sensitivity': [0, 0.5, 1, 2, 5], 'analyze terms': [1, 5] },
    help: 'values of lambda',
  },
  gammas: {
    type: 'numbers',
    methods: grids,
    group,
    placeholder: 'X[,X]',
    min: 0,
    default: { 'analyze sensitivity': [0, 0.01], 'analyze terms': [0, 0.01, 0.1] },
    help: 'values of gamma',
  },
  lowerLearningRates: {
    type: 'numbers',
    methods: ['analyze terms'],
    group,
    placeholder: 'X[,X]',
    above: 0,
    default: [2e-5, 2e-4, 2e-3, 2e-2],
    help: 'step sizes of the lower level (alpha)',
  },
  lowerStepCounts: {
    type: 'numbers',
    methods: ['analyze terms'],
    group,
    placeholder: 'K[,K]',
    min: 1,
    default: [1, 3],
    help: 'numbers of steps of the lower level (K)',
  },
} as const satisfies Record<string, OptionSpec>;
