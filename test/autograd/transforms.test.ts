// Function transforms against closed forms: trees, nesting, captured variables, directional derivatives.
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { noGrad } from '../../src/autograd/tape.js';
import { grad, hvp, jvp, valueAndGrad, vjp } from '../../src/autograd/transforms.js';
import { addInPlace, copyInto, fill, gatherRows, scaleInPlace } from '../../src/ops/index.js';
import type { Tree } from '../../src/tensor/scope.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';

let before = 0;
beforeEach(() => {
  before = memory().storages;
});
// Whatever happens in a transform, errors included, memory returns to where it was.
afterEach(() => expect(memory().storages).toBe(before));

const f64 = (...values: number[]): Tensor => Tensor.from(Float64Array.from(values));
const inside =
  (f: () => void): (() => void) =>
  () =>
    void scope(f);

/** Compares with what is expected to 12 digits. */
function close(found: Tensor, expected: readonly number[]): void {
  const values = [...found.dataSync()];
  expect(values.length).toBe(expected.length);
  values.forEach((v, i) => {
    expect(Math.abs(v - expected[i])).toBeLessThanOrEqual(1e-12 * Math.max(1, Math.abs(expected[i])));
  });
}

describe('grad and valueAndGrad', () => {
  test(
    'the example of the documentation',
    inside(() => {
      const x = Tensor.from([
        [1, 2],
        [3, 4],
      ]);
      const [loss, [gx]] = valueAndGrad((t: Tensor) => t.matmul(t).sum())(x);
      expect(loss.item()).toBe(54);
      expect([...gx.dataSync()]).toEqual([7, 11, 9, 13]);
    }),
  );

  test(
    'several arguments, each a tree; unused ones get zeros',
    inside(() => {
      const params = { w: f64(2, 3), list: [f64(5), f64(7)], map: new Map([['b', f64(1)]]) };
      const x = f64(4, 6);
      const [gp, gx] = grad((p: typeof params, t: Tensor) => p.w.mul(t).sum().add(p.map.get('b')!.square().sum()))(
        params,
        x,
      );
      close(gp.w, [4, 6]);
      close(gp.list[0], [0]);
      close(gp.list[1], [0]);
      close(gp.map.get('b')!, [2]);
      close(gx, [2, 3]);
    }),
  );

  test(
    'a tensor given twice gets one gradient for each place',
    inside(() => {
      const x = f64(3);
      const [a, b] = grad((s: Tensor, t: Tensor) => s.square().mul(t).sum())(x, x);
      close(a, [18]);
      close(b, [9]);
    }),
  );

  test(
    'the identity, a constant, an input used many times',
    inside(() => {
      const x = f64(3);
      close(grad((t: Tensor) => t)(x)[0], [1]);
      close(grad((_: Tensor) => f64(5))(x)[0], [0]);
      close(grad((t: Tensor) => t.add(t).add(t).mul(t).sum())(x)[0], [18]);
    }),
  );

  test(
    'integer inputs take part and get zeros',
    inside(() => {
      const table = Tensor.from(Float64Array.of(1, 2, 3, 4), { shape: [2, 2] });
      const [gt, gi] = grad((t: Tensor, ids: Tensor) => gatherRows(t, ids).sum())(
        table,
        Tensor.from(Int32Array.of(1, 1)),
      );
      close(gt, [0, 0, 2, 2]);
      expect(String(gi)).toBe('i32[2]@cpu');
      close(gi, [0, 0]);
    }),
  );

  test(
    'auxiliary results pass through, off the tape',
    inside(() => {
      const [[value, extra, note], [g]] = valueAndGrad((t: Tensor): [Tensor, Tensor, string] => [
        t.square().sum(),
        t.mul(2),
        'note',
      ])(f64(3));
      expect(value.item()).toBe(9);
      close(extra, [6]);
      expect(note).toBe('note');
      close(g, [6]);
      // What has left its transform is a constant in the next one.
      close(grad((t: Tensor) => t.mul(extra).sum())(f64(1))[0], [6]);
    }),
  );

  test('a result that is not one element is refused', () => {
    const x = f64(1, 2);
    expect(() => grad((t: Tensor) => t.mul(2))(x)).toThrow(
      '[valueAndGrad] expected a function that returns a tensor of one element, found f64[2]@cpu; try .sum()',
    );
    expect(() => grad((() => 3) as never)(x)).toThrow('found number');
    expect(() => grad((async () => x) as never)(x)).toThrow(/expected a function that returns/);
    x.dispose();
  });

  test('an exception closes the level: the next transform is unharmed', () => {
    const x = f64(2);
    const fails = grad((t: Tensor) => {
      t.mul(t).exp();
      throw new Error('mine');
    });
    expect(() => fails(x)).toThrow('mine');
    expect(() => grad((t: Tensor) => fails(t)[0].sum())(x)).toThrow('mine');
    scope(() => close(grad((t: Tensor) => t.mul(t).sum())(x)[0], [4]));
    x.dispose();
  });
});

