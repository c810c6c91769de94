// `keelgrad score`: log-probabilities of the responses of a preference file under a model.
import { join } from 'node:path';
import type { PreferenceExample } from '../data/tokenize.js';
import { loadModel } from '../io/model-folder.js';
import { readModelConfig } from '../models/config.js';
import { scorePairs } from './batch-source.js';
import type { ScoreHooks, ScoreSummary } from './hooks.js';
import type { ResolvedScoreOptions } from './options.js';
import { applyThreads, openData, resolveDevice } from './setup.js';

const scored = (ids: Int32Array, prompt: Int32Array): number => ids.length - (prompt.length === 0 ? 1 : 0);

/** Scores every record in the order of the file. */
export async function scoreFile(options: ResolvedScoreOptions, hooks: ScoreHooks): Promise<ScoreSummary> {
  applyThreads(options.threads);
  const notes: string[] = []; // said once the inputs are known good: bad input gets one message
  const device = resolveDevice(options.device, (text) => notes.push(text));
  const config = await readModelConfig(join(options.model, 'config.json'));
  const data = await openData(options, config.vocabSize, hooks);
  const examples = data.examples as readonly PreferenceExample[];
  using model = await loadModel(options.model, { dtype: options.dtype, device, adapter: options.adapter });
  for (const note of notes) hooks.onMessage?.(note);
  let records = 0;
  for (let start = 0; start < examples.length && !hooks.signal?.aborted; start += options.batchSize) {
    const part = examples.slice(start, start + options.batchSize);
    const { chosen, rejected } = await scorePairs(model, model.parameters, part, { batchSize: options.batchSize });
    part.forEach((example, i) => {
      records++;
      hooks.onRecord({
        index: example.index,
        chosen_logps: chosen[i],
        rejected_logps: rejected[i],
        chosen_tokens: scored(example.chosenIds, example.promptIds),
        rejected_tokens: scored(example.rejectedIds, example.promptIds),
        margin: chosen[i] - rejected[i],
      });
    });
  }
  const { promptTooLong, noTarget } = data.dropped;
  return { records, dropped: promptTooLong + noTarget, interrupted: hooks.signal?.aborted ?? false };
}
