// The command line in-process: help, errors, precedence of options, output of each command, Ctrl-C.

import { EventEmitter } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { CliIo, Work } from '../../src/cli/io.js';
import { main } from '../../src/cli/program.js';
import { KeelgradError } from '../../src/errors.js';
import type { RuntimeInfo } from '../../src/native/info.js';
import type { ScoreRecord, TrainHooks } from '../../src/train/hooks.js';
import type { ResolvedScoreOptions, ResolvedTrainOptions } from '../../src/train/options.js';
import { packageVersion } from '../../src/train/run-folder.js';

let folder = '';
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'keelgrad-cli-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

function config(name: string, text: string): string {
  writeFileSync(join(folder, name), text);
  return join(folder, name);
}

const records: ScoreRecord[] = [
  {
    index: 0,
    chosen_logps: -10.125,
    rejected_logps: -1 / 3,
    chosen_tokens: 4,
    rejected_tokens: 1,
    margin: -10.125 + 1 / 3,
  },
  { index: 2, chosen_logps: -2, rejected_logps: -30, chosen_tokens: 4, rejected_tokens: 5, margin: 28 },
];

const info: RuntimeInfo = {
  addon: '/x/keelgrad.node',
  isa: 'avx512',
  cpuFeatures: ['avx2', 'fma'],
  threads: 2,
  hardwareThreads: 4,
  cuda: {
    built: true,
    available: false,
    reason: 'no driver',
    remedy: 'install one',
    driver: 0,
    runtime: 13000,
    devices: [],
  },
};

const withGpu: RuntimeInfo = {
  ...info,
  cuda: {
    built: true,
    available: true,
    driver: 13010,
    runtime: 13000,
    cublas: '/x/libcublasLt.so.13',
    devices: [
      { name: 'NVIDIA H100', memory: 80 * 2 ** 30, capability: 90 },
      { name: 'Tesla T4', memory: 16 * 2 ** 30, capability: 75, reason: 'Tesla T4 has compute capability 7.5' },
    ],
  },
};

interface Session {
  code: number;
  out: string;
  err: string;
  options?: ResolvedTrainOptions | ResolvedScoreOptions;
  exits: number[];
}

type Training = (hooks: TrainHooks, signals: EventEmitter) => Promise<number>;

/** Runs one command line over stand-ins for the work and reports all that came of it. */
async function run(argv: string[], overrides: Partial<Work> = {}, training?: Training, env = {}): Promise<Session> {
  const session: Session = { code: -1, out: '', err: '', exits: [] };
  const signals = new EventEmitter();
  const io: CliIo = {
    stdout: { write: (text) => (session.out += text), columns: 100 },
    stderr: { write: (text) => (session.err += text) },
    env,
    signals,
    exit: (code) => session.exits.push(code),
  };
  const work: Work = {
    runTraining: async (options, hooks) => {
      session.options = options;
      const steps = (await training?.(hooks, signals)) ?? 0;
      const interrupted = hooks.signal?.aborted ?? false;
      return { output: options.output, steps, interrupted, lastMetrics: { loss: 0.5 } };
    },
    scoreFile: async (options, hooks) => {
      session.options = options;
      records.forEach(hooks.onRecord);
      return { records: 2, dropped: 1, interrupted: false };
    },
    runAnalysis: async (name, options) => {
      session.options = options as unknown as ResolvedTrainOptions;
      return { page: `${name}.html`, findings: ['it rose', 'it fell'] };
    },
    runDemo: async (options, context) => void context.stdout.write(`demo in ${options.output}\n`),
    runtimeInfo: async () => info,
    ...overrides,
  };
  session.code = await main(argv, io, work);
  expect(signals.eventNames()).toStrictEqual([]);
  return session;
}

const required = ['--model', 'm', '--data', 'd', '--output', 'o'];

async function refusal(...argv: string[]): Promise<string> {
  const { code, out, err } = await run(argv);
  expect([code, out]).toStrictEqual([1, '']);
  expect(err).toMatch(/^error: [^\n]+\n$/);
  return err.slice('error: '.length, -1);
}

