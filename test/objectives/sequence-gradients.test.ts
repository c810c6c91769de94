// Gradients of all sequences of a batch from one backward pass, against the recordings and against one sequence at a time.
import { describe, expect, it } from 'vitest';
import { SequenceGradient } from '../../src/analyze/sequences.js';
import type { SequenceParameter } from '../../src/autograd/sequence-sinks.js';
import { AccumulatingSink } from '../../src/autograd/sinks.js';
import { packPairs, uploadBatch } from '../../src/data/packing.js';
import type { CausalLM } from '../../src/models/causal-lm.js';
import {
  accumulateSequenceGradients,
  measureSequenceGradients,
  RecordedGradients,
} from '../../src/objectives/sequence-gradients.js';
import { fill, zeros, zerosLike } from '../../src/ops/movement.js';
import { accumulationDType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { pairsOf, rowPerTarget, streamsOf } from '../../src/train/sequence-batch.js';
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

interface Wanted {
  readonly coefficients?: number[][];
  /** The first pair. */
  readonly from?: number;
  /** Squares of each parameter apart, in place of those by group. */
  readonly byTensor?: boolean;
  /** The two sequences of each pair together, with their inner products. */
  readonly byPair?: boolean;
}

/** A recorded pass over the first pairs of batch 0, and buffers for gradients of norms. */
function record(
  model: CausalLM,
  name: ModelName,
  count: number,
  { coefficients, from = 0, byTensor = false, byPair = false }: Wanted = {},
) {
  const examples = examplesOf(name).slice(from, from + count);
  const variables = tensorsOf(model.parameters, both);
  const buffers = variables.map((t) => zerosLike(t));
  const first = variables.map((t) => zerosLike(t));
  const second = variables.map((t) => zerosLike(t));
  const names = namesOf(model);
  const pairs = packPairs(examples);
  const groups = byPair ? pairsOf(pairs) : undefined;
  const packed = rowPerTarget(pairs, groups?.flat());
  const dtype = accumulationDType(model.dtype);
  const recorded = scope(() => {
    const tensors = uploadBatch(packed, model.device, dtype);
    const streams = streamsOf(packed, 'pairs', tensors, groups);
    const parameters = names.map(
      (key, i): SequenceParameter => ({
        name: key,
        group: byTensor ? key : i < model.backbone.size ? 'backbone' : 'adapters',
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
        return new Map((byTensor ? names : both).map((group) => [group, given]));
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
const tolerances: Record<Precision, { logp: number; norm: number; hvp: number; gradient: number }> = {
  float64: { logp: 1e-11, norm: 1e-11, hvp: 1e-10, gradient: 1e-11 },
  float32: { logp: 1e-4, norm: 1e-5, hvp: 1e-4, gradient: 1e-5 },
};

const byMax1 = (found: number, expected: number): number =>
  Math.abs(found - expected) / Math.max(1, Math.abs(expected));

/** log π and its gradient for each sequence of the first two pairs, one at a time: pair 0 chosen, rejected, pair 1. */
const pairGradients = (model: CausalLM, name: ModelName) =>
  examplesOf(name)
    .slice(0, 2)
    .flatMap((example) =>
      (['chosen', 'rejected'] as const).map((half) =>
        gradientOf(model, (p) => pairLogProbsOf(model, p, [example])[half].reshape([])),
      ),
    );

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

    it('log-probabilities, gradients, and squared norms by tensor', async () => {
      using model = await openSpoModel(name, dtype);
      const { recorded, names, dispose } = record(model, name, 2, { byTensor: true });
      const { sequences } = readSpo(name, 'packed.json');
      const found = pairGradients(model, name);
      for (const [i, { logp, norm_sq, norm_sq_by_tensor }] of sequences.entries()) {
        expect(Math.abs(found[i].value - logp)).toBeLessThan(tolerance.logp);
        expect([...names].sort()).toEqual(Object.keys(norm_sq_by_tensor).sort());
        for (const [key, square] of Object.entries(norm_sq_by_tensor as Record<string, number>)) {
          const batched = recorded.squaredNorms.get(key)!.dataSync()[place[i]];
          expect(Math.abs(batched - square) / norm_sq.all, key).toBeLessThan(tolerance.norm);
          const alone = norm(new Map([[key, found[i].gradient.get(key)!]])) ** 2;
          expect(Math.abs(alone - square) / norm_sq.all, key).toBeLessThan(tolerance.norm);
        }
      }
      const g = await readTensors(spoFile(name, 'packed.safetensors'), 'seq0/g/');
      expect(g.size).toBe(names.length);
      for (const group of both)
        expect(relativeError(groupPart(found[0].gradient, group), groupPart(g, group))).toBeLessThan(
          tolerance.gradient,
        );
      dispose();
    });

    it('inner products of all sequences, and of the two of a pair from one pass', async () => {
      using model = await openSpoModel(name, dtype);
      const { gram, order } = readSpo(name, 'packed.json');
      expect(order).toEqual(['pair 0 chosen', 'pair 0 rejected', 'pair 1 chosen', 'pair 1 rejected']);
      const gradients = examplesOf(name)
        .slice(0, 2)
        .flatMap(({ promptIds, chosenIds, rejectedIds }) => [
          { promptIds, responseIds: chosenIds },
          { promptIds, responseIds: rejectedIds },
        ]);
      for (const over of Object.keys(overs) as Over[]) {
        const expected: number[][] = gram[over];
        const size = (i: number, j: number): number => Math.sqrt(expected[i][i] * expected[j][j]);
        const found = gradients.map((sequence) => SequenceGradient.of(model, sequence, overs[over]));
        for (const [i, row] of expected.entries())
          for (const [j, value] of row.entries()) {
            const inner = await found[i].dot(found[j]);
            expect(Math.abs(inner - value) / size(i, j), `${over} ${i} ${j}`).toBeLessThan(tolerance.norm);
          }
        for (const g of found) g.dispose();
        for (const pair of [0, 1]) {
          const { recorded, dispose } = record(model, name, 1, { from: pair, byPair: true });
          const inner = overs[over].reduce((n, group) => n + recorded.innerProducts.get(group)!.dataSync()[0], 0);
          const [w, l] = [2 * pair, 2 * pair + 1];
          expect(Math.abs(inner - expected[w][l]) / size(w, l), `${over}, pair ${pair}`).toBeLessThan(tolerance.norm);
          dispose();
        }
      }
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
        const { norm_sq, norm_sq_by_tensor, v_dot_Hv } = hvp[over];
        const total = Math.sqrt(norm_sq.all);
        for (const group of both)
          expect(Math.abs(norm(groupPart(found, group)) / Math.sqrt(norm_sq[group]) - 1)).toBeLessThan(tolerance.hvp);
        for (const [key, value] of Object.entries(norm_sq_by_tensor as Record<string, number>)) {
          const error = Math.abs(norm(new Map([[key, found.get(key)!]])) - Math.sqrt(value));
          expect(error / total, key).toBeLessThan(tolerance.hvp);
        }
        const g = pairGradients(model, name)[i].gradient;
        const inSet = [...g].filter(([key]) => over === 'all' || groupPart(found, over).has(key));
        const gHv = inSet.reduce((n, [key, v]) => n + v.reduce((m, x, k) => m + x * found.get(key)![k], 0), 0);
        expect(Math.abs(gHv / norm(new Map(inSet)) - v_dot_Hv) / total).toBeLessThan(tolerance.hvp);
        if (i === 0 && over !== 'backbone') {
          const expected = await readTensors(spoFile(name, 'packed.safetensors'), `seq0/Hv_${over}/`);
          expect(expected.size).toBe(names.length);
          expect(relativeError(found, expected)).toBeLessThan(tolerance.hvp);
        }
        dispose();
      },
    );

    it('squares, inner products and H v of several pairs, the two of each together', async () => {
      using model = await openSpoModel(name, dtype);
      const [one, pairs] = [record(model, name, 4), record(model, name, 4, { byPair: true })];
      for (const group of both) {
        const [expected, found] = [one, pairs].map((r) => r.recorded.squaredNorms.get(group)!.dataSync());
        found.forEach((n, s) => {
          expect(Math.abs(n / expected[s] - 1)).toBeLessThan(tolerance.norm);
        });
      }
      expect(one.recorded.innerProducts.size).toBe(0);
      const { inner } = readSpo(name, 'eval.json').geometry.all;
      const found = both.map((group) => pairs.recorded.innerProducts.get(group)!.dataSync());
      inner.forEach((expected: number, i: number) => {
        expect(byMax1(found[0][i] + found[1][i], expected)).toBeLessThan(10 * tolerance.norm);
      });
      const coefficients = [0.1, -0.2, 0, 0.4, 0.05, 0, -0.3, 0.2];
      for (const { recorded } of [one, pairs]) recorded.addSquareGradients(coefficients, new Set(both));
      const [expected, hvp] = [one, pairs].map(({ names, buffers }) => onHost(names, buffers));
      expect(relativeError(hvp, expected)).toBeLessThan(tolerance.hvp);
      for (const { dispose } of [one, pairs]) dispose();
    });

    it('squares and inner products from a pass that records nothing', async () => {
      using model = await openSpoModel(name, dtype);
      const { recorded, problem, dispose } = record(model, name, 3, { byPair: true });
      scope(() => {
        const plain = measureSequenceGradients(problem);
        for (const kind of ['squaredNorms', 'innerProducts'] as const)
          for (const group of both) {
            const expected = recorded[kind].get(group)!.dataSync();
            plain[kind]
              .get(group)!
              .dataSync()
              .forEach((value, i) => {
                expect(byMax1(value, expected[i]), `${kind} of ${group}`).toBeLessThan(tolerance.norm);
              });
          }
      });
      dispose();
    });

    it.each([false, true])(
      'two gradients with coefficients of their own, with squares and without (by pair: %s)',
      async (byPair) => {
        using model = await openSpoModel(name, dtype);
        // The second takes the chosen ones alone, whatever it is given for others.
        const coefficients = [
          [0.3, -0.7, 1.1, 0.2],
          [-0.5, 0.25, 7, -9],
        ];
        const expected = coefficients.map(
          (c, which) =>
            gradientOf(model, (p) => {
              const { chosen, rejected } = pairLogProbsOf(model, p, examplesOf(name).slice(0, 2));
              const weights = (part: number[]): Tensor => Tensor.from(Float64Array.from(part), { dtype });
              return chosen
                .mul(weights(c.slice(0, 2)))
                .sum()
                .add(rejected.mul(weights(which === 1 ? [0, 0] : c.slice(2))).sum());
            }).gradient,
        );
        const { first, second, names, problem, dispose } = record(model, name, 2, { coefficients, byPair });
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
      },
    );
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
