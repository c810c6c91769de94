// The GPU that the tests of this folder run on: the first that KEELGRAD_TEST_DEVICES names; where it names none, they skip.
// And a model whose shapes take the fast ways of the kernels: tensor cores, whole packs, a head of several chunks.
import { type Device, defaultDevice, setDefaultDevice } from '../../src/tensor/storage.js';
import { makeModelFolder } from '../fixtures/make.js';
import type { Given } from '../train/support.js';

const asked = (process.env.KEELGRAD_TEST_DEVICES ?? '').split(',').find((name) => name.startsWith('cuda'));

export const gpu = asked as Device | undefined;

/** What a skipped suite says of itself. */
export const needsGpu = 'needs a GPU: KEELGRAD_TEST_DEVICES=cuda';

/** Runs `f` with tensors on `device` where `f` names none. */
export async function onDevice<T>(device: Device, f: () => Promise<T>): Promise<T> {
  const before = defaultDevice();
  setDefaultDevice(device);
  try {
    return await f();
  } finally {
    setDefaultDevice(before);
  }
}

/** How many steps the long tests take: fewer where a GPU is imitated. */
export const stepsOr = (usual: number): number => Number(process.env.KEELGRAD_TEST_STEPS ?? usual);

const shape = {
  hidden_size: 128,
  intermediate_size: 256,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  num_hidden_layers: 2,
  vocab_size: 512,
  max_position_embeddings: 128,
};

/** A folder with two layers, two heads of 64 over one of keys, a vocabulary of 512. */
export const makeAlignedModel = (folder: string): Promise<string> =>
  makeModelFolder(folder, 'qwen2', { config: shape });

/** Options of short runs of each method. */
export const methods: readonly (readonly ['sft' | 'dpo' | 'spo', Given])[] = [
  ['sft', { train: 'full', 'learning-rate': 1e-3 }],
  ['dpo', { train: 'lora', 'learning-rate': 1e-3 }],
  ['spo', { 'learning-rate': 1e-3, lambda: 0.5, gamma: 0.1, 'lower-steps': 1, 'lower-learning-rate': 1e-3 }],
];
