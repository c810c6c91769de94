// What the demo trains with, and where its model and data lie. Numbers only; the reasons stand beside them.
import { join } from 'node:path';
import { packageRoot } from '../package-root.js';
import { spoPresets } from '../train/presets.js';

/** The committed model and data, beside dist/ in the package and beside src/ in a checkout. */
export const assetsFolder = join(packageRoot(), 'assets', 'demo');
export const assets = {
  model: join(assetsFolder, 'model'),
  pairs: join(assetsFolder, 'pairs_train.jsonl'),
  heldOut: join(assetsFolder, 'pairs_heldout.jsonl'),
};

const { beta, lambda, lowerSteps, learningRate, lowerLearningRate } = spoPresets.paper;
/** The paper's settings for GSM8K with models of 0.5 B parameters (its table 1). */
export const paper = { beta, lambda, lowerSteps, learningRate, lowerLearningRate } as const;

export interface DemoSettings {
  steps: number;
  batchSize: number;
  /** Updates between two looks at the held-out pairs. */
  evaluateEvery: number;
  /** Held-out pairs that are looked at; the file's first. */
  heldOut: number;
  /** One factor for all learning rates of the paper: a model a thousand times smaller hardly moves at them. */
  rateFactor: number;
}

export const defaultSettings: DemoSettings = {
  steps: 300,
  batchSize: 4,
  evaluateEvery: 20,
  heldOut: 200,
  rateFactor: 10,
};

export type DemoMethod = 'dpo' | 'spo';
export const demoMethods: readonly DemoMethod[] = ['dpo', 'spo'];

/**
 * Options of a run. DPO trains what SPO trains, the backbone and an adapter, at the same rates: the objective is all that
 * differs. What is not named here is the commands' default.
 */
export function trainingOptions(method: DemoMethod, { steps, batchSize, rateFactor }: DemoSettings) {
  const common = {
    model: assets.model,
    data: assets.pairs,
    device: 'cpu',
    maxSteps: steps,
    batchSize,
    beta: paper.beta,
    learningRate: paper.learningRate * rateFactor,
  };
  if (method === 'dpo') return { ...common, train: 'both' };
  const { lambda, lowerSteps, lowerLearningRate } = paper;
  return { ...common, lambda, gamma: 0, lowerSteps, lowerLearningRate: lowerLearningRate * rateFactor };
}
