// TRL's two trajectories from text on MiniMind2-Small: chat template, dropped and cut rows, all parameters of a real model.
import { expect, it } from 'vitest';
import type { TrainMethod } from '../../src/train/options.js';
import { describeWithShared, readSharedJson, sharedPath } from '../shared.js';
import {
  expectSummary,
  GOLDEN_TRAINING,
  metricErrors,
  optionsFor,
  type Run,
  savedModel,
  temporaryFolder,
  train,
} from './support.js';

const MODEL = 'data/models/minimind2-small/hf';

interface TextRow {
  readonly prompt: readonly object[];
  readonly chosen: string;
}

describeWithShared('recorded trajectories from text', MODEL, () => {
  const folder = temporaryFolder();
  const run = (method: TrainMethod): Promise<Run> => {
    const rows: TextRow[] = readSharedJson(GOLDEN_TRAINING, 'data_text.json');
    const records = method === 'dpo' ? rows : rows.map(({ prompt, chosen }) => ({ prompt, completion: chosen }));
    const options = optionsFor(`text_${method}`, folder.write(`${method}.json`, records));
    return train(method, { ...options, model: sharedPath(MODEL) });
  };

  it.each(['sft', 'dpo'] as const)(
    'text_%s in float64',
    async (method) => {
      const name = `text_${method}`;
      const done = await run(method);
      const { steps } = readSharedJson(GOLDEN_TRAINING, name, 'log_float64.json');
      for (const [metric, error] of Object.entries(metricErrors(done.metrics, steps)))
        expect(error, metric).toBeLessThan(1e-11);
      const { final_float64 } = readSharedJson(GOLDEN_TRAINING, name, 'weights_summary.json');
      expectSummary(await savedModel(done.result.output), final_float64, 1e-9);
      expect(done.messages).toContain('dropped 1 records whose prompt alone fills max length 128');
      expect(done.messages).toContain('cut 3 records to max length 128');
    },
    300_000,
  );
});
