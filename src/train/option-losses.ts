// Options of preference losses: rows of the option table. Data only.
import { type Chosen, groups, type OptionSpec, preferenceMethods } from './option-spec.js';

export const lossOptions = {
  beta: {
    type: 'number',
    methods: preferenceMethods,
    group: groups.objective,
    default: { dpo: 0.1, spo: 0.5 },
    above: 0,
    help: 'temperature of the preference loss',
  },
  lossType: {
    type: 'strings',
    methods: ['dpo'],
    group: groups.objective,
    placeholder: 'NAME[,NAME]',
    choices: ['sigmoid', 'ipo', 'robust', 'sft'],
    default: ['sigmoid'],
    alsoCalled: ['loss'],
    help: 'preference loss; several make a weighted sum',
  },
  lossWeights: {
    type: 'numbers',
    methods: ['dpo'],
    group: groups.objective,
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
    group: groups.objective,
    min: 0,
    below: 0.5,
    default: 0,
    help: 'share of flipped labels that --loss-type robust assumes',
  },
  reference: {
    type: 'string',
    methods: preferenceMethods,
    group: groups.objective,
    placeholder: 'WHICH',
    choices: ['initial', 'base', 'none'],
    default: 'initial',
    help: 'initial (the policy as it starts, its adapter included), base (the model alone) or none',
  },
} as const satisfies Record<string, OptionSpec>;
