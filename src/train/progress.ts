// Progress of a run for people: a bar on a terminal, a few plain lines elsewhere.
// Must never be loaded by library code (it loads cli-progress), and prints nothing that scripts should parse.

import type { Metrics, RunStart, RunStep, TrainHooks } from './hooks.js';

/** Where progress goes: standard error, or a test's buffer. */
export interface ProgressStream {
  write(text: string): unknown;
  readonly isTTY?: boolean;
  readonly columns?: number;
}

export interface Progress extends Required<Pick<TrainHooks, 'onStart' | 'onStep' | 'onMessage' | 'onPhase'>> {
  /** Ends the bar. Must be called before anything else is printed. */
  stop(): void;
}

/** Metrics worth a look at every step, under short names, in this order. */
const shown: readonly (readonly [key: string, label: string, digits: number])[] = [
  ['loss', 'loss', 4],
  ['spo/sft_gap', 'gap', 5],
  ['logps/chosen', 'chosen', 2],
  ['logps/rejected', 'rejected', 2],
  ['rewards/margins', 'margin', 4],
  ['rewards/accuracies', 'acc', 2],
  ['mean_token_accuracy', 'token acc', 3],
  ['tokens_per_second', 'tok/s', 0],
];

/** Preference runs have accuracies of their own; a second one would only crowd the line. */
const isShown = (key: string, metrics: Metrics): boolean =>
  Number.isFinite(metrics[key]) && !(key === 'mean_token_accuracy' && 'rewards/accuracies' in metrics);

/** `loss 0.6931  chosen -42.10  ...`: fixed digits, so that columns stand still; the last ones go if `width` is short. */
export function formatMetrics(metrics: Metrics, width = Number.POSITIVE_INFINITY): string {
  let line = '';
  for (const [key, label, digits] of shown) {
    if (!isShown(key, metrics)) continue;
    const longer = `${line}${line && '  '}${label} ${metrics[key].toFixed(digits)}`;
    if (longer.length > width) break;
    line = longer;
  }
  return line;
}

/** `1:05`, `2:03:04`. */
export function formatDuration(seconds: number): string {
  const total = Math.max(0, Math.round(seconds));
  const [hours, minutes] = [Math.floor(total / 3600), Math.floor(total / 60) % 60];
  const tail = String(total % 60).padStart(2, '0');
  return hours > 0 ? `${hours}:${String(minutes).padStart(2, '0')}:${tail}` : `${minutes}:${tail}`;
}

function describeStart({ totalSteps, examples, dropped, trainableParameters, device }: RunStart): string {
  const count = (value: number, noun: string) => `${value.toLocaleString('en')} ${noun}${value === 1 ? '' : 's'}`;
  const parts = [count(totalSteps, 'step'), count(examples, 'record')];
  if (dropped > 0) parts.push(`${dropped.toLocaleString('en')} dropped (prompt fills --max-length)`);
  if (trainableParameters !== undefined) parts.push(count(trainableParameters, 'trained parameter'));
  if (device !== undefined) parts.push(device);
  return parts.join(', ');
}

/** Lines for logs: the first step, the last, and about twenty in between; phases at start and end. */
class LineProgress implements Progress {
  readonly #out: ProgressStream;
  readonly #startedAt = performance.now();
  #phase = '';

  constructor(out: ProgressStream) {
    this.#out = out;
  }

  onStart(info: RunStart): void {
    this.onMessage(describeStart(info));
  }

  onStep({ step, totalSteps, metrics }: RunStep): void {
    const stride = Math.max(1, Math.ceil(totalSteps / 20));
    if (step !== 1 && step !== totalSteps && step % stride !== 0) return;
    const elapsed = formatDuration((performance.now() - this.#startedAt) / 1000);
    this.onMessage(`step ${step}/${totalSteps}  ${formatMetrics(metrics)}  ${elapsed}`);
  }

  onMessage(text: string): void {
    this.#out.write(`${text}\n`);
  }

  onPhase(name: string, done: number, total: number): void {
    if (this.#phase !== name) this.onMessage(`${name} (${total.toLocaleString('en')})`);
    this.#phase = done >= total ? '' : name;
  }

  stop(): void {}
}

interface Bar {
  start(total: number, value: number, payload: object): void;
  update(value: number, payload: object): void;
  stop(): void;
}

/** Narrow terminals need their columns for the figures. */
const barSize = (out: ProgressStream): number => ((out.columns ?? 80) < 120 ? 8 : 20);

/** One bar at a time; messages stand above it. */
class BarProgress implements Progress {
  readonly #out: ProgressStream;
  readonly #newBar: () => Bar;
  #bar: Bar | undefined;
  #task = '';

  constructor(out: ProgressStream, newBar: () => Bar) {
    this.#out = out;
    this.#newBar = newBar;
  }

  onStart(info: RunStart): void {
    this.onMessage(describeStart(info));
  }

  onStep({ step, totalSteps, metrics }: RunStep): void {
    const taken = `step ${totalSteps}/${totalSteps} [] 10m30s  `.length + barSize(this.#out);
    this.#show('step', step, totalSteps, formatMetrics(metrics, (this.#out.columns ?? 80) - taken));
  }

  onPhase(name: string, done: number, total: number): void {
    this.#show(name, done, total, '');
    if (done >= total) this.stop();
  }

  onMessage(text: string): void {
    this.stop();
    this.#out.write(`${text}\n`);
  }

  stop(): void {
    this.#bar?.stop();
    this.#bar = undefined;
    this.#task = '';
  }

  #show(task: string, value: number, total: number, detail: string): void {
    if (this.#task !== task) {
      this.stop();
      this.#bar = this.#newBar();
      this.#bar.start(total, Math.max(0, value - 1), { task, detail });
      this.#task = task;
    }
    this.#bar?.update(value, { task, detail });
  }
}

/** A bar where `out` is a terminal, lines where it is a file or a pipe. */
export async function createProgress(out: ProgressStream): Promise<Progress> {
  if (!out.isTTY) return new LineProgress(out);
  const { default: cliProgress } = await import('cli-progress');
  const options = {
    format: '{task} {value}/{total} [{bar}] {eta_formatted}  {detail}',
    barsize: barSize(out),
    stream: out as NodeJS.WritableStream,
    hideCursor: true,
    etaBuffer: 20,
    gracefulExit: false,
  };
  return new BarProgress(out, () => new cliProgress.SingleBar(options, cliProgress.Presets.shades_classic));
}
