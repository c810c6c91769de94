// Progress for people: what a line shows, how it fits a terminal, and that logs stay short.

import { describe, expect, it } from 'vitest';
import { createProgress, formatDuration, formatMetrics } from '../../src/train/progress.js';

const escapeCode = String.fromCharCode(27);
const terminalCode = new RegExp(`${escapeCode}\\[[^a-zA-Z]*[a-zA-Z]|${escapeCode}[78]`);

const preference = {
  loss: 0.69304,
  'rewards/margins': 0.125,
  'rewards/accuracies': 0.75,
  'logps/chosen': -42.104,
  'logps/rejected': -40,
  mean_token_accuracy: 0.5,
  grad_norm: 3,
  tokens_per_second: 511.6,
};

describe('formatMetrics', () => {
  it('shows the metrics that matter, in one order', () => {
    expect(formatMetrics(preference)).toBe(
      'loss 0.6930  chosen -42.10  rejected -40.00  margin 0.1250  acc 0.75  tok/s 512',
    );
    expect(formatMetrics({ loss: 2, mean_token_accuracy: 0.5 })).toBe('loss 2.0000  token acc 0.500');
  });

  it('leaves out what is missing or not finite, and what does not fit', () => {
    expect(formatMetrics({ loss: Number.NaN, tokens_per_second: 5 })).toBe('tok/s 5');
    expect(formatMetrics(preference, 30)).toBe('loss 0.6930  chosen -42.10');
  });
});

it('formats durations', () => {
  expect([0.4, 65, 3723].map(formatDuration)).toStrictEqual(['0:00', '1:05', '1:02:03']);
});

describe('createProgress', () => {
  it('draws a bar on a terminal, within its width, with messages above it', async () => {
    let text = '';
    const out = { write: (part: string) => (text += part), isTTY: true, columns: 80, cursorTo: () => {} };
    const progress = await createProgress(
      Object.assign(out, { on: () => out, once: () => out, removeListener: () => out }),
    );
    progress.onStep({ step: 1, totalSteps: 1000, metrics: preference });
    progress.onMessage('careful');
    progress.onPhase('reference log-probabilities', 3, 3);
    progress.onStep({ step: 1000, totalSteps: 1000, metrics: preference });
    progress.stop();
    expect(text).toContain('careful\n');
    expect(text).toContain('reference log-probabilities 3/3');
    const printable = text.split(terminalCode).flatMap((part) => part.split('\n'));
    const last = printable.filter((line) => line.startsWith('step 1000/1000')).at(-1);
    expect(last).toContain('loss 0.6930  chosen -42.10');
    expect(Math.max(...printable.map((line) => line.length))).toBeLessThanOrEqual(80);
  });

  it('prints about twenty lines elsewhere', async () => {
    let text = '';
    const progress = await createProgress({ write: (part) => (text += part) });
    for (let step = 1; step <= 999; step++) progress.onStep({ step, totalSteps: 999, metrics: preference });
    progress.stop();
    const lines = text.trimEnd().split('\n');
    expect(lines.length).toBeLessThan(23);
    expect([lines[0], lines.at(-1)]).toStrictEqual([
      expect.stringMatching(/^step 1\/999 {2}loss/),
      expect.stringMatching(/^step 999\/999 {2}loss/),
    ]);
  });
});
