// The checkers themselves: they find what is wrong, say where, and refuse what they cannot judge.
import { expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { customFunction } from '../../src/autograd/checkpoint.js';
import { gradcheck, gradgradcheck } from '../../src/autograd/gradcheck.js';
import { mul, sin, square } from '../../src/ops/elementwise.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';

const f64 = (values: number[], shape = [values.length]): Tensor => Tensor.from(Float64Array.from(values), { shape });

/** x^2, whose derivative is right except for one element. */
const almost = customFunction({
  name: 'almost',
  forward: (x) => ({ output: square(x), saved: [x] }),
  backward: (g, [x]) => [mul(mul(g, mul(x, 2)), f64([1, 1, 1, 1, 1.001, 1], [2, 3]))],
});

test('the report names the worst element', () => {
  scope(() => {
    const x = f64([1, 2, 3, 4, 5, 6], [2, 3]);
    const report = gradcheck(almost, [x], { throws: false });
    expect(report).toMatchObject({ ok: false, checked: 6, worst: { input: 0, index: [1, 1] } });
    expect(report.worst!.analytic / report.worst!.numeric).toBeCloseTo(1.001, 6);
    expect(() => gradcheck(almost, [x])).toThrow(/\[gradcheck\] input 0 at \[1,1\]: expected the numeric derivative/);
    expect(gradcheck(almost, [x], { relative: 0.01 }).ok).toBe(true);
    expect(gradcheck((t) => t.square(), [x])).toMatchObject({ ok: true, checked: 6 });
  });
});

test('a second derivative that is wrong is found where the first is right', () => {
  scope(() => {
    const x = f64([0.3, 1.2]);
    const constant = customFunction({
      name: 'constant',
      forward: (t) => ({ output: sin(t), saved: [t] }),
      // The value of the derivative is right, but it does not depend on x.
      backward: (g, [t]) => [mul(g, t.detach().cos())],
    });
    expect(gradcheck(constant, [x]).ok).toBe(true);
    expect(() => gradgradcheck(constant, [x])).toThrow('[gradgradcheck] input 0 at');
    expect(gradgradcheck((t) => t.sin(), [x]).ok).toBe(true);
  });
});

test('several inputs and results; integers are passed through', () => {
  scope(() => {
    const ids = Tensor.from(Int32Array.of(1, 0, 1));
    const report = gradcheck(
      (x, i, y) => [x.gatherRows(i).mul(y), y.exp()],
      [f64([1, 2, 3, 4], [2, 2]), ids, f64([5, 6])],
    );
    expect(report.checked).toBe(6);
  });
});

test('not a number is a failure', () => {
  scope(() => {
    const x = f64([-1]);
    expect(gradcheck((t) => t.log(), [x], { throws: false }).ok).toBe(false);
  });
});

test('inputs in less than float64 are refused', () => {
  const x = Tensor.from([1]);
  expect(() => gradcheck((t) => t, [x])).toThrow(
    '[gradcheck] expected float64 inputs (finite differences need them), found input 0: f32[1]@cpu',
  );
  x.dispose();
});

test('nothing is left behind, failures included', () => {
  const x = f64([1, 2, 3, 4, 5, 6], [2, 3]);
  const before = memory().storages;
  gradcheck((t) => t.exp(), [x]);
  gradgradcheck((t) => t.exp(), [x]);
  expect(() => scope(() => gradcheck(almost, [x]))).toThrow();
  expect(memory().storages).toBe(before);
  x.dispose();
});