describe('help', () => {
  it('lists the commands', async () => {
    const { code, out } = await run(['--help']);
    expect(code).toBe(0);
    for (const name of ['sft', 'dpo', 'spo', 'score', 'demo', 'info'])
      expect(out).toMatch(new RegExp(`^  ${name} +\\w`, 'm'));
  });

  it('prints the list and fails without a command', async () => {
    const { code, err } = await run([]);
    expect(code).toBe(1);
    expect(err).toContain('Usage: keelgrad <command> [options]');
  });

  it.each([
    ['spo', '--help'],
    ['help', 'spo'],
  ])('%s %s prints options with defaults, 100 columns wide', async (...argv) => {
    const { code, out } = await run(argv);
    expect(code).toBe(0);
    expect(out).toMatch(/--lower-learning-rate X +step size of the lower level \(default 2e-5\)/);
    expect(out).toMatch(/--beta X +.*\(default 0\.5\)/);
    expect(out).toMatch(/--loss-type NAME\[,NAME\] +preference loss.*sigmoid \| hinge/s);
    expect(out).not.toContain('--sft-loss');
    for (const [flag, said] of [
      ['--preset NAME', 'paper (GSM8K): lambda 1, gamma'],
      ['--lambda-schedule NAME', 'constant, or from 0 to --lambda'],
      ['--lambda-ramp-steps N', '(default 100)'],
      ['--penalty-form NAME', '(default auto)'],
      ['--norm-per-token', 'for losses normalized by length'],
      ['--regularizer-method NAME', 'not with bfloat16'],
      ['--lower-solver NAME', 'gradient, momentum or adam'],
      ['--lower-warm-start', "a copy of the backbone's size"],
      ['--term-norms', 'terms (c) and (e)'],
    ])
      expect(out.replace(/\s+/g, ' ').split(` ${flag} `)[1]).toContain(said);
    expect(Math.max(...out.split('\n').map((line) => line.length))).toBeLessThanOrEqual(100);
  });

  it('prints the version', async () => {
    expect(await run(['--version'])).toMatchObject({ code: 0, out: `${packageVersion()}\n`, err: '' });
  });
});

describe('errors', () => {
  it.each([
    [['spo', '--lamda', '1'], '--lamda is no option of keelgrad spo; did you mean --lambda?'],
    [['spo', '--lamda=1'], '--lamda is no option of keelgrad spo; did you mean --lambda?'],
    [['spo', '--max_length', '1'], '--max_length is no option of keelgrad spo; did you mean --max-length?'],
    [['sft', '--shuffle'], '--shuffle is no option of keelgrad sft; did you mean --no-shuffle?'],
    [['spo', '--mdl', 'x'], '--mdl is no option of keelgrad spo; did you mean --model?'],
    [['sft', '--loss-type', 'dft'], 'not of keelgrad sft: its losses are --sft-loss nll and --sft-loss dft'],
    [['sft', '--confg', 'x'], '--confg is no option of keelgrad sft; did you mean --config?'],
    [['dpo', '--gamma', '1'], '--gamma is an option of keelgrad spo, not of keelgrad dpo; see keelgrad dpo --help'],
    [
      ['score', '--seed', '1'],
      '--seed is an option of keelgrad sft, keelgrad dpo, keelgrad spo, keelgrad demo, not of keelgrad score',
    ],
    [['--frobnicate'], '--frobnicate is no option of keelgrad; see keelgrad --help'],
    [['spoo'], '"spoo" is no command; expected one of sft, dpo, spo, score, analyze, demo, info; did you mean spo?'],
    [
      ['sft', 'data.jsonl'],
      'expected options only, found "data.jsonl", which belongs to none; see keelgrad sft --help',
    ],
    [['sft', '--epochs'], '--epochs: expected a value, found nothing; see keelgrad sft --help'],
    [['sft', '--data', 'd'], 'keelgrad sft needs --model DIR --output DIR; see keelgrad sft --help'],
    [
      ['spo', ...required, '--train', 'lora'],
      'not of keelgrad spo: spo always trains both levels, the backbone in the lower one and the adapters in the upper one; keelgrad dpo trains one of the two',
    ],
    [
      ['spo', ...required, '--norm-per-token'],
      '--norm-per-token has no effect with --gamma 0: there is no regularizer',
    ],
    [['spo', ...required, '--preset', 'best'], '--preset: expected one of paper, recommended, found "best"'],
    [['spo', ...required, '--lambda', '-1'], '--lambda: expected a number of at least 0, found -1'],
    [['spo', ...required, '--lower-warm-start', '--dtype', 'bfloat16'], '--lower-warm-start cannot be had with'],
    [['dpo', ...required, '--beta', '-1'], '--beta: expected a number above 0, found -1'],
    [['dpo', ...required, '--label-smoothing', '0.1'], '--loss-type robust'],
  ])('%j', async (argv, message) => {
    expect(await refusal(...argv)).toContain(message);
  });

  const failing = (error: Error): Partial<Work> => ({ runTraining: () => Promise.reject(error) });

  it('prints an expected error alone, with its stack only for debugging', async () => {
    const error = new KeelgradError('m: no such folder');
    expect(await run(['sft', ...required], failing(error))).toMatchObject({
      code: 1,
      err: 'error: m: no such folder\n',
    });
    const debug = await run(['sft', ...required], failing(error), undefined, { KEELGRAD_DEBUG: '1' });
    expect(debug.err).toMatch(/^error: m: no such folder\n {4}at /);
  });

  it('prints where an unexpected error came from', async () => {
    const { code, err } = await run(['sft', ...required], failing(new TypeError('x is undefined')));
    expect(code).toBe(1);
    expect(err).toMatch(/^error: x is undefined\n {4}at /);
  });
});

