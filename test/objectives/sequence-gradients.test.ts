// Gradients of all sequences of a batch from one backward pass, against the recordings and against one sequence at a time.
import { describe, expect, it } from 'vitest';
import type { SequenceParameter } from '../../src/autograd/sequence-sinks.js';
import { AccumulatingSink } from '../../src/autograd/sinks.js';
import { packPairs, uploadBatch } from '../../src/data/packing.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import { accumulateSequenceGradients, RecordedGradients } from '../../src/objectives/sequence-gradients.js';
import { fill, zeros, zerosLike } from '../../src/ops/movement.js';
import { accumulationDType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { rowPerTarget, streamsOf } from '../../src/train/sequence-batch.js';
import { replaceGroups, tensorsOf } from '../../src/train/task.js';
import { describeWithShared } from '../shared.js';
import { norm, readTensors, relativeError, type Tensors } from '../train/support.js';
import {
  both,
  examplesOf,
  GOLDEN_SPO,
  gradientOf,
  groupPart,
  type ModelName,
  modelNames,
  namesOf,
  onHost,
  openSpoModel,
  type Precision,
  pairLogProbsOf,
  readSpo,
  spoFile,
} from './spo-support.js';

const overs = { all: ['backbone', 'adapters'], adapters: ['adapters'], backbone: ['backbone'] } as const;
type Over = keyof typeof overs;

/** A recorded pass over the first pairs of batch 0, and buffers for gradients of norms. */
function record(model: CausalLM, name: ModelName, count: number, coefficients?: number[][]) {
  const examples = examplesOf(name).slice(0, count);
  const variables = tensorsOf(model.parameters, both);
  const buffers = variables.map((t) => zerosLike(t));
  const first = variables.map((t) => zerosLike(t));
  const second = variables.map((t) => zerosLike(t));
  const names = namesOf(model);
  const packed = rowPerTarget(packPairs(examples));
  const dtype = accumulationDType(model.dtype);
  const recorded = scope(() => {
    const tensors = uploadBatch(packed, model.device, dtype);
    const streams = streamsOf(packed, 'pairs', tensors);
    const parameters = names.map(
      (key, i): SequenceParameter => ({
        name: key,
        group: i < model.backbone.size ? 'backbone' : 'adapters',
        first: coefficients ? first[i] : null,
        second: coefficients ? second[i] : null,
      }),
    );
    const problem = {
      variables,
      parameters,
      streams,
      secondCount: count,
      coefficients: () => {
        const given = coefficients
          ? Tensor.from(Float64Array.from(coefficients.flat()), { shape: [2, 2 * count], dtype })
          : zeros([2, 2 * count], { dtype });
        return new Map(both.map((group) => [group, given]));
      },
      forward: (values: readonly Tensor[]) =>
        model.logProbs(replaceGroups(model.parameters, both, values), tensors.ids, packed.layout, tensors.targets),
    };
    const sinks = buffers.map((t) => new AccumulatingSink(t));
    return { streams, recorded: new RecordedGradients(problem, sinks), problem, tensors };
  });
  const dispose = (): void => {
    recorded.recorded.dispose();
    recorded.streams.dispose();
    packed.layout.dispose();
    const { ids, targets, sequences, lengths } = recorded.tensors;
    for (const t of [...buffers, ...first, ...second, ids, ...Object.values(targets), sequences, lengths]) t.dispose();
  };
  return { ...recorded, buffers, first, second, names, dispose };
}

const cases = modelNames.flatMap((name) => (['float64', 'float32'] as const).map((dtype) => ({ name, dtype })));
const tolerances: Record<Precision, { norm: number; hvp: number; gradient: number }> = {
  float64: { norm: 1e-11, hvp: 1e-10, gradient: 1e-11 },
  float32: { norm: 1e-5, hvp: 1e-4, gradient: 1e-5 },
};

const squaresOver = (recorded: RecordedGradients<never>, over: Over): number[] => {
  const parts = overs[over].map((group) => recorded.squaredNorms.get(group)!.dataSync());
  return Array.from(parts[0], (_, i) => parts.reduce((n, p) => n + p[i], 0));
};

describeWithShared('sequences of a shared prompt', GOLDEN_SPO, () => {
  describe.each(cases)('$name in $dtype', ({ name, dtype }) => {
    const tolerance = tolerances[dtype];
    // The recording's order: pair 0 chosen, rejected, pair 1 chosen, rejected; ours: all chosen, all rejected.
    const place = [0, 2, 1, 3];

    it.each(Object.keys(overs) as Over[])('squared norms over %s', async (over) => {
      using model = await openSpoModel(name, dtype);
      const { recorded, dispose } = record(model, name, 2);
      const found = squaresOver(recorded as never, over);
      readSpo(name, 'packed.json').sequences.forEach(({ norm_sq }: { norm_sq: Record<Over, number> }, i: number) => {
        expect(Math.abs(found[place[i]] / norm_sq[over] - 1)).toBeLessThan(tolerance.norm);
      });
      dispose();
    });

    it.each((Object.keys(overs) as Over[]).flatMap((over) => [0, 1, 2, 3].map((i) => [over, i] as const)))(
      'H v over %s of sequence %i',
      async (over, i) => {
        using model = await openSpoModel(name, dtype);
        const { recorded, buffers, names, dispose } = record(model, name, 2);
        const squares = squaresOver(recorded as never, over);
        const only = squares.map((n, s) => (s === place[i] ? 0.5 / Math.sqrt(n) : 0));
        recorded.addSquareGradients(only, new Set(overs[over]));
        const found = onHost(names, buffers);
        const { hvp } = readSpo(name, 'packed.json').sequences[i];
        const { norm_sq, norm_sq_by_tensor } = hvp[over];
        const total = Math.sqrt(norm_sq.all);
        for (const group of both)
          expect(Math.abs(norm(groupPart(found, group)) / Math.sqrt(norm_sq[group]) - 1)).toBeLessThan(tolerance.hvp);
        for (const [key, value] of Object.entries(norm_sq_by_tensor as Record<string, number>)) {
          const error = Math.abs(norm(new Map([[key, found.get(key)!]])) - Math.sqrt(value));
          expect(error / total, key).toBeLessThan(tolerance.hvp);
        }
        if (i === 0 && over !== 'backbone') {
          const expected = await readTensors(spoFile(name, 'packed.safetensors'), `seq0/Hv_${over}/`);
          if (expected.size > 0) expect(relativeError(found, expected)).toBeLessThan(tolerance.hvp);
        }
        dispose();
      },
    );

    it('two gradients with coefficients of their own, with squares and without', async () => {
      using model = await openSpoModel(name, dtype);
      const coefficients = [
        [0.3, -0.7, 1.1, 0.2],
        [-0.5, 0.25, 0, 0],
      ];
      const expected = coefficients.map(
        (c) =>
          gradientOf(model, (p) => {
            const { chosen, rejected } = pairLogProbsOf(model, p, examplesOf(name).slice(0, 2));
            const weights = (part: number[]): Tensor => Tensor.from(Float64Array.from(part), { dtype });
            return chosen
              .mul(weights(c.slice(0, 2)))
              .sum()
              .add(rejected.mul(weights(c.slice(2))).sum());
          }).gradient,
      );
      const { first, second, names, problem, dispose } = record(model, name, 2, coefficients);
      const check = (): void =>
        [first, second].forEach((buffers, i) => {
          const found: Tensors = onHost(names, buffers);
          for (const group of both)
            expect(relativeError(groupPart(found, group), groupPart(expected[i], group))).toBeLessThan(
              tolerance.gradient,
            );
        });
      check();
      for (const t of [...first, ...second]) fill(t, 0);
      scope(() => void accumulateSequenceGradients(problem));
      check();
      dispose();
    });
  });

  it('leaves nothing behind', async () => {
    const start = memory().storages;
    {
      using model = await openSpoModel('qwen2', 'float32');
      const { recorded, problem, dispose } = record(model, 'qwen2', 2);
      scope(() => void accumulateSequenceGradients(problem));
      recorded.addSquareGradients([1, 1, 1, 1], new Set(['adapters']));
      dispose();
    }
    expect(memory().storages).toBe(start);
  });
});
