// The analyses as `keelgrad analyze` runs them: from options to a written report. No mathematics and no charts of its own.
import type { PreferenceExample, PreparedData } from '../data/tokenize.js';
import { preparePreferenceData } from '../data/tokenize.js';
import { KeelgradError } from '../errors.js';
import { type LoadOptions, loadModel } from '../io/model-folder.js';
import { loadTokenizer, type Tokenizer } from '../io/tokenizer.js';
import type { Device } from '../tensor/storage.js';
import { isLive } from '../train/option-rules.js';
import { type Chosen, groups } from '../train/option-spec.js';
import {
  type Analysis,
  type AnalyzeOptions,
  type GivenOptions,
  type Method,
  optionsOf,
  specOf,
} from '../train/options.js';
import { applyThreads, resolveDevice } from '../train/setup.js';
import { type DynamicsOptions, dynamicsReport, followDynamics } from './dynamics.js';
import { followMass, type MassShiftOptions, massShiftReport } from './mass-shift.js';
import { type Report, writeReport } from './report.js';
import type { ModelSource, PreferenceMethod } from './runs.js';
import { sensitivityReport, sweep } from './sensitivity.js';
import { measureTerms } from './terms.js';
import { termsReport } from './terms-report.js';
import { analyzeTheory, checkTheoryOptions, type TheoryPair } from './theory.js';
import { theoryReport } from './theory-report.js';
import { toyFlow } from './toy.js';

export interface AnalysisHooks {
  readonly signal?: AbortSignal;
  onMessage?(text: string): void;
  onPhase?(name: string, done: number, total: number): void;
}

/** What was written, or nothing where the run was stopped before its end. */
export interface AnalysisOutcome {
  readonly page: string;
  readonly findings: readonly string[];
}

/** What all analyses start from. */
interface Ground {
  readonly device: Device;
  readonly hooks: AnalysisHooks;
  tokenizer(): Promise<Tokenizer>;
}

type Pairs = PreparedData<PreferenceExample>;

const some = (data: Pairs, from: number, to: number): Pairs => ({ ...data, examples: data.examples.slice(from, to) });

async function openPairs(
  { data: path, maxLength }: { data: string; maxLength?: number },
  { tokenizer, hooks }: Ground,
  others = false,
): Promise<Pairs> {
  const data = await preparePreferenceData(path, { tokenizer, maxLength, others });
  for (const warning of data.warnings) hooks.onMessage?.(warning);
  if (data.examples.length === 0) throw new KeelgradError(`${path}: expected preference pairs, found none`);
  return data;
}

type Setup = Pick<
  AnalyzeOptions<'terms'>,
  'model' | 'adapter' | 'dtype' | 'loraR' | 'loraAlpha' | 'loraTargets' | 'rslora' | 'seed'
>;

/** Fresh copies of the model with adapters: those of `--adapter`, or new ones. */
function sourceOf(options: Setup, ground: Ground): ModelSource {
  const { adapter, loraR: r, loraAlpha: alpha, loraTargets: targets, rslora, seed } = options;
  const settings: LoadOptions = { dtype: options.dtype, device: ground.device };
  if (adapter !== undefined) settings.adapter = adapter;
  else settings.lora = { r, alpha, targets, rslora, seed };
  return () => loadModel(options.model, settings);
}

/** Options that have had their effect by the time that a trainer sees the others. */
const spent: readonly string[] = ['model', 'data', 'output', 'adapter', 'device', 'threads', 'preset'];

/** All options of an analysis that its trainer has too, as far as they have a part there. */
function trainerOptions<M extends PreferenceMethod>(method: M, analysis: { method: Method }): GivenOptions<M> {
  const options = analysis as unknown as Chosen;
  const passed = optionsOf(method).filter(
    (key) =>
      options[key] !== undefined &&
      !spent.includes(key) &&
      specOf(key).group !== groups.lora &&
      isLive(key, options, analysis.method),
  );
  return Object.fromEntries(passed.map((key) => [key, options[key]])) as GivenOptions<M>;
}

