// The command line: commands and flags out of the option table, dispatch, errors as one line, exit codes.
// Thin: it parses, validates and calls; no option is named here but --config.

import { Command, CommanderError, Option } from 'commander';
import { KeelgradError, show, suggest } from '../errors.js';
import {
  type Analysis,
  type AnalyzeOptions,
  defaultText,
  findOption,
  flagNaming,
  flagOf,
  type Method,
  methods,
  type OptionKey,
  optionsOf,
  type Resolved,
  specOf,
} from '../train/options.js';
import { packageVersion } from '../train/run-folder.js';
import { gatherOptions } from './config.js';
import { type CliIo, defaultWork, type Work, withInterrupt } from './io.js';

/** What one command is, beside its options. */
interface CommandSpec<M extends Method> {
  readonly summary: string;
  readonly about: string;
  readonly example?: string;
  readonly run: (options: Resolved<M>, io: CliIo, work: Work) => Promise<number>;
}

const trainingFiles =
  'Writes metrics.jsonl (one object per step) and run.json to --output, the adapter in PEFT format under adapter/ ' +
  'when adapters were trained, the model in Hugging Face format under model/ when the backbone was.';

const runTrain: CommandSpec<'sft' | 'dpo' | 'spo'>['run'] = async (options, io, work) =>
  (await import('./train.js')).trainCommand(options, io, work);

const reportFiles =
  "Writes a page with charts, each chart as SVG, tables as CSV and all numbers as JSON to --output. Looks at the demo's model and " +
  'pairs unless told otherwise.';

const runAnalysis =
  <A extends Analysis>(name: A): CommandSpec<`analyze ${A}`>['run'] =>
  async (options, io, work) =>
    (await import('./analyze.js')).analyzeCommand(name, options as unknown as AnalyzeOptions<A>, io, work);

const commands: { readonly [M in Method]: CommandSpec<M> } = {
  sft: {
    summary: 'supervised fine-tuning on completions',
    about: `Supervised fine-tuning: raises the log-probability of completions. ${trainingFiles}`,
    example: 'keelgrad sft --model SmolLM2-135M --data train.jsonl --output runs/sft',
    run: runTrain,
  },
  dpo: {
    summary: 'direct preference optimization on pairs of answers',
    about: `Direct preference optimization on chosen and rejected answers. ${trainingFiles}`,
    example: 'keelgrad dpo --model runs/sft/model --data pairs.jsonl --output runs/dpo --beta 0.1',
    run: runTrain,
  },
  spo: {
    summary: 'stable preference optimization: bilevel, keeps chosen answers likely',
    about: `Stable preference optimization: DPO above, SFT below, the backbone and an adapter as the two levels. ${trainingFiles}`,
    example: 'keelgrad spo --model runs/sft/model --data pairs.jsonl --output runs/spo --lambda 1 --gamma 0.001',
    run: runTrain,
  },
  score: {
    summary: 'log-probabilities of chosen and rejected answers, record by record',
    about:
      'Log-probabilities of the chosen and the rejected answer of every record, their token counts and the margin ' +
      '(chosen - rejected), then means and accuracy. With --json one object a record and nothing else.',
    example: 'keelgrad score --model runs/spo/model --adapter runs/spo/adapter --data pairs.jsonl --json',
    run: async (options, io, work) => (await import('./score.js')).scoreCommand(options, io, work),
  },
  'analyze theory': {
    summary: 'what one step of DPO does: Theorem 1 and its corollaries, predicted and measured',
    about: `Predicted and measured change of log-probabilities after one plain gradient step of DPO on each pair: Theorem 1, both corollaries, and where they fail. Other responses are followed too: those of a record's field others (a list in the form of chosen), else the next record's chosen one. ${reportFiles}`,
    example: 'keelgrad analyze theory --model SmolLM2-135M --data pairs.jsonl --pairs 4 --output theory',
    run: runAnalysis('theory'),
  },
  'analyze dynamics': {
    summary: 'log-probabilities while training, DPO and SPO from one start',
    about: `Trains by DPO and by SPO from the same start and follows the log-probabilities of chosen and rejected responses, the gradient terms of Theorem 1 and the log ratio. ${reportFiles}`,
    example: 'keelgrad analyze dynamics --model SmolLM2-135M --data pairs.jsonl --max-steps 20 --output dynamics',
    run: runAnalysis('dynamics'),
  },
  'analyze mass-shift': {
    summary: 'where probability goes: the sampled responses to one prompt while training',
    about: `Samples responses to one prompt, makes pairs of them, trains by DPO and by SPO and follows the probability of every response. ${reportFiles}`,
    example: 'keelgrad analyze mass-shift --prompt "What is 12 times 11?" --answer 132 --model SmolLM2-135M',
    run: runAnalysis('mass-shift'),
  },
  'analyze sensitivity': {
    summary: 'how SPO depends on lambda and gamma: a grid of short runs, one table',
    about: `Trains by SPO from the same start for every pair of lambda and gamma, and measures what became of the log-probabilities. ${reportFiles}`,
    example: 'keelgrad analyze sensitivity --lambdas 0,1,5 --gammas 0,0.1 --max-steps 20',
    run: runAnalysis('sensitivity'),
  },
  'analyze terms': {
    summary: "what the terms (a) to (e) of SPO's gradient weigh, over alpha, K, lambda and gamma",
    about: `Norms of the terms of SPO's gradient on one batch and their shares, and whether the lower level's part is more than rounding. ${reportFiles}`,
    example: 'keelgrad analyze terms --model SmolLM2-135M --data pairs.jsonl --lower-learning-rates 2e-5,2e-3',
    run: runAnalysis('terms'),
  },
  demo: {
    summary: 'DPO and SPO side by side on a small built-in model, in two minutes',
    about:
      'Trains a small built-in model by DPO and by SPO from the same start and shows what becomes of the ' +
      'log-probabilities of chosen and rejected answers. Needs no network and no files.',
    run: async (options, io, work) => {
      const note = (text: string): void => void io.stderr.write(`${text}\n`);
      const { stdout, stderr } = io;
      return await withInterrupt(io, note, async (signal) => {
        await work.runDemo(options, { stdout, stderr, signal });
        return signal.aborted ? 130 : 0;
      });
    },
  },
  info: {
    summary: 'versions, CPU features, threads, CUDA',
    about: 'Versions, native layer, CPU features, threads, and whether CUDA can be used or why not.',
    run: async (options, io, work) => (await import('./info.js')).infoCommand(options, io, work),
  },
};