describe('nesting', () => {
  /** The n-th derivative of a scalar function, by n transforms inside of each other. */
  const derivative = (f: (x: Tensor) => Tensor, n: number): ((x: Tensor) => Tensor) =>
    n === 0 ? f : derivative((x) => grad((t: Tensor) => f(t).sum())(x)[0], n - 1);

  test.each([1, 2, 3, 4, 5])(
    'derivative %i of x^5 sin(x)',
    (n) =>
      void scope(() => {
        const x = 0.7;
        // Leibniz: sum of binomial(n, k) (x^5)^(k) sin^(n-k).
        const power = (k: number): number => [1, 5, 20, 60, 120, 120][k] * x ** (5 - k);
        const sine = (k: number): number => Math.sin(x + (k * Math.PI) / 2);
        const choose = (k: number): number => {
          let c = 1;
          for (let i = 0; i < k; i++) c = (c * (n - i)) / (i + 1);
          return c;
        };
        let expected = 0;
        for (let k = 0; k <= n; k++) expected += choose(k) * power(k) * sine(n - k);
        const found = derivative((t) => t.pow(5).mul(t.sin()), n)(f64(x)).item();
        expect(Math.abs(found - expected)).toBeLessThan(1e-11 * Math.max(1, Math.abs(expected)));
      }),
  );

  test(
    'perturbations of different levels are not confused',
    inside(() => {
      // d/dx [x * d/dy (x + y)] at 1, 1 is 1, and d/dx [x * d/dy (x y)] is 2x.
      const outer = (inner: (x: Tensor, y: Tensor) => Tensor) =>
        grad((x: Tensor) => x.mul(grad((y: Tensor) => inner(x, y).sum())(f64(1))[0]).sum())(f64(3))[0];
      close(
        outer((x, y) => x.add(y)),
        [1],
      );
      close(
        outer((x, y) => x.mul(y)),
        [6],
      );
    }),
  );

  test(
    'captured variables of an outer transform inside of an inner one, mixed partials',
    inside(() => {
      // f = a^3 b^2: d2f/da db = 6 a^2 b, d3f/da2 db = 12 a b.
      const [a, b] = [f64(2), f64(3)];
      const mixed = grad((s: Tensor) => grad((t: Tensor) => s.pow(3).mul(t.square()).sum())(b)[0].sum());
      close(mixed(a)[0], [72]);
      const third = grad((r: Tensor) => mixed(r)[0].sum());
      close(third(a)[0], [72]);
    }),
  );

  test(
    'the gradient of a gradient norm, and of a step of gradient descent',
    inside(() => {
      const x = f64(0.3, -0.8);
      const f = (t: Tensor): Tensor => t.pow(4).sum();
      const norm = grad((t: Tensor) => grad(f)(t)[0].square().sum())(x)[0];
      close(
        norm,
        [...x.dataSync()].map((v) => 96 * v ** 5),
      );
      // f(x - 0.1 f'(x)): chain rule through the step.
      const stepped = grad((t: Tensor) => f(t.sub(grad(f)(t)[0].mul(0.1))))(x)[0];
      close(
        stepped,
        [...x.dataSync()].map((v) => 4 * (v - 0.4 * v ** 3) ** 3 * (1 - 1.2 * v ** 2)),
      );
    }),
  );

  test(
    'thirty levels are enough',
    inside(() => {
      expect(() => derivative((t) => t.mul(t), 31)(f64(1))).toThrow('expected at most 30 nested transforms');
      close(grad((t: Tensor) => t.mul(t).sum())(f64(1))[0], [2]);
    }),
  );
});

