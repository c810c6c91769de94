// Cotangents kept apart by sequence: ops without a rule are named; a suspended tape waits, and is let go of.
import { describe, expect, it } from 'vitest';
import '../../src/ops/methods.js';
import { SequencePass } from '../../src/autograd/sequence-sinks.js';
import { differentiate, suspend } from '../../src/autograd/tape.js';
import { grad } from '../../src/autograd/transforms.js';
import { SegmentLayout } from '../../src/ops/segments.js';
import { SequenceStreams } from '../../src/ops/streams.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';

const f64 = (...values: number[]): Tensor => Tensor.from(Float64Array.from(values));

function streamsOfOne(length: number): SequenceStreams {
  const ints = Int32Array.from({ length }, (_, i) => i);
  const t = (): Tensor => Tensor.from(ints);
  return new SequenceStreams(
    SegmentLayout.sequences([length]),
    [{ segments: [0], targets: { start: 0, length } }],
    { tokens: ints, targetRows: ints, targetIds: ints },
    { ids: t(), targetRows: t(), targetOrder: t() },
  );
}

describe('ops without a rule for separate gradients', () => {
  it.each([
    ['exp', (x: Tensor) => x.exp()],
    ['mul', (x: Tensor) => x.mul(x)],
    ['tanh', (x: Tensor) => x.tanh()],
  ] as const)('%s is named', (name, f) => {
    scope(() => {
      using streams = streamsOfOne(3);
      const pass = new SequencePass(streams, [{ name: 'w', group: 'all', first: null, second: null }], {
        squares: true,
        secondCount: 0,
      });
      const run = (): unknown =>
        differentiate(
          [f64(1, 2, 3)],
          ([x]) => f(x),
          (y) => [{ tensor: y, cotangent: Tensor.from(new Float64Array(y.size).fill(1), { shape: y.shape }) }],
          { streams, sinks: pass.sinks },
        );
      expect(run).toThrow(new RegExp(`\\[${name}\\] has no rule that keeps the gradients of sequences apart`));
      pass.dispose();
    });
  });
});

it('an op without a rule is found before any sink has taken anything', () => {
  scope(() => {
    using streams = streamsOfOne(3);
    const taken: unknown[] = [];
    const sink = { accept: (c: unknown) => void taken.push(c), buffer: null };
    const run = (): unknown =>
      differentiate(
        [f64(1, 2, 3), f64(4, 5, 6)],
        ([x, w]) => x.exp().add(w),
        (y) => [{ tensor: y, cotangent: f64(1, 1, 1) }],
        { streams, sinks: [sink, sink] },
      );
    expect(run).toThrow(/\[(exp|add)\] has no rule/);
    expect(taken).toEqual([]);
  });
});

it('groups of sequences need their targets in order', () => {
  const parts = [0, 1].map((s) => ({ segments: [s], targets: { start: 2 * s, length: 2 } }));
  const ints = Int32Array.of(0, 1, 2, 3);
  const t = (): Tensor => Tensor.from(ints);
  scope(() => {
    const make = (groups: number[][]): SequenceStreams =>
      new SequenceStreams(
        SegmentLayout.sequences([2, 2]),
        parts,
        { tokens: ints, targetRows: ints, targetIds: ints },
        { ids: t(), targetRows: t(), targetOrder: t() },
        groups,
      );
    make([[0, 1]]).dispose();
    expect(() => make([[1, 0]])).toThrow(/expected the targets of a group in its order, found some at 0, not at 4/);
  });
});

describe('suspend', () => {
  it('pulls back later, after other transforms have run', () => {
    scope(() => {
      const x = f64(2, 3);
      const held = suspend([x], ([t]) => t.mul(t).mul(t));
      const [other] = grad((t: Tensor) => t.mul(t).sum())(x);
      expect([...other.dataSync()]).toEqual([4, 6]);
      const [g] = held.pullBack([{ tensor: held.result, cotangent: f64(1, 10) }]);
      expect([...g!.dataSync()]).toEqual([12, 270]);
      expect(() => held.pullBack([])).toThrow(/expected a tape that waits, found one that is closed/);
    });
  });

  it('is let go of by close, and frees what it kept', () => {
    const before = memory().storages;
    const x = f64(1, 2);
    const held = scope(() => {
      const s = suspend([x], ([t]) => t.exp().exp());
      return { close: () => s.close() };
    });
    expect(memory().storages).toBeGreaterThan(before + 1);
    held.close();
    held.close();
    expect(memory().storages).toBe(before + 1);
    x.dispose();
  });

  it('stands at the outermost level', () => {
    scope(() => {
      const x = f64(1);
      expect(() => grad((t: Tensor) => suspend([t], ([u]) => u).result.sum())(x)).toThrow(
        /expected no transform around it/,
      );
      const held = suspend([x], ([t]) => t.mul(t));
      const inside = (t: Tensor): Tensor => {
        held.pullBack([]);
        return t.sum();
      };
      expect(() => grad(inside)(x)).toThrow(/expected no transform around its end/);
      held.close();
    });
  });
});