/** `course of the learning rate: linear | cosine (default linear)`. */
function describe(key: OptionKey, method: Method): string {
  const spec = specOf(key);
  const fallback = defaultText(key, method);
  const notes: string[] = [];
  if (spec.required && fallback === undefined) notes.push('required');
  if (fallback !== undefined) notes.push(`default ${fallback}`);
  const help = spec.helpOf?.[method] ?? spec.help;
  const isListed = spec.choices?.every((choice) => help.includes(choice)) ?? true;
  const choices = isListed ? '' : `: ${spec.choices?.join(' | ')}`;
  return `${help}${choices}${notes.length > 0 ? ` (${notes.join(', ')})` : ''}`;
}

function commandOption(key: OptionKey, method: Method): Option {
  const spec = specOf(key);
  const value = spec.type === 'boolean' ? '' : ` <${spec.placeholder ?? (spec.type === 'integer' ? 'N' : 'X')}>`;
  return new Option(`${flagOf(key)}${value}`, describe(key, method)).helpGroup(`${spec.group}:`);
}

const configOption = (): Option =>
  new Option('--config <FILE>', 'options from a JSON or YAML file; the command line wins').helpGroup('Model and data:');

const takesConfig = (method: Method): boolean => !['score', 'demo', 'info'].includes(method);

/** `analyze theory` is a command of `analyze`, which has no options of its own. */
function parentOf(program: Command, method: Method): Command {
  const [name, child] = method.split(' ');
  if (child === undefined) return program;
  const found = program.commands.find((one) => one.name() === name);
  if (found) return found;
  return program
    .command(name)
    .summary('what preference training does to probabilities: five analyses')
    .description('Analyses of what DPO and SPO do to probabilities; each writes a report.')
    .helpOption('-h, --help', 'print this page')
    .helpCommand(false)
    .usage('<analysis> [options]');
}

/** Only what was written on the command line: the parser's own defaults are not the user's. */
function givenOptions(command: Command, method: Method): Partial<Record<OptionKey, unknown>> {
  const given: Partial<Record<OptionKey, unknown>> = {};
  for (const key of optionsOf(method)) {
    if (command.getOptionValueSource(key) === 'cli') given[key] = command.getOptionValue(key);
  }
  return given;
}

/** Runs a command's body; its exit code is the process's. */
type Finish = (run: () => Promise<number>) => Promise<void>;

function addCommand<M extends Method>(program: Command, method: M, finish: Finish, io: CliIo, work: Work): void {
  const spec = commands[method];
  const command = parentOf(program, method)
    .command(method.replace(/^.* /, ''))
    .summary(spec.summary)
    .description(spec.about);
  command.helpOption('-h, --help', 'print this page').usage('[options]');
  if (takesConfig(method)) command.addOption(configOption());
  for (const key of optionsOf(method)) command.addOption(commandOption(key, method));
  if (spec.example) command.addHelpText('after', `\nExample:\n  ${spec.example}`);
  command.action(() =>
    finish(async () => {
      const config = takesConfig(method) ? (command.getOptionValue('config') as string | undefined) : undefined;
      return spec.run(await gatherOptions(method, givenOptions(command, method), config), io, work);
    }),
  );
}