describe('what cuts the tape', () => {
  test(
    'noGrad and detach are constants',
    inside(() => {
      const x = f64(3);
      close(grad((t: Tensor) => t.mul(noGrad(() => t.square())).sum())(x)[0], [9]);
      close(grad((t: Tensor) => t.mul(t.detach().square()).sum())(x)[0], [9]);
      close(grad((t: Tensor) => t.mul(noGrad(() => grad((u: Tensor) => u.pow(3).sum())(t)[0])).sum())(x)[0], [27]);
    }),
  );

  test(
    'noGrad ends with its function, exceptions included',
    inside(() => {
      const [g] = grad((t: Tensor) => {
        expect(() =>
          noGrad(() => {
            throw new Error('inner');
          }),
        ).toThrow('inner');
        return t.square().sum();
      })(f64(3));
      close(g, [6]);
    }),
  );

  test(
    'steps have no derivative: comparisons, sign, argmax give zeros',
    inside(() => {
      close(grad((t: Tensor) => t.greater(0).cast('float64').mul(t).sum())(f64(-1, 2))[0], [0, 1]);
      close(grad((t: Tensor) => t.sign().sum())(f64(-1, 2))[0], [0, 0]);
      close(grad((t: Tensor) => t.argmax().cast('float64').sum())(f64(-1, 2))[0], [0, 0]);
    }),
  );

  test('writing into a differentiated tensor in place is an error, not a missing term', () => {
    scope(() => {
      const x = f64(2);
      const attempts: Record<string, (y: Tensor, t: Tensor) => void> = {
        addInPlace: (y, t) => addInPlace(y, t),
        scaleInPlace: (y) => scaleInPlace(y, 3),
        copyInto: (y, t) => copyInto(y, t),
        fill: (y) => fill(y, 1),
      };
      for (const [op, write] of Object.entries(attempts))
        expect(() =>
          grad((t: Tensor) => {
            const y = t.mul(2);
            write(y, t);
            return y.sum();
          })(x),
        ).toThrow(`[${op}]`);
    });
  });

  test('a saved tensor that was written since is an error', () => {
    scope(() => {
      const x = f64(2);
      const other = f64(5);
      expect(() =>
        grad((t: Tensor) => {
          const y = t.mul(other);
          other.write([7]);
          return y.sum();
        })(x),
      ).toThrow(
        '[mul] a tensor saved for backward, f64[1]@cpu, was written in place since; write after backward, or to a clone',
      );
      // What backward does not need may be written.
      const free = f64(5);
      const [g] = grad((t: Tensor) => {
        const y = t.add(free);
        free.write([7]);
        return y.sum();
      })(x);
      close(g, [1]);
    });
  });
});

describe('vjp', () => {
  test(
    'cotangents for every output of a tree',
    inside(() => {
      const f = (t: Tensor): Record<string, Tensor> => ({ a: t.square(), b: t.mul(3), same: t });
      const [value, [g]] = vjp(f, [f64(2, 5)], { a: f64(1, 10), b: f64(2, 0), same: f64(0, 1) });
      close(value.a, [4, 25]);
      close(g, [4 + 6, 100 + 1]);
    }),
  );

  test('the count and the shapes of cotangents are checked', () => {
    const x = f64(1, 2);
    const u = f64(1, 2, 3);
    expect(() => vjp((t: Tensor) => t.mul(2), [x], u)).toThrow(
      '[vjp] expected a cotangent of shape [2] for output 0, found [3]',
    );
    expect(() => vjp((t: Tensor) => [t.mul(2), t] as Tensor[], [x], [x])).toThrow(
      '[vjp] expected 2 cotangents, one per output, found 1',
    );
    x.dispose();
    u.dispose();
  });

  test(
    'the cotangent may itself be differentiated',
    inside(() => {
      const x = f64(2);
      const g = grad((u: Tensor) =>
        vjp((t: Tensor) => t.pow(3), [x], u)[1][0]
          .square()
          .sum(),
      )(f64(5))[0];
      // (12 u)^2 has derivative 288 u.
      close(g, [1440]);
    }),
  );
});