describe('options', () => {
  it('resolves what was given, and nothing else', async () => {
    const { options } = await run([
      'spo',
      ...required,
      '--no-shuffle',
      '--lower-steps',
      '0',
      '--lora-targets=q_proj,v_proj',
    ]);
    expect(options).toMatchObject({
      method: 'spo',
      shuffle: false,
      lowerSteps: 0,
      loraTargets: ['q_proj', 'v_proj'],
      beta: 0.5,
    });
    expect((await run(['sft', ...required])).options).toMatchObject({ shuffle: true, overwrite: false });
  });

  it('takes the settings of spo, a preset overridden by options and by a file', async () => {
    const flags = '--preset paper --gamma 0.2 --norm-per-token --regularizer-method finite-differences --lower-steps 3';
    const more =
      '--lower-solver momentum --lower-warm-start --lambda-schedule cosine --lambda-ramp-steps 9 --term-norms';
    const { options } = await run(['spo', ...required, ...`${flags} ${more}`.split(' ')]);
    const given = {
      preset: 'paper',
      gamma: 0.2,
      normPerToken: true,
      regularizerMethod: 'finite-differences',
      lowerSteps: 3,
      lowerSolver: 'momentum',
      lowerWarmStart: true,
      lambdaSchedule: 'cosine',
      lambdaRampSteps: 9,
      termNorms: true,
    };
    expect(options).toMatchObject({ ...given, epochs: 3, lowerLearningRate: 2e-5 });
    const file = config('spo.yaml', 'preset: recommended\nlambda: 4\npenalty-form: difference\n');
    const merged = await run(['spo', ...required, '--config', file, '--preset', 'paper']);
    expect(merged.options).toMatchObject({ preset: 'paper', lambda: 4, penaltyForm: 'difference', batchSize: 4 });
  });

  it.each([
    ['run.json', '{"beta": 0.3, "max_steps": 9, "loss-type": ["sigmoid", "sft"], "lossWeights": [1, 0.5]}'],
    ['run.yaml', 'beta: 3e-1\nmax-steps: 9\nloss_type: [sigmoid, sft]\nloss-weights: 1,0.5\nadapter:\n'],
    ['run.YML', '# a comment\nbeta: "0.3"\nmaxSteps: 9\nloss_type: sigmoid,sft\nloss-weights: [1, 0.5]\n'],
  ])('reads %s; the command line wins', async (name, text) => {
    const file = config(name, text);
    const { options } = await run(['dpo', ...required, '--config', file]);
    expect(options).toMatchObject({ beta: 0.3, maxSteps: 9, lossType: ['sigmoid', 'sft'], lossWeights: [1, 0.5] });
    const won = await run(['dpo', ...required, '--config', file, '--beta', '0.7']);
    expect(won.options).toMatchObject({ beta: 0.7, maxSteps: 9 });
  });

  it('takes required options from the file, and lets one option replace its counterpart there', async () => {
    const file = config('full.yaml', 'model: m\ndata: d\noutput: o\nepochs: 2\nwarmup-steps: 5\n');
    const { options } = await run(['sft', '--config', file, '--max-steps', '4', '--warmup-ratio', '0.5']);
    expect(options).toMatchObject({ model: 'm', output: 'o', maxSteps: 4, warmupRatio: 0.5, warmupSteps: 0 });
  });

  it('accepts an empty file', async () => {
    expect((await run(['sft', ...required, '--config', config('empty.yaml', '')])).code).toBe(0);
  });

  it.each([
    ['a.yaml', 'max_lenght: 3', '"max_lenght" is no option of keelgrad dpo; did you mean "max-length"?'],
    ['b.yaml', 'gamma: 1', '"gamma" is an option of keelgrad spo, not of keelgrad dpo'],
    ['c.json', '{"beta": -1}', '"beta": expected a number above 0, found -1'],
    ['d.yaml', 'momentum: 0.9', '"momentum" has no effect with --optimizer adamw'],
    ['e.json', '{"beta": 0.1,}', 'expected JSON, found an error: '],
    ['f.yaml', 'beta: [1', 'expected YAML, found an error: '],
    ['g.yaml', '- beta', 'expected option names with values, as "beta: 0.1", found ["beta"]'],
    ['h.toml', 'beta = 1', 'expected a name that ends in .json, .yaml or .yml, found .toml'],
    ['i.yaml', 'method: spo', '"method": expected "dpo", found "spo"'],
    ['j.yaml', 'max-length: 3\nmaxLength: 4', '"maxLength" is given twice'],
  ])('refuses %s', async (name, text, message) => {
    const { code, err } = await run(['dpo', ...required, '--config', config(name, text)]);
    expect(code).toBe(1);
    expect(err).toContain(message);
    expect(err).toContain(join(folder, name));
  });

  it('says when the file is missing', async () => {
    expect(await refusal('sft', '--config', join(folder, 'absent.json'))).toMatch('cannot be read (no such file)');
  });
});

