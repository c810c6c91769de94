// Checkpointing: the same values and derivatives for less memory; and functions with a derivative of one's own.
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { checkpoint, customFunction } from '../../src/autograd/checkpoint.js';
import { gradcheck, gradgradcheck } from '../../src/autograd/gradcheck.js';
import { grad, hvp, jvp } from '../../src/autograd/transforms.js';
import { exp, mul, square } from '../../src/ops/elementwise.js';
import { scope } from '../../src/tensor/scope.js';
import { memory, resetPeakMemory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { randomSource } from '../support/host.js';

let before = 0;
beforeEach(() => {
  before = memory().storages;
});
afterEach(() => expect(memory().storages).toBe(before));

const random = randomSource('checkpoint');
const f64 = (...shape: number[]): Tensor =>
  Tensor.from(
    Float64Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => 2 * random() - 1),
    { shape },
  );
const layer = (x: Tensor, w: Tensor): Tensor => x.matmul(w).tanh();

describe('checkpoint', () => {
  test('gives the function value and its derivatives of both orders', () => {
    scope(() => {
      const inputs = [f64(2, 3), f64(3, 4)];
      const f = (x: Tensor, w: Tensor): Tensor => checkpoint(layer, x, w);
      expect([...f(inputs[0], inputs[1]).dataSync()]).toEqual([...layer(inputs[0], inputs[1]).dataSync()]);
      gradcheck(f, inputs);
      gradgradcheck(f, inputs);
      const [direct] = hvp((x: Tensor) => layer(x, inputs[1]).square().sum(), [inputs[0]], [inputs[0]]);
      const [again] = hvp((x: Tensor) => checkpoint(layer, x, inputs[1]).square().sum(), [inputs[0]], [inputs[0]]);
      const expected = direct.dataSync();
      again.dataSync().forEach((v, i) => {
        expect(v).toBeCloseTo(expected[i], 13);
      });
      const tangent = (g: typeof f): number[] => [
        ...jvp((x: Tensor) => g(x, inputs[1]), [inputs[0]], [inputs[0]])[1].dataSync(),
      ];
      expect(tangent(f)).toEqual(tangent(layer));
    });
  });

  test('nests, takes integer inputs, and its identity is its input', () => {
    scope(() => {
      const [x, w] = [f64(2, 3), f64(3, 3)];
      const ids = Tensor.from(Int32Array.of(1, 0));
      const inner = (t: Tensor, i: Tensor): Tensor => checkpoint((a, b) => a.gatherRows(b).exp(), t, i);
      gradcheck((t, u) => checkpoint((a, b, i) => layer(inner(a, i), b), t, u, ids), [x, w]);
      expect([...grad((t: Tensor) => checkpoint((a) => a, t).sum())(x)[0].dataSync()]).toEqual([1, 1, 1, 1, 1, 1]);
    });
  });

  test('keeps no intermediate tensor until backward', () => {
    scope(() => {
      const x = f64(64, 64);
      const deep = (t: Tensor): Tensor => {
        let y = t;
        for (let i = 0; i < 20; i++) y = y.sin().add(1);
        return y;
      };
      const peak = (f: (t: Tensor) => Tensor): number => {
        resetPeakMemory();
        const start = memory().allocated;
        scope(() => grad((t: Tensor) => f(f(f(f(t)))).sum())(x));
        return (memory().peak - start) / (64 * 64 * 8);
      };
      const plain = peak((t) => deep(t));
      const saving = peak((t) => checkpoint(deep, t));
      expect(plain).toBeGreaterThan(80);
      expect(saving).toBeLessThan(plain / 2);
    });
  });

  test('a captured differentiated tensor is an error, inside of a nested function too', () => {
    scope(() => {
      const [x, w] = [f64(2, 2), f64(2, 2)];
      const captured = /\[checkpoint\] expected every differentiated tensor among the inputs/;
      expect(() => grad((t: Tensor) => checkpoint((a) => a.matmul(t), x).sum())(w)).toThrow(captured);
      expect(() => grad((t: Tensor) => checkpoint((a) => checkpoint((b) => b.matmul(t), a), x).sum())(w)).toThrow(
        captured,
      );
      expect(() => grad((t: Tensor) => checkpoint((a) => a.matmul(w), t).sum())(x)).not.toThrow();
    });
  });

  test('what its function throws passes through, forward and backward', () => {
    const x = f64(2);
    let calls = 0;
    const once = (t: Tensor): Tensor => {
      if (++calls > 1) throw new Error('second call');
      return t.exp();
    };
    expect(() => grad((t: Tensor) => checkpoint(once, t).sum())(x)).toThrow('second call');
    expect(() => grad((t: Tensor) => checkpoint(once, t).sum())(x)).toThrow('second call');
    x.dispose();
  });
});