/** Pairs to train on and pairs to look at: the file's last ones are kept from training where it has enough. */
function split(data: Pairs, probePairs: number): { train: Pairs; probe: readonly PreferenceExample[] } {
  const count = data.examples.length;
  if (count <= probePairs) return { train: data, probe: data.examples };
  return { train: some(data, 0, count - probePairs), probe: data.examples.slice(count - probePairs) };
}

/** Pairs with other responses, the record's own or the chosen one of the next record; and in words, which. */
function theoryPairs(examples: readonly PreferenceExample[], count: number): { pairs: TheoryPair[]; others?: string } {
  const used = examples.slice(0, count);
  const pairs = used.map((example, i): TheoryPair => {
    const next = examples[(i + 1) % examples.length];
    return { ...example, others: example.others ?? (next === example ? [] : [next.chosenIds]) };
  });
  const own = used.filter((example) => example.others).length;
  if (pairs.every((pair) => pair.others?.length === 0)) return { pairs };
  const next = 'the chosen response of the next record';
  if (own === 0) return { pairs, others: next };
  return {
    pairs,
    others: `the field “others” of ${own} of ${used.length} records${own < used.length ? `, else ${next}` : ''}`,
  };
}

async function theory(options: AnalyzeOptions<'theory'>, ground: Ground): Promise<Report> {
  const settings = {
    beta: options.beta,
    stepSizes: options.stepSizes,
    signal: ground.hooks.signal,
    onProgress: (done: number, total: number) => ground.hooks.onPhase?.('pairs', done, total),
  };
  checkTheoryOptions(settings); // before anything is read
  const { pairs, others } = theoryPairs((await openPairs(options, ground, true)).examples, options.pairs);
  using model = await loadModel(options.model, {
    dtype: options.dtype,
    device: ground.device,
    adapter: options.adapter,
  });
  const results = await analyzeTheory(model, pairs, settings);
  return theoryReport(results, settings, { model: options.model, dtype: options.dtype, others });
}

async function dynamics(options: AnalyzeOptions<'dynamics'>, ground: Ground): Promise<Report | undefined> {
  const { train, probe } = split(await openPairs(options, ground), options.pairs);
  const settings: DynamicsOptions = {
    dpo: trainerOptions('dpo', options),
    spo: trainerOptions('spo', options),
    every: options.every,
    gradientPairs: Math.min(options.gradientPairs, probe.length),
    emaDecay: options.emaDecay,
    signal: ground.hooks.signal,
    onProgress: (method, updates) => ground.hooks.onPhase?.(method, updates, options.maxSteps),
  };
  const results = await followDynamics(sourceOf(options, ground), train, probe, settings);
  return results && dynamicsReport(results, settings, { model: options.model, pairs: probe.length });
}

async function sensitivity(options: AnalyzeOptions<'sensitivity'>, ground: Ground): Promise<Report | undefined> {
  const { train, probe } = split(await openPairs(options, ground), options.pairs);
  const settings = {
    lambdas: options.lambdas,
    gammas: options.gammas,
    spo: trainerOptions('spo', options),
    gradientPairs: Math.min(options.gradientPairs, probe.length),
    signal: ground.hooks.signal,
    onProgress: (done: number, total: number) => ground.hooks.onPhase?.('runs', done, total),
  };
  const found = await sweep(sourceOf(options, ground), train, probe, settings);
  const facts = { model: options.model, pairs: probe.length, steps: options.maxSteps };
  return found && sensitivityReport(found, settings, facts);
}

async function terms(options: AnalyzeOptions<'terms'>, ground: Ground): Promise<Report | undefined> {
  const data = some(await openPairs(options, ground), 0, options.pairs);
  const settings = {
    lowerLearningRates: options.lowerLearningRates,
    lowerSteps: options.lowerStepCounts,
    lambdas: options.lambdas,
    gammas: options.gammas,
    spo: trainerOptions('spo', options),
    signal: ground.hooks.signal,
    onProgress: (done: number, total: number) => ground.hooks.onPhase?.('gradients', done, total),
  };
  using model = await sourceOf(options, ground)();
  const found = await measureTerms(model, data, settings);
  const facts = { model: options.model, pairs: data.examples.length, dtype: options.dtype };
  return found && termsReport(found, settings, facts);
}