/** Help pages fit the terminal, but never run wider than lines read well. */
const helpWidth = (io: CliIo): number => Math.min(io.stdout.columns ?? 100, 100);

function buildProgram(finish: Finish, io: CliIo, work: Work): Command {
  const program = new Command('keelgrad')
    .description('Preference fine-tuning of language models: SFT, DPO and stable preference optimization (SPO).')
    .version(packageVersion(), '--version', 'print the version')
    .helpOption('-h, --help', 'print this page')
    .helpCommand('help [command]', 'print the options of a command, with defaults')
    .usage('<command> [options]')
    .exitOverride()
    .configureHelp({
      helpWidth: helpWidth(io),
      optionTerm: (option) => option.flags.replace(/[<>]/g, ''),
      subcommandTerm: (command) => command.name(),
    })
    .configureOutput({
      writeOut: (text) => void io.stdout.write(text),
      writeErr: (text) => void io.stderr.write(text),
      outputError: () => {},
    });
  for (const method of methods) addCommand(program, method, finish, io, work);
  return program;
}

/** How far into the commands a command line reached: `analyze theory` and its command. */
interface Reached {
  readonly command: Command;
  readonly path: string;
}

function reach(program: Command, argv: readonly string[]): Reached {
  const names: string[] = [];
  let command = program;
  for (const word of argv) {
    const child = command.commands.find((one) => one.name() === word);
    if (!child) break;
    names.push(word);
    command = child;
  }
  return { command, path: names.join(' ') };
}

/** The parser's complaints in our words, with the nearest name of any command. */
function explain(error: CommanderError, { command, path }: Reached): KeelgradError {
  const [, quoted = ''] = /'(.*?)'/.exec(error.message) ?? [];
  const flag = quoted.replace(/=.*/s, '').replace(/ .*/s, '');
  const method = methods.find((one) => one === path);
  const help = path ? `keelgrad ${path} --help` : 'keelgrad --help';
  switch (error.code) {
    case 'commander.unknownOption':
      return method ? unknownOption(method, flag) : new KeelgradError(`${flag} is no option of keelgrad; see ${help}`);
    case 'commander.unknownCommand': {
      const names = command.commands.map((one) => one.name());
      const nearest = suggest(quoted, names);
      const advice = nearest ? `did you mean ${nearest}?` : `see ${help}`;
      return new KeelgradError(`"${quoted}" is no command; expected one of ${names.join(', ')}; ${advice}`);
    }
    case 'commander.optionMissingArgument':
      return new KeelgradError(`${flag}: expected a value, found nothing; see ${help}`);
    case 'commander.excessArguments':
      return new KeelgradError(
        `expected options only, found ${show(command.args[0])}, which belongs to none; see ${help}`,
      );
    default:
      return new KeelgradError(error.message.replace(/^error: /, ''));
  }
}

function unknownOption(method: Method, flag: string): KeelgradError {
  const others = takesConfig(method) ? ['--config', '--help'] : ['--help'];
  const nearest = suggest(flag, [...optionsOf(method).map(flagOf), ...others]);
  if (nearest !== undefined && others.includes(nearest)) {
    return new KeelgradError(`${flag} is no option of keelgrad ${method}; did you mean ${nearest}?`);
  }
  try {
    const key = findOption(method, flag, flagNaming);
    return new KeelgradError(`${flag} is no option of keelgrad ${method}; did you mean ${flagOf(key)}?`);
  } catch (error) {
    if (error instanceof KeelgradError) return error;
    throw error;
  }
}

function report(error: unknown, io: CliIo): number {
  const message = error instanceof Error ? error.message : String(error);
  const wantsStack = !(error instanceof KeelgradError) || io.env.KEELGRAD_DEBUG === '1';
  const frames = wantsStack && error instanceof Error ? (/\n {4}at [\s\S]*/.exec(error.stack ?? '')?.[0] ?? '') : '';
  io.stderr.write(`error: ${message}${frames}\n`);
  return 1;
}

/**
 * Runs one command line and returns its exit code: 0, 1 after an error, 130 after Ctrl-C.
 * @param argv the arguments alone, without node and script.
 */
export async function main(argv: readonly string[], io: CliIo, work: Work = defaultWork): Promise<number> {
  let code = 0;
  const finish: Finish = async (run) => {
    code = await run();
  };
  const program = buildProgram(finish, io, work);
  try {
    await program.parseAsync([...argv], { from: 'user' });
    return code;
  } catch (error) {
    if (!(error instanceof CommanderError)) return report(error, io);
    // Help and version pages end in an exception too; the code says which; a bare `keelgrad` has printed its help.
    if (error.exitCode === 0 || error.code === 'commander.help') return error.exitCode;
    return report(explain(error, reach(program, argv)), io);
  }
}