describe('customFunction', () => {
  /** exp with its derivative from the saved output. */
  const custom = customFunction({
    name: 'myExp',
    forward: (x) => {
      const output = exp(x);
      return { output, saved: [output] };
    },
    backward: (g, [y]) => [mul(g, y)],
  });

  test('uses the derivative that it is given, at every order', () => {
    scope(() => {
      const x = f64(2, 3);
      gradcheck(custom, [x]);
      gradgradcheck(custom, [x]);
      const straight = customFunction({
        name: 'straightThrough',
        forward: (t) => ({ output: t.sign(), saved: [] }),
        backward: (g) => [g],
      });
      expect([...grad((t: Tensor) => straight(t).sum())(x)[0].dataSync()]).toEqual([1, 1, 1, 1, 1, 1]);
    });
  });

  test('several inputs, one without a derivative', () => {
    scope(() => {
      const [x, y] = [f64(3), f64(3)];
      const product = customFunction({
        name: 'product',
        forward: (a, b) => ({ output: a.mul(b), saved: [b] }),
        backward: (g, [b]) => [g.mul(b), null],
      });
      const [gx, gy] = grad((a: Tensor, b: Tensor) => product(a, b).sum())(x, y);
      expect([...gx.dataSync()]).toEqual([...y.dataSync()]);
      expect([...gy.dataSync()]).toEqual([0, 0, 0]);
    });
  });

  test('a wrong derivative is found by gradcheck, naming the function in its errors', () => {
    const x = f64(2);
    const wrong = customFunction({
      name: 'wrong',
      forward: (t) => ({ output: square(t), saved: [t] }),
      backward: (g, [t]) => [mul(g, t)],
    });
    expect(() => gradcheck(wrong, [x])).toThrow('[gradcheck] input 0 at');
    const short = customFunction({
      name: 'short',
      forward: (a, b) => ({ output: a.add(b), saved: [] }),
      backward: (g) => [g],
    });
    expect(() => grad((t: Tensor) => short(t, t).sum())(x)).toThrow(
      '[short] expected 2 cotangents from backward, found 1',
    );
    x.dispose();
  });

  test('a backward that throws leaves nothing behind', () => {
    const x = f64(2);
    const fails = customFunction({
      name: 'fails',
      forward: (t) => ({ output: t.mul(1), saved: [t] }),
      backward: () => {
        throw new Error('mine');
      },
    });
    expect(() => grad((t: Tensor) => fails(t.exp()).add(t).mul(t).sum())(x)).toThrow('mine');
    scope(() => expect(grad((t: Tensor) => t.sum())(x)[0].dataSync()[1]).toBe(1));
    x.dispose();
  });

  test('a differentiated tensor that forward captures is an error', () => {
    const x = f64(2);
    expect(() =>
      grad((t: Tensor) => {
        const bad = customFunction({
          name: 'bad',
          forward: (a) => ({ output: a.mul(t), saved: [] }),
          backward: (g) => [g],
        });
        return bad(x).sum();
      })(x),
    ).toThrow('captured');
    x.dispose();
  });
});