describe('directional derivatives', () => {
  test(
    'jvp of several arguments and results',
    inside(() => {
      const f = (a: Tensor, b: Tensor): Tensor[] => [a.mul(b), a.exp().sum()];
      const [a, b, da, db] = [f64(0.5, -1), f64(2, 3), f64(1, 0.25), f64(-1, 4)];
      const [[value], [product, total]] = jvp(f, [a, b], [da, db]);
      close(value, [1, -3]);
      close(product, [1 * 2 + 0.5 * -1, 0.25 * 3 + -1 * 4]);
      close(total, [Math.exp(0.5) + 0.25 * Math.exp(-1)]);
    }),
  );

  test(
    'jvp of what does not depend on the arguments is zero',
    inside(() => {
      const [, tangent] = jvp((t: Tensor) => t.detach().mul(2), [f64(1)], [f64(1)]);
      close(tangent, [0]);
    }),
  );

  test(
    'hvp of log-sum-exp: the covariance of its softmax',
    inside(() => {
      const x = f64(0.2, -1, 0.7);
      const v = f64(1, -2, 0.5);
      const p = [...x.softmax().dataSync()];
      const d = [...v.dataSync()];
      const mean = p.reduce((n, pi, i) => n + pi * d[i], 0);
      close(
        hvp((t: Tensor) => t.logSumExp(), [x], [v])[0],
        p.map((pi, i) => pi * (d[i] - mean)),
      );
    }),
  );

  test(
    'hvp of a quadratic form over two arguments, cross terms included',
    inside(() => {
      // f = a.b |a|^2 with a, b vectors.
      const f = (a: Tensor, b: Tensor): Tensor => a.mul(b).sum().mul(a.square().sum());
      const [a, b, da, db] = [f64(1, 2), f64(3, -1), f64(0.5, 1), f64(2, 0)];
      const [ha, hb] = hvp(f, [a, b], [da, db]);
      // grad_a = |a|^2 b + 2 (a.b) a, grad_b = |a|^2 a; derivatives along (da, db).
      const dot = (x: number[], y: number[]): number => x[0] * y[0] + x[1] * y[1];
      const [A, B, DA, DB] = [a, b, da, db].map((t) => [...t.dataSync()]);
      const s = 2 * dot(A, DA);
      const dab = dot(DA, B) + dot(A, DB);
      close(
        ha,
        [0, 1].map((i) => s * B[i] + dot(A, A) * DB[i] + 2 * dab * A[i] + 2 * dot(A, B) * DA[i]),
      );
      close(
        hb,
        [0, 1].map((i) => s * A[i] + dot(A, A) * DA[i]),
      );
    }),
  );

  test('tangents are checked', () => {
    const [x, v] = [f64(1, 2), f64(1)];
    expect(() => jvp((t: Tensor) => t, [x], [v])).toThrow('[jvp] expected tangents shaped like the arguments');
    expect(() => hvp((t: Tensor) => t.sum(), [x], [v])).toThrow('[hvp] expected tangents');
    x.dispose();
    v.dispose();
  });
});

describe('memory', () => {
  test('every transform returns to where it started, but for its result', () => {
    const x = f64(0.3, 0.9);
    const f = (t: Tensor): Tensor => t.exp().mul(t).softmax().square().sum();
    const { allocated } = memory();
    const transforms: Record<string, () => Tree> = {
      grad: () => grad(f)(x) as Tensor[],
      valueAndGrad: () => valueAndGrad(f)(x) as Tree,
      vjp: () => vjp((t: Tensor) => t.exp(), [x], x) as Tree,
      jvp: () => jvp((t: Tensor) => t.exp(), [x], [x]) as Tree,
      hvp: () => hvp(f, [x], [x]) as Tree,
      third: () => grad((t: Tensor) => hvp(f, [t], [x])[0].sum())(x) as Tree,
    };
    for (const [name, run] of Object.entries(transforms)) {
      const count = memory().storages;
      const results = run();
      const held = new Set<unknown>();
      const visit = (v: unknown): void => {
        if (v instanceof Tensor) held.add(v.storage);
        else if (Array.isArray(v)) v.forEach(visit);
      };
      visit(results);
      expect([name, memory().storages - count]).toEqual([name, held.size]);
      const free = (v: unknown): void => {
        if (v instanceof Tensor) v.dispose();
        else if (Array.isArray(v)) v.forEach(free);
      };
      free(results);
      expect([name, memory().allocated]).toEqual([name, allocated]);
    }
    x.dispose();
  });
});
