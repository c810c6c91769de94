// Options on where things are and what machine runs them: rows of the option table. Data only.
import { assets } from '../demo/settings.js';
import { type DType, policyOf } from '../tensor/dtype.js';
import {
  type AnalyzeMethod,
  analyzeMethods,
  type Chosen,
  followMethods,
  groups,
  modelMethods,
  type OptionSpec,
  trainMethods,
} from './option-spec.js';

/** What analyses look at unless told otherwise: the demo's. */
const fromDemo = (what: string, path: string) => {
  const rule = { text: `the demo's ${what}`, value: () => path };
  return Object.fromEntries(analyzeMethods.map((method) => [method, rule])) as Record<AnalyzeMethod, typeof rule>;
};

const outputFolders = Object.fromEntries(
  analyzeMethods.map((method) => [method, `keelgrad-${method.replace(' ', '-')}`]),
) as Record<AnalyzeMethod, string>;

export const fileOptions = {
  model: {
    type: 'string',
    methods: [...modelMethods, ...analyzeMethods],
    group: groups.files,
    placeholder: 'DIR',
    required: true,
    default: fromDemo('model', assets.model),
    alsoCalled: ['model-name-or-path'],
    help: 'Hugging Face folder of a Llama or Qwen2 model',
  },
  data: {
    type: 'string',
    methods: [...modelMethods, 'analyze theory', 'analyze dynamics', 'analyze sensitivity', 'analyze terms'],
    group: groups.files,
    placeholder: 'FILE',
    required: true,
    default: fromDemo('pairs', assets.pairs),
    help: 'records, one JSON object a line or one JSON array',
  },
  output: {
    type: 'string',
    methods: ['sft', 'dpo', 'spo', 'demo', ...analyzeMethods],
    group: groups.files,
    placeholder: 'DIR',
    required: true,
    default: { demo: 'keelgrad-demo', ...outputFolders },
    alsoCalled: ['output-dir'],
    help: 'folder for what the run writes',
  },
  adapter: {
    type: 'string',
    methods: [...modelMethods, ...analyzeMethods],
    group: groups.files,
    placeholder: 'DIR',
    help: 'PEFT adapter to start from; its rank, alpha and targets hold',
    helpOf: { score: 'PEFT adapter on top of the model', 'analyze theory': 'PEFT adapter on top of the model' },
  },
  overwrite: {
    type: 'boolean',
    methods: trainMethods,
    group: groups.files,
    default: false,
    help: 'replace the earlier run in --output; other files there stay',
  },
  saveDtype: {
    type: 'string',
    methods: trainMethods,
    group: groups.files,
    placeholder: 'TYPE',
    choices: ['float32', 'float64', 'bfloat16', 'float16'],
    default: {
      text: 'float32; float64 with --dtype float64',
      value: (chosen: Chosen) => policyOf(chosen.dtype as DType).files,
    },
    help: 'dtype of saved weights',
  },
} as const satisfies Record<string, OptionSpec>;

export const machineOptions = {
  device: {
    type: 'string',
    methods: [...modelMethods, ...analyzeMethods],
    group: groups.machine,
    placeholder: 'NAME',
    choices: ['auto', 'cpu', 'cuda'],
    default: 'auto',
    help: 'auto (a GPU that can be used, else the CPU), cpu or cuda',
  },
  dtype: {
    type: 'string',
    methods: [...modelMethods, ...analyzeMethods],
    group: groups.machine,
    placeholder: 'TYPE',
    choices: ['float32', 'bfloat16', 'float64'],
    default: {
      sft: 'float32',
      dpo: 'float32',
      spo: 'float32',
      score: 'float32',
      'analyze theory': 'float64',
      'analyze dynamics': 'float32',
      'analyze mass-shift': 'float32',
      'analyze sensitivity': 'float32',
      'analyze terms': 'float32',
    },
    help: 'dtype of computation',
  },
  threads: {
    type: 'integer',
    methods: ['sft', 'dpo', 'spo', 'score', 'demo', ...analyzeMethods],
    group: groups.machine,
    min: 1,
    max: 256,
    default: { without: 'one for each core' },
    help: 'CPU threads',
  },
  seed: {
    type: 'integer',
    methods: ['sft', 'dpo', 'spo', 'demo', ...followMethods, 'analyze terms'],
    group: groups.machine,
    min: 0,
    default: 42,
    help: 'seed of order, adapter initialization and dropout',
    helpOf: {
      'analyze mass-shift': 'seed of samples, order, adapter initialization and the toy model',
      'analyze terms': 'seed of adapter initialization',
    },
  },
  json: {
    type: 'boolean',
    methods: ['score', 'info'],
    group: groups.machine,
    default: false,
    help: 'print JSON, numbers unrounded',
  },
} as const satisfies Record<string, OptionSpec>;
