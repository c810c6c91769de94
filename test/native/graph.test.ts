// Captured functions: a replay gives the bits that running the function anew would give, whatever else happened in between;
// its memory is its own; errors surface as ever; nothing is left when it goes.
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { valueAndGrad } from '../../src/autograd/transforms.js';
import type { ModelConfig } from '../../src/models/config.js';
import { createModel } from '../../src/models/initialize.js';
import { addon } from '../../src/native/addon.js';
import { captureGraph, type Graph } from '../../src/native/graph.js';
import { addInPlace } from '../../src/ops/elementwise.js';
import { cast, clone, copyInto, full, gatherLast, scatterRows } from '../../src/ops/movement.js';
import { SegmentLayout } from '../../src/ops/segments.js';
import { clipFactor, nonFinite, sumOfSquares } from '../../src/optim/clip.js';
import { Optimizer, type OptimizerOptions } from '../../src/optim/optimizer.js';
import type { DType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { memory, setDefaultDevice, streamOf, synchronize, trimMemory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { testDevices } from '../support/devices.js';

const numbers = (count: number, seed: number): Float32Array =>
  Float32Array.from({ length: count }, (_, i) => Math.sin(seed + 1.7 * i));
const ints = (...values: number[]): Tensor => Tensor.from(Int32Array.from(values));

/** All bytes, to compare bit for bit. */
const bits = (t: Tensor): Promise<string> => t.bytes().then((b) => Buffer.from(b).toString('base64'));
const allBits = (tensors: readonly Tensor[]): Promise<string[]> => Promise.all(tensors.map(bits));

const config: ModelConfig = {
  architecture: 'qwen2',
  hiddenSize: 64,
  intermediateSize: 96,
  layers: 1,
  heads: 2,
  kvHeads: 1,
  headDim: 32,
  vocabSize: 40,
  maxPositions: 32,
  rmsNormEps: 1e-6,
  ropeTheta: 10_000,
  ropeScaling: null,
  tieWordEmbeddings: true,
  qkvBias: true,
  oBias: false,
  mlpBias: false,
  eosTokenIds: [1],
  bosTokenId: null,
  padTokenId: null,
  initializerRange: 0.2,
  dtype: null,
  raw: {},
};

describe.each(testDevices())('on %s', (device) => {
  let before = { storages: 0, allocated: 0 };
  beforeAll(() => setDefaultDevice(device));
  afterAll(() => setDefaultDevice('cpu'));
  beforeEach(() => {
    const { storages, allocated } = memory();
    before = { storages, allocated };
  });
  afterEach(() => expect(memory()).toMatchObject(before));

  // Guard zones are filled by the host, kernel by kernel.
  const hasGraphs = device !== 'cpu' && process.env.KEELGRAD_GUARDS !== '1';
  /** Every replay ran as one graph of the device, where it has such a thing. */
  function expectOnDevice(graph: Graph, replays: number): void {
    synchronize();
    expect(graph.counts()).toMatchObject({ replays, onDevice: hasGraphs ? replays : 0 });
  }

  test('the capture is the first run; a replay runs on what the tensors hold by then', () => {
    using x = Tensor.from([1, 2, 3]);
    using graph = captureGraph(() => x.mul(2).add(1));
    expect([...graph.result.dataSync()]).toEqual([3, 5, 7]);
    x.write([10, 20, 30]);
    expect([...graph.result.dataSync()]).toEqual([3, 5, 7]);
    graph.replay();
    expect([...graph.result.dataSync()]).toEqual([21, 41, 61]);
    expect(graph.counts().launches).toBe(2);
    expectOnDevice(graph, 1);
  });

  test('reads are in order with replays', async () => {
    using x = Tensor.from([0]);
    using graph = captureGraph(() => x.add(1));
    const reads: Promise<ArrayLike<number>>[] = [];
    for (let i = 1; i <= 20; i++) {
      x.write([i]);
      graph.replay();
      reads.push(graph.result.data());
    }
    expect((await Promise.all(reads)).map((r) => r[0])).toEqual(Array.from({ length: 20 }, (_, i) => i + 2));
  });

  describe('a transformer, forward and backward', () => {
    test.each<DType>(['float32', 'bfloat16'])('in %s, on other tokens and with other weights', async (dtype) => {
      using model = createModel(config, { seed: 3, device });
      const weights = new Map([...model.backbone].map(([name, t]) => [name, cast(t, dtype)]));
      using layout = new SegmentLayout([{ length: 5 }, { length: 6, parent: 0 }, { length: 9, parent: 0 }]);
      using ids = ints(...Array.from({ length: 20 }, (_, i) => (7 * i) % 40));
      using targets = ints(...Array.from({ length: 20 }, (_, i) => (3 * i + 1) % 40));
      const gradient = valueAndGrad((backbone: Map<string, Tensor>) => {
        const logits = model.logits({ ...model.parameters, backbone }, ids, layout);
        return gatherLast(cast(logits, 'float32').logSoftmax(), targets).mean();
      });
      const step = () => {
        const [loss, [gradients]] = gradient(weights);
        return [loss, ...gradients.values()];
      };
      const change = (i: number): void => {
        ids.write(Array.from({ length: 20 }, (_, k) => (11 * k + i) % 40));
        targets.write(Array.from({ length: 20 }, (_, k) => (5 * k + 2 * i) % 40));
        for (const t of weights.values()) scope(() => addInPlace(t, full(t.shape, 0.01 * i, { dtype })));
      };
      scope(() => void step()); // tables and layouts are uploaded
      using graph = captureGraph(step);
      const others: Tensor[] = [];
      for (let i = 1; i <= 3; i++) {
        change(i);
        // Whoever asks for memory in between does not get the graph's.
        others.push(...[64, 1000, 3000, 50_000].map((count) => full([count], i)));
        graph.replay();
        const expected = scope(() => ({ bits: allBits(step()) }));
        expect(await allBits(graph.result)).toEqual(await expected.bits);
      }
      for (const t of others) expect(new Set(t.dataSync()).size).toBe(1);
      expectOnDevice(graph, 3);
      for (const t of [...others, ...weights.values()]) t.dispose();
    });
  });

  test.each([300, 9000])('%i rows added to a table, at other ids', async (count) => {
    const list = (step: number): number[] => Array.from({ length: count }, (_, i) => (step * i) % 50);
    using rows = Tensor.from(numbers(2 * count, 1), { shape: [count, 2] });
    using ids = ints(...list(7));
    using graph = captureGraph(() => scatterRows(rows, ids, 50));
    ids.write(list(13));
    graph.replay();
    using expected = scatterRows(rows, ids, 50);
    expect(await bits(graph.result)).toBe(await bits(expected));
    expectOnDevice(graph, 1);
  });

  describe('an optimizer step', () => {
    const shapes = [[33], [70, 9], [4, 1031], [2048]];
    const solvers: OptimizerOptions[] = [
      { kind: 'adamw', beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weightDecay: 0.1 },
      { kind: 'sgd', momentum: 0.9, weightDecay: 0.1 },
    ];

    /** Weights after some steps, the norms on the way. One gradient is not finite: that step is skipped. */
    async function run(options: OptimizerOptions, dtype: DType, captured: boolean): Promise<unknown> {
      const make = (seed: number, d: DType) =>
        new Map(
          shapes.map((shape, k) => [
            `w${k}`,
            Tensor.from(
              numbers(
                shape.reduce((a, b) => a * b),
                seed + k,
              ),
              { shape, dtype: d },
            ),
          ]),
        );
      const [parameters, gradients] = [make(1, dtype), make(50, 'float32')];
      const optimizer = new Optimizer([{ name: 'all', parameters, gradients }], options);
      using rates = Tensor.from(Float64Array.of(0, 0, 0, 0), { shape: [1, 4] });
      const update = () => {
        const norm = sumOfSquares(gradients.values()).sqrt();
        optimizer.apply(rates, { factor: clipFactor(norm, 1), skip: nonFinite([norm]) });
        return norm;
      };
      let graph: Graph<Tensor> | undefined;
      const norms: number[] = [];
      for (let step = 0; step < 5; step++) {
        for (const [name, t] of gradients)
          t.write(numbers(t.size, 10 * step + name.length).fill(step === 2 ? Infinity : 0, 0, step === 2 ? 1 : 0));
        rates.write(optimizer.advance([0.01 * (step + 1)]));
        if (captured && graph) graph.replay();
        else if (captured) graph = captureGraph(update);
        norms.push(graph ? graph.result.item() : scope(() => update().item()));
      }
      if (graph) expectOnDevice(graph, 4);
      graph?.dispose();
      const weights = await allBits([...parameters.values(), ...optimizer.masters('all').values()]);
      optimizer.dispose();
      for (const t of [...parameters.values(), ...gradients.values()]) t.dispose();
      return { norms, weights };
    }

    test.each(solvers.flatMap((o) => (['float32', 'bfloat16'] as const).map((dtype) => [o, dtype] as const)))(
      '%o in %s',
      async (options, dtype) => expect(await run(options, dtype, true)).toEqual(await run(options, dtype, false)),
    );
  });

  describe('memory', () => {
    test('what the function lets go of stays its own', () => {
      using x = Tensor.from(numbers(4000, 1));
      using graph = captureGraph(() => scope(() => x.mul(3).add(2).mul(x).sum()));
      const expected = graph.result.item();
      const others = Array.from({ length: 8 }, (_, i) => full([4000], i));
      graph.replay();
      expect(graph.result.item()).toBe(expected);
      others.forEach((t, i) => {
        expect(new Set(t.dataSync())).toEqual(new Set([i]));
        t.dispose();
      });
    });

    test('what it uses stays, also when its owner has let go of it', () => {
      using x = Tensor.from([1, 2, 3]);
      const w = Tensor.from(numbers(3, 5));
      const expected = w.dataSync();
      using graph = captureGraph(() => x.mul(w));
      w.dispose();
      const others = Array.from({ length: 8 }, () => full([3], 9));
      graph.replay();
      expect([...graph.result.dataSync()]).toEqual([1, 2, 3].map((v, i) => Math.fround(v * expected[i])));
      for (const t of others) t.dispose();
    });

    test('a result that is disposed of earlier is harmless, and one can outlive a capture', () => {
      using x = Tensor.from([1, 2, 3]);
      using graph = captureGraph(() => [x.mul(2), x.add(1)]);
      graph.result[0].dispose();
      using kept = graph.result[1].alias();
      const others = Array.from({ length: 8 }, () => full([3], 9));
      x.write([4, 5, 6]);
      graph.replay();
      graph.dispose();
      expect([...kept.dataSync()]).toEqual([5, 6, 7]);
      for (const t of others) {
        expect([...t.dataSync()]).toEqual([9, 9, 9]);
        t.dispose();
      }
    });

    test('scratch memory that has moved since', () => {
      using x = Tensor.from(numbers(300 * 40, 1), { shape: [300, 40] });
      using graph = captureGraph(() => [sumOfSquares([x]), x.sum({ axes: [0] })]);
      const expected = graph.result.map((t) => t.dataSync());
      graph.replay();
      using large = full([9000, 1024], 1);
      scope(() => [large.sum({ axes: [0] }), large.sum({ axes: [1] }), sumOfSquares([large])].map((t) => t.dataSync()));
      graph.replay();
      expect(graph.result.map((t) => t.dataSync())).toEqual(expected);
      expectOnDevice(graph, 2);
    });

    test('comes back when graphs go, after many as after few', () => {
      using x = full([100_000], 1);
      const once = () => {
        using graph = captureGraph(() => scope(() => x.mul(2).add(x).sum()));
        graph.replay();
      };
      once();
      trimMemory();
      const { reserved } = memory();
      for (let i = 0; i < 50; i++) once();
      trimMemory();
      expect(memory().reserved).toBe(reserved);
    });
  });

  describe('faults', () => {
    const table = () => Tensor.from(numbers(12, 1), { shape: [4, 3] });

    test('in a replay surface at the next read, and spare the replays around it', async () => {
      using x = table();
      using ids = ints(0, 1);
      using graph = captureGraph(() => x.gatherRows(ids).mul(2).add(1));
      const good = await bits(graph.result);
      const runs = [
        [0, 1],
        [0, 9],
        [0, 1],
      ].map((values) => {
        ids.write(values);
        graph.replay();
        return clone(graph.result);
      });
      expect(() => synchronize()).toThrow('[gatherRows]');
      expect(await bits(runs[0])).toBe(good);
      await expect(runs[1].data()).rejects.toThrow(/^\[gatherRows\].*ids\[1\].*9/);
      expect(await bits(runs[2])).toBe(good);
      for (let i = 0; i < 2; i++) {
        ids.write([7, 1]);
        graph.replay();
        expect(() => graph.result.dataSync()).toThrow(/^\[gatherRows\].*ids\[0\].*7/);
      }
      ids.write([0, 1]);
      graph.replay();
      expect(await bits(graph.result)).toBe(good);
      for (const t of runs) t.dispose();
    });

    test('of what a replay reads pass on, and end with it', () => {
      const bad = scope(() => table().gatherRows(ints(9, 1)));
      using good = Tensor.from(numbers(6, 2), { shape: [2, 3] });
      using x = clone(good);
      using graph = captureGraph(() => x.mul(2));
      copyInto(x, bad);
      graph.replay();
      expect(() => graph.result.dataSync()).toThrow('[gatherRows]');
      copyInto(x, good);
      graph.replay();
      expect([...graph.result.dataSync()]).toEqual([...good.dataSync()].map((v) => 2 * v));
      bad.dispose();
    });

    test('throw from replay where every op is awaited', () => {
      using x = table();
      using ids = ints(0, 1);
      using graph = captureGraph(() => x.gatherRows(ids));
      addon().setSynchronous(streamOf(device), true);
      try {
        ids.write([0, 4]);
        expect(() => graph.replay()).toThrow('[gatherRows]');
      } finally {
        addon().setSynchronous(streamOf(device), false);
      }
    });
  });

  describe('what cannot be captured', () => {
    const refused: [string, (x: Tensor) => unknown, RegExp][] = [
      ['data from the host', () => Tensor.from([1, 2, 3]), /kernels alone.*found data from the host/],
      ['a read', (x) => x.dataSync(), /kernels alone.*found a read of data/],
      ['a read whose error nobody sees', (x) => void x.data().catch(() => undefined), /found a read of data/],
      ['another capture', (x) => captureGraph(() => x.add(1)), /no capture inside/],
      ['a promise', async (x) => x.add(1), /synchronous function/],
      ['an error of its own', (x) => x.add(Tensor.empty([5])), /\[add\]/],
    ];
    test.each(refused)('%s', (_, f, message) => {
      using x = Tensor.from([1, 2, 3]);
      expect(() =>
        captureGraph(() => {
          const early = x.mul(2);
          f(x);
          return f.constructor.name === 'AsyncFunction' ? f(x) : early;
        }),
      ).toThrow(message);
      using graph = captureGraph(() => x.mul(2));
      graph.replay();
      expect([...graph.result.dataSync()]).toEqual([2, 4, 6]);
    });

    test('a replay', () => {
      using x = Tensor.from([1, 2, 3]);
      using graph = captureGraph(() => x.mul(2));
      expect(() => captureGraph(() => graph.replay())).toThrow('found a replay');
    });
  });

  test('a graph that is gone is an error', () => {
    using x = Tensor.from([1, 2, 3]);
    const graph = captureGraph(() => x.mul(2));
    graph.dispose();
    graph.dispose();
    expect(() => graph.replay()).toThrow('a graph was used after it was disposed of');
    expect(() => graph.result.dataSync()).toThrow('disposed');
  });

  test('a saved tensor that a replay has written is an error', () => {
    using x = Tensor.from([1, 2, 3]);
    using y = Tensor.from([1, 1, 1]);
    using graph = captureGraph(() => void addInPlace(x, y));
    const stale = valueAndGrad((t: Tensor) => {
      const squares = t.mul(x).sum();
      graph.replay();
      return squares;
    });
    expect(() => scope(() => stale(y))).toThrow('was written in place since');
  });
});