describe('training', () => {
  it('shows progress and ends with where everything is', async () => {
    const session = await run(['spo', ...required], {}, async (hooks) => {
      hooks.onStart?.({ totalSteps: 40, examples: 1234, dropped: 2 });
      hooks.onPhase?.('reference log-probabilities', 0, 10);
      hooks.onPhase?.('reference log-probabilities', 10, 10);
      for (let step = 1; step <= 40; step++) {
        hooks.onStep?.({ step, totalSteps: 40, metrics: { loss: 1 / step, 'logps/chosen': -12.345 } });
      }
      hooks.onMessage?.('a word of warning');
      return 40;
    });
    const lines = session.err.split('\n');
    expect(lines[0]).toBe('40 steps, 1,234 records, 2 dropped (prompt fills --max-length)');
    expect(lines.filter((line) => line.startsWith('reference')).length).toBe(1);
    expect(lines.filter((line) => line.startsWith('step '))).toHaveLength(21);
    expect(session.err).toContain('step 40/40  loss 0.0250  chosen -12.35  0:00\na word of warning\n');
    expect(session).toMatchObject({ code: 0, out: 'spo finished at step 40: loss 0.5000\nsaved in o\n' });
  });

  it('stops after the step at the first Ctrl-C, at once at the second', async () => {
    const session = await run(['sft', ...required], {}, async (hooks, signals) => {
      expect(hooks.signal?.aborted).toBe(false);
      signals.emit('SIGINT');
      expect(hooks.signal?.aborted).toBe(true);
      signals.emit('SIGINT');
      return 3;
    });
    expect(session).toMatchObject({
      code: 130,
      exits: [130],
      out: 'sft stopped after step 3: loss 0.5000\nsaved in o\n',
    });
    expect(session.err).toContain('press Ctrl-C again');
  });
});