/** The last number in a text, thousands separated or not; undefined where there is none. */
const lastNumber = (text: string): number | undefined => {
  const found = text.replace(/(\d),(?=\d{3}\b)/g, '$1').match(/-?\d+(\.\d+)?/g);
  return found ? Number(found[found.length - 1]) : undefined;
};

async function massShift(options: AnalyzeOptions<'mass-shift'>, ground: Ground): Promise<Report | undefined> {
  const right = lastNumber(options.answer);
  if (right === undefined)
    throw new KeelgradError(`--answer: expected a text with a number, found ${JSON.stringify(options.answer)}`);
  const tokenizer = await ground.tokenizer();
  const endId = tokenizer.eosToken?.id;
  if (endId === undefined)
    throw new KeelgradError(`${options.model}: the tokenizer has no end token; name another --model`);
  const chat = (role: string, content: string) => [{ role, content }];
  const templated = tokenizer.chatTemplate !== undefined;
  const record = templated
    ? { prompt: chat('user', options.prompt), chosen: chat('assistant', '1'), rejected: chat('assistant', '2') }
    : { prompt: options.prompt, chosen: '1', rejected: '2' };
  const { examples } = await preparePreferenceData([record], { tokenizer: async () => tokenizer });
  const decode = (ids: ArrayLike<number>): Promise<string> => tokenizer.decode(ids, { skipSpecialTokens: true });
  const settings: MassShiftOptions = {
    promptIds: examples[0].promptIds,
    endId,
    samples: options.samples,
    maxTokens: options.maxTokens,
    temperature: options.temperature,
    isPreferred: async (ids) => lastNumber(await decode(ids)) === right,
    perSet: options.perSet,
    dpo: trainerOptions('dpo', options),
    spo: trainerOptions('spo', options),
    every: options.every,
    seed: options.seed,
    signal: ground.hooks.signal,
    onSampled: (done, total) => ground.hooks.onPhase?.('samples', done, total),
    onProgress: (method, updates) => ground.hooks.onPhase?.(method, updates, options.maxSteps),
  };
  const shift = await followMass(sourceOf(options, ground), settings);
  if (!shift) return undefined;
  const texts = await Promise.all(shift.responses.map((r) => decode(r.ids)));
  const facts = { model: options.model, prompt: options.prompt, texts };
  return massShiftReport(shift, settings, facts, await toyFlow(options));
}

const analysesByName: {
  readonly [A in Analysis]: (options: AnalyzeOptions<A>, ground: Ground) => Promise<Report | undefined>;
} = { theory, dynamics, 'mass-shift': massShift, sensitivity, terms };

/** Runs one analysis; writes nothing. Undefined where the signal ended it early. */
export async function makeReport<A extends Analysis>(
  name: A,
  options: AnalyzeOptions<A>,
  hooks: AnalysisHooks = {},
): Promise<Report | undefined> {
  const { threads, device: wanted, model } = options as unknown as AnalyzeOptions<'theory'>;
  applyThreads(threads);
  const device = resolveDevice(wanted, hooks.onMessage);
  let tokenizer: Promise<Tokenizer> | undefined;
  const ground = {
    device,
    hooks,
    tokenizer: () => {
      tokenizer ??= loadTokenizer(model);
      return tokenizer;
    },
  };
  const report = await analysesByName[name](options, ground);
  return hooks.signal?.aborted ? undefined : report;
}

/** Runs one analysis and writes its report; undefined where the signal ended it early. */
export async function runAnalysis<A extends Analysis>(
  name: A,
  options: AnalyzeOptions<A>,
  hooks: AnalysisHooks = {},
): Promise<AnalysisOutcome | undefined> {
  const report = await makeReport(name, options, hooks);
  if (!report) return undefined;
  const { output } = options as unknown as AnalyzeOptions<'theory'>;
  return { page: await writeReport(output, report), findings: report.findings };
}
