// Options of preference losses: rows of the option table. Defaults and bounds are those of the losses themselves. Data only.
import {
  defaultDivergenceCoefficient,
  defaultNllWeight,
  fDivergences,
  lossParameters,
  nllReductions,
  preferenceLossNames,
  referenceFree,
} from '../objectives/preference/facts.js';
import { type Chosen, followMethods, groups, type OptionSpec, spoMethods } from './option-spec.js';

const lossesOf = (chosen: Chosen): readonly string[] => chosen.lossType as readonly string[];

const preferenceMethods = ['dpo', ...spoMethods] as const;

const row = { methods: preferenceMethods, group: groups.objective } as const;
const parameter = { type: 'number', methods: preferenceMethods, group: groups.losses } as const;

export const lossOptions = {
  lossType: {
    ...row,
    type: 'strings',
    placeholder: 'NAME[,NAME]',
    choices: preferenceLossNames,
    default: ['sigmoid'],
    alsoCalled: ['loss'],
    absent: { sft: 'its losses are --sft-loss nll and --sft-loss dft' },
    help: 'preference loss; several make a weighted sum',
  },
  lossWeights: {
    ...row,
    type: 'numbers',
    placeholder: 'W[,W]',
    min: 0,
    default: { text: '1 each', value: (chosen: Chosen) => lossesOf(chosen).map(() => 1) },
    help: 'one weight for each loss of --loss-type',
  },
  beta: {
    ...row,
    methods: [...preferenceMethods, 'analyze theory'],
    type: 'number',
    default: {
      dpo: 0.1,
      spo: 0.5,
      'analyze theory': 0.5,
      'analyze dynamics': 0.5,
      'analyze mass-shift': 0.5,
      'analyze sensitivity': 0.5,
      'analyze terms': 0.5,
    },
    above: 0,
    help: 'temperature of the preference loss',
  },
  reference: {
    ...row,
    type: 'string',
    placeholder: 'WHICH',
    choices: ['initial', 'base', 'none'],
    default: {
      text: 'initial; none with losses that have none',
      value: (chosen: Chosen) => (referenceFree(lossesOf(chosen)) ? 'none' : 'initial'),
    },
    help: 'initial (the policy as it starts, its adapter included), base (the model alone) or none',
  },
  nllWeight: {
    ...row,
    type: 'number',
    min: 0,
    default: { text: '0; 1 with cpo and orpo', value: (chosen: Chosen) => defaultNllWeight(lossesOf(chosen)) },
    alsoCalled: ['rpo-alpha', 'cpo-alpha'],
    help: 'weight of the NLL of chosen answers beside the loss',
  },
  nllReduction: {
    ...row,
    type: 'string',
    placeholder: 'NAME',
    choices: nllReductions,
    default: 'token-mean',
    help: 'that NLL: token-mean (over the step), sequence-mean (over tokens, then pairs) or sequence-sum',
  },
  ldAlpha: {
    ...row,
    type: 'number',
    min: 0,
    max: 1,
    default: 1,
    help: "LD-DPO: weight of tokens beyond the shorter answer's length; 1 is off",
  },
  wpo: {
    ...row,
    type: 'boolean',
    default: false,
    alsoCalled: ['use-weighting'],
    help: 'WPO: weigh pairs by how likely the policy is to write them',
  },

  labelSmoothing: {
    ...parameter,
    ...lossParameters.labelSmoothing,
    help: 'share of flipped labels that robust, cdpo, exo_pair, aot, simpo, cpo and their kin assume',
  },
  fDivergenceType: {
    ...parameter,
    type: 'string',
    placeholder: 'NAME',
    choices: fDivergences,
    default: 'reverse_kl',
    alsoCalled: ['f-divergence'],
    help: 'score of an answer against the reference',
  },
  fAlphaDivergenceCoef: {
    ...parameter,
    default: defaultDivergenceCoefficient,
    help: 'coefficient of alpha_divergence; 1 is reverse_kl',
  },
  discopopTau: { ...parameter, ...lossParameters.discopopTau, help: "temperature of discopop's gate" },
  dpopLambda: {
    ...parameter,
    ...lossParameters.dpopLambda,
    help: "weight of dpop's penalty on chosen answers below the reference",
  },
  rdpoAlpha: { ...parameter, ...lossParameters.rdpoAlpha, help: 'weight of the difference of lengths in rdpo' },
  betaDpoAlpha: {
    ...parameter,
    ...lossParameters.betaDpoAlpha,
    help: 'how far the beta of beta_dpo follows the mean margin of a step',
  },
  betaDpoMomentum: {
    ...parameter,
    methods: ['dpo', 'spo', ...followMethods],
    ...lossParameters.betaDpoMomentum,
    help: 'momentum of the mean margin that beta_dpo compares with',
  },
  simpoGamma: { ...parameter, ...lossParameters.simpoGamma, help: 'target margin of simpo and alphapo' },
  alphapoAlpha: { ...parameter, ...lossParameters.alphapoAlpha, help: 'shape of the reward of alphapo; 0 is simpo' },
  orpoLambda: { ...parameter, ...lossParameters.orpoLambda, help: 'weight of the odds ratio in orpo' },
  slicDelta: { ...parameter, ...lossParameters.slicDelta, help: 'margin of slic' },
  slicLambda: {
    ...parameter,
    ...lossParameters.slicLambda,
    help: "weight of slic's regularization towards the chosen answer",
  },
  slicLengthNormalize: { ...parameter, type: 'boolean', default: false, help: 'slic on means over tokens, not sums' },
  ktoDesirableWeight: {
    ...parameter,
    ...lossParameters.ktoDesirableWeight,
    alsoCalled: ['desirable-weight'],
    help: 'weight of chosen or desirable answers in kto and apo_zero_unpaired',
  },
  ktoUndesirableWeight: {
    ...parameter,
    ...lossParameters.ktoUndesirableWeight,
    alsoCalled: ['undesirable-weight'],
    help: 'weight of rejected or undesirable answers in kto and apo_zero_unpaired',
  },
} as const satisfies Record<string, OptionSpec>;