describe('score', () => {
  it('--json prints one unrounded object a record and nothing else', async () => {
    const { code, out, err } = await run(['score', '--model', 'm', '--data', 'd', '--json', '--max-length', '64']);
    expect(code).toBe(0);
    expect(
      out
        .trimEnd()
        .split('\n')
        .map((line) => JSON.parse(line)),
    ).toStrictEqual(records);
    expect(err).toContain('1 records dropped');
  });

  it('prints a table and what it adds up to', async () => {
    const { out, options } = await run(['score', '--model', 'm', '--data', 'd']);
    expect(options).toMatchObject({ maxLength: undefined, json: false });
    const lines = out.split('\n');
    expect(lines[0].trim().split(/\s+/)).toStrictEqual(['record', 'chosen', 'tokens', 'rejected', 'tokens', 'margin']);
    expect(lines[2].trim().split(/\s+/)).toStrictEqual(['2', '-2.0000', '4', '-30.0000', '5', '28.0000']);
    expect(new Set(lines.slice(0, 3).map((line) => line.length)).size).toBe(1);
    expect(out).toMatch(/mean chosen +-6\.0625 +per token -1\.5156/);
    expect(out).toMatch(/accuracy +0\.5000 +chosen above rejected in 1 of 2 records/);
  });
});

describe('analyze', () => {
  it('runs an analysis and says what came out and where', async () => {
    const { code, out, options } = await run(['analyze', 'theory', '--pairs', '3']);
    expect(code).toBe(0);
    expect(options).toMatchObject({ method: 'analyze theory', pairs: 3, dtype: 'float64' });
    expect(out).toBe(
      '- it rose\n- it fell\n\nreport: theory.html, with its charts (SVG), tables (CSV) and numbers (JSON) beside it\n',
    );
  });

  it('reads its options from a config file', async () => {
    const file = config('analysis.yaml', 'pairs: 3\nlambdas: [1, 2]\n');
    const { options } = await run(['analyze', 'terms', '--config', file, '--pairs', '2']);
    expect(options).toMatchObject({ method: 'analyze terms', pairs: 2, lambdas: [1, 2] });
  });

  it('stopped before its end, it says so', async () => {
    const { code, out } = await run(['analyze', 'terms'], { runAnalysis: async () => undefined });
    expect([code, out]).toStrictEqual([130, 'stopped before its end; nothing was written\n']);
  });

  it.each([
    [
      ['analyze', 'theorie'],
      '"theorie" is no command; expected one of theory, dynamics, mass-shift, sensitivity, terms',
    ],
    [
      ['analyze', 'theory', '--stepsizes', '1'],
      '--stepsizes is no option of keelgrad analyze theory; did you mean --step-sizes?',
    ],
    [['analyze', 'theory', '--step-sizes', '0'], '--step-sizes: expected numbers, each above 0, found 0'],
    [['analyze', 'mass-shift', '--data', 'x'], '--data is an option of'],
  ])('refuses %j', async (argv, message) => {
    const { code, err } = await run(argv);
    expect(code).toBe(1);
    expect(err).toContain(message);
  });

  it('lists the analyses', async () => {
    const { out } = await run(['analyze', '--help']);
    for (const name of ['theory', 'dynamics', 'mass-shift', 'sensitivity', 'terms'])
      expect(out).toContain(`  ${name}  `);
  });
});

describe('demo and info', () => {
  it('runs the demo with its options', async () => {
    expect(await run(['demo', '--output', 'x'])).toMatchObject({ code: 0, out: 'demo in x\n' });
  });

  it('prints what there is', async () => {
    const { code, out } = await run(['info']);
    expect(code).toBe(0);
    expect(out).toMatch(/^keelgrad +\d/m);
    expect(out).toMatch(/^kernels +avx512$/m);
    expect(out).toMatch(/^cuda +not available: no driver\n +install one\n +built with CUDA 13\.0; no driver$/m);
    expect(JSON.parse((await run(['info', '--json'])).out).native).toStrictEqual(info);
  });

  it('describes the GPUs, usable or not', async () => {
    const { out } = await run(['info'], { runtimeInfo: async () => withGpu });
    expect(out).toMatch(/^cuda +available\n +built with CUDA 13\.0; a driver for 13\.1$/m);
    expect(out).toMatch(/^cuda:0 +NVIDIA H100, 80\.0 GiB, compute capability 9\.0$/m);
    expect(out).toMatch(/^cuda:1 +Tesla T4, .*not usable: Tesla T4 has compute capability 7\.5$/m);
  });

  it('still prints versions when the native layer does not load', async () => {
    const { code, out } = await run(['info'], {
      runtimeInfo: () => Promise.reject(new Error('not built\nnpm run build')),
    });
    expect(code).toBe(1);
    expect(out).toMatch(/^node +\d/m);
    expect(out).toMatch(/^native +not loaded: not built\n +npm run build$/m);
  });
});
