// The command line: commands and flags out of the option table, dispatch, errors as one line, exit codes.
// Thin: it parses, validates and calls; no option is named here but --config.

import { Command, CommanderError, Option } from 'commander';
import { KeelgradError, show, suggest } from '../errors.js';
import {
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
    example: 'keelgrad spo --model runs/sft/model --data pairs.jsonl --output runs/spo --lambda 1 --gamma 0.1',
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

const takesConfig = (method: Method): boolean => ['sft', 'dpo', 'spo'].includes(method);

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
  const command = program.command(method).summary(spec.summary).description(spec.about);
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

/** The parser's complaints in our words, with the nearest name of any command. */
function explain(error: CommanderError, method: Method | undefined, words: readonly string[]): KeelgradError {
  const [, quoted = ''] = /'(.*?)'/.exec(error.message) ?? [];
  const flag = quoted.replace(/=.*/s, '').replace(/ .*/s, '');
  const help = method ? `keelgrad ${method} --help` : 'keelgrad --help';
  switch (error.code) {
    case 'commander.unknownOption':
      return method ? unknownOption(method, flag) : new KeelgradError(`${flag} is no option of keelgrad; see ${help}`);
    case 'commander.unknownCommand': {
      const nearest = suggest(quoted, methods);
      const advice = nearest ? `did you mean ${nearest}?` : `see ${help}`;
      return new KeelgradError(`"${quoted}" is no command; expected one of ${methods.join(', ')}; ${advice}`);
    }
    case 'commander.optionMissingArgument':
      return new KeelgradError(`${flag}: expected a value, found nothing; see ${help}`);
    case 'commander.excessArguments':
      return new KeelgradError(`expected options only, found ${show(words[0])}, which belongs to none; see ${help}`);
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
    const command = program.commands.find((one) => one.name() === argv[0]);
    return report(explain(error, command?.name() as Method | undefined, command?.args ?? []), io);
  }
}
