// `keelgrad demo`: progress around the two runs, then what they did, as a table, charts and a comparison with the paper.
// Contains no training and no numbers of its own.
import { conclude, describeCharts, describeFindings, describeTable } from '../demo/report.js';
import { type DemoHooks, type DemoOutcome, trainBoth } from '../demo/run.js';
import { type DemoSettings, defaultSettings, paper } from '../demo/settings.js';
import type { DemoOptions, ResolvedTrainOptions } from '../train/options.js';
import { createProgress, formatDuration } from '../train/progress.js';
import type { DemoContext } from './io.js';

const introduction = ({ steps, batchSize, heldOut, rateFactor }: DemoSettings): string =>
  `A small model, trained by this engine on word problems, learns from pairs of answers: a right one
(chosen) and a wrong one of its own (rejected). DPO and SPO start from the same weights, train the same
parameters (backbone and adapter) on the same ${steps} batches of ${batchSize} pairs, and are measured on the same
${heldOut} pairs that neither is trained on. Settings are the paper's for GSM8K (beta ${paper.beta}, lambda ${paper.lambda}, K ${paper.lowerSteps}),
all learning rates times ${rateFactor}, as its models are about 700 times larger; gamma is 0, the paper names none.

`;

const describeMethod = (options: ResolvedTrainOptions): string => {
  if (options.method === 'spo')
    return `SPO: beta ${options.beta}, lambda ${options.lambda}, gamma ${options.gamma}, K ${options.lowerSteps}, alpha ${options.lowerLearningRate}, learning rates ${options.learningRateBackbone}`;
  return options.method === 'dpo' ? `DPO: beta ${options.beta}, learning rate ${options.learningRate}` : '';
};

function describeOutcome({ results, findings }: DemoOutcome, columns: number, output: string): string {
  return [
    '\nMean log-probability of held-out answers (nats, summed over the tokens of an answer)\n\n',
    describeTable(results),
    '\nChange against the start, over the steps\n\n',
    describeCharts(results, columns),
    '\nWhat the paper reports, and the same quantity here (± two standard errors over the held-out pairs)\n\n',
    describeFindings(findings),
    `\n${conclude(findings)}`,
    'With gamma 0, SPO moves the backbone by the gradient of DPO plus lambda times that of SFT; its lower level\n' +
      'acts on the adapter alone.\n',
    `\nsaved in ${output}: demo.svg (chart), demo.csv (curves), demo.json, and the two runs (dpo/, spo/)\n`,
  ].join('');
}

/** Runs the demo; `settings` are for tests. */
export async function runDemo(
  options: DemoOptions,
  { stdout, stderr, signal }: DemoContext,
  settings: DemoSettings = defaultSettings,
): Promise<void> {
  const startedAt = performance.now();
  stdout.write(introduction(settings));
  const progress = await createProgress(stderr);
  const hooks: DemoHooks = {
    signal,
    onMethod: (_, training) => progress.onMessage(describeMethod(training)),
    onMethodEnd: () => progress.stop(),
    onStart: (info) => progress.onStart(info),
    onStep: (step) => progress.onStep(step),
    onMessage: (text) => progress.onMessage(text),
    onPhase: (name, done, total) => progress.onPhase(name, done, total),
  };
  try {
    const outcome = await trainBoth(options, settings, hooks);
    progress.stop();
    if (!outcome) return void stdout.write(`stopped early; what was trained is in ${options.output}\n`);
    stdout.write(describeOutcome(outcome, stdout.columns ?? 80, options.output));
    stdout.write(`took ${formatDuration((performance.now() - startedAt) / 1000)}\n`);
  } finally {
    progress.stop();
  }
}
