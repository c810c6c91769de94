// The bilevel optimizer on problems whose solutions are known in closed form.
import { describe, expect, it } from 'vitest';
import { add, exp, mul, square, sub } from '../../src/ops/elementwise.js';
import { reshape } from '../../src/ops/movement.js';
import { matmul } from '../../src/ops/product.js';
import { sum } from '../../src/ops/reduce.js';
import {
  BilevelOptimizer,
  type BilevelOptions,
  type BilevelProblem,
  type BilevelTerm,
} from '../../src/optim/bilevel/bilevel.js';
import { descend } from '../../src/optim/bilevel/lower-level.js';
import { penaltySchedule } from '../../src/optim/bilevel/penalty-schedule.js';
import { detachFromScope, scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';

const values = (t: Tensor): number[] => [...(t.dataSync() as Float64Array)];
const vector = (list: readonly number[]): Tensor => Tensor.from(Float64Array.from(list));
const half = (t: Tensor): Tensor => mul(sum(square(t)), 0.5);

/** Solves a small dense system by Gauss-Jordan elimination. */
function solve(matrix: readonly number[][], right: readonly number[]): number[] {
  const rows = matrix.map((row, i) => [...row, right[i]]);
  for (let c = 0; c < rows.length; c++) {
    const pivot = rows
      .slice(c)
      .reduce((best, row, i) => (Math.abs(row[c]) > Math.abs(rows[best][c]) ? c + i : best), c);
    [rows[c], rows[pivot]] = [rows[pivot], rows[c]];
    for (let r = 0; r < rows.length; r++) {
      if (r === c) continue;
      const factor = rows[r][c] / rows[c][c];
      rows[r] = rows[r].map((x, k) => x - factor * rows[c][k]);
    }
  }
  return rows.map((row, i) => row[rows.length] / row[i]);
}

const A = [
  [1.2, -0.4],
  [0.3, 0.8],
];
const a = [1, -2];
const b = [0.5, 2];
const times = (m: readonly number[][], v: readonly number[]): number[] =>
  m.map((row) => row.reduce((total, x, i) => total + x * v[i], 0));
const transposed = (m: readonly number[][]): number[][] => m[0].map((_, i) => m.map((row) => row[i]));

/** f = ½|φ - a|² + ½|θ - b|², g = ½|θ - Aφ|²: θ*(φ) = Aφ, and the bilevel solution is that of least squares. */
function quadratic(theta: Tensor, phi: Tensor): BilevelProblem {
  const [matrix, left, right] = [Tensor.from(Float64Array.from(A.flat()), { shape: [2, 2] }), vector(a), vector(b)];
  const image = (upper: Tensor): Tensor => reshape(matmul(matrix, reshape(upper, [2, 1])), [2]);
  return {
    lower: new Map([['theta', theta]]),
    upper: new Map([['phi', phi]]),
    upperObjective: ({ lower, upper }) =>
      add(half(sub(upper.get('phi')!, left)), half(sub(lower.get('theta')!, right))),
    lowerObjective: ({ lower, upper }) => half(sub(lower.get('theta')!, image(upper.get('phi')!))),
  };
}

/** φ of the penalized problem: (I + c AᵀA)⁻¹ (a + c Aᵀb) with c = λ/(1 + λ), and c = 1 without penalty's error. */
function solution(c: number): number[] {
  const At = transposed(A);
  const system = [0, 1].map((i) => [0, 1].map((j) => Number(i === j) + c * times(At, [A[0][j], A[1][j]])[i]));
  return solve(
    system,
    times(At, b).map((x, i) => a[i] + c * x),
  );
}

/** The lower level is ½|θ - Aφ|²: one step of length 1 solves it. */
const exact = { steps: 1, learningRate: 1 };

function run(options: BilevelOptions, steps: number, from = [0, 0, 0, 0]): { theta: number[]; phi: number[] } {
  return scope(() => {
    const [theta, phi] = [vector(from.slice(0, 2)), vector(from.slice(2))];
    using optimizer = new BilevelOptimizer(quadratic(theta, phi), options);
    for (let i = 0; i < steps; i++) scope(() => void optimizer.step());
    return { theta: values(theta), phi: values(phi) };
  });
}

/** θ of the penalized problem: (1 + λ) θ = b + λ Aφ. */
const settled = (lambda: number, phi: readonly number[]): number[] =>
  times(A, phi).map((x, i) => (b[i] + lambda * x) / (1 + lambda));

describe('a quadratic problem', () => {
  it.each([1, 10, 1000])('is at rest where the penalized problem has its solution, λ = %f', (lambda) => {
    const phi = solution(lambda / (1 + lambda));
    scope(() => {
      using optimizer = new BilevelOptimizer(quadratic(vector(settled(lambda, phi)), vector(phi)), {
        penalty: lambda,
        lowerLevel: exact,
        learningRates: { lower: 0, upper: 0 },
      });
      optimizer.evaluate();
      for (const group of ['lower', 'upper'] as const)
        for (const t of optimizer.gradientBuffers[group].values())
          for (const x of values(t)) expect(Math.abs(x)).toBeLessThan(1e-11 * (1 + lambda));
    });
    // ... and that solution tends to the bilevel one as 1/λ.
    const limit = solution(1);
    for (const [i, x] of phi.entries()) expect(Math.abs(x - limit[i])).toBeLessThan(2 / lambda);
  });

  it('gets there', () => {
    const lambda = 2;
    const optimizer = { kind: 'sgd', momentum: 0.7, weightDecay: 0 } as const;
    const options = { penalty: lambda, lowerLevel: exact, learningRates: { lower: 0.2, upper: 0.2 }, optimizer };
    const { theta, phi } = run(options, 150);
    const expected = solution(lambda / (1 + lambda));
    phi.forEach((x, i) => {
      expect(x).toBeCloseTo(expected[i], 6);
    });
    settled(lambda, expected).forEach((x, i) => {
      expect(theta[i]).toBeCloseTo(x, 6);
    });
  });

  it('follows a schedule of the penalty towards the bilevel solution', () => {
    const first = { penalty: 1, lowerLevel: exact, learningRates: { lower: 0.01, upper: 0.01 } };
    const optimizer = { kind: 'sgd', momentum: 0.9, weightDecay: 0 } as const;
    const growing = { ...first, optimizer, penalty: (step: number) => Math.min(50, 1 + step) };
    const limit = solution(1);
    const distance = (options: BilevelOptions): number =>
      Math.hypot(...run(options, 250).phi.map((x, i) => x - limit[i]));
    expect(distance(growing)).toBeLessThan(0.02);
    const ramp = { ...first, optimizer, penalty: penaltySchedule({ value: 50, name: 'cosine', rampSteps: 60 }) };
    expect(distance(ramp)).toBeLessThan(0.02);
    expect(distance({ ...first, optimizer })).toBeGreaterThan(0.1);
  });

  it('reports the penalty of its schedule, and F with it', () => {
    scope(() => {
      using optimizer = new BilevelOptimizer(quadratic(vector([1, 2]), vector([-1, 0.5])), {
        penalty: penaltySchedule({ value: 3, name: 'linear', rampSteps: 2 }),
        lowerLevel: { steps: 1, learningRate: 0.5 },
        learningRates: { lower: 0.01, upper: 0.01 },
      });
      for (const penalty of [0, 1.5, 3, 3]) {
        const step = optimizer.step();
        const gap = step.lower.item() - step.lowerOptimum.item();
        expect(step.penalty).toBe(penalty);
        expect(step.objective.item()).toBeCloseTo(step.upper.item() + penalty * gap, 12);
      }
    });
  });

  it('has the hypergradient where θ has settled, up to 1/λ', () => {
    // At fixed φ, θ settles at (b + λAφ)/(1 + λ); then ∇_φF = φ - a + c Aᵀ(Aφ - b), and c → 1 gives the hypergradient.
    for (const lambda of [10, 1000]) {
      scope(() => {
        const at = [0.3, -0.7];
        const image = times(A, at);
        using optimizer = new BilevelOptimizer(quadratic(vector(settled(lambda, at)), vector(at)), {
          penalty: lambda,
          lowerLevel: exact,
          learningRates: { lower: 0, upper: 0 },
        });
        optimizer.evaluate();
        const c = lambda / (1 + lambda);
        const back = times(
          transposed(A),
          image.map((x, i) => x - b[i]),
        );
        const gradient = values(optimizer.gradientBuffers.upper.get('phi')!);
        gradient.forEach((x, i) => {
          expect(x).toBeCloseTo(at[i] - a[i] + c * back[i], 9);
          expect(Math.abs(x - (at[i] - a[i] + back[i]))).toBeLessThan((2 * Math.abs(back[i])) / lambda);
        });
        for (const x of values(optimizer.gradientBuffers.lower.get('theta')!)) expect(Math.abs(x)).toBeLessThan(1e-9);
      });
    }
  });

  it('reports F and its parts, terms included, and does not move on evaluate', () => {
    scope(() => {
      const [theta, phi] = [vector([1, 2]), vector([-1, 0.5])];
      const problem: BilevelProblem = {
        ...quadratic(theta, phi),
        terms: [
          {
            name: 'size',
            weight: 0.25,
            value: ({ lower, upper }) => add(half(lower.get('theta')!), half(upper.get('phi')!)),
          },
        ],
      };
      using optimizer = new BilevelOptimizer(problem, {
        penalty: 3,
        lowerLevel: { steps: 1, learningRate: 0.5 },
        learningRates: { lower: 0.1, upper: 0.1 },
      });
      const step = optimizer.evaluate();
      const image = times(A, [-1, 0.5]);
      const squares = (v: readonly number[]): number => 0.5 * v.reduce((total, x) => total + x * x, 0);
      const f = squares([-1 - a[0], 0.5 - a[1]]) + squares([1 - b[0], 2 - b[1]]);
      const g = squares([1 - image[0], 2 - image[1]]);
      const size = squares([1, 2]) + squares([-1, 0.5]);
      expect(step.upper.item()).toBeCloseTo(f, 12);
      expect(step.lower.item()).toBeCloseTo(g, 12);
      expect(step.lowerOptimum.item()).toBeCloseTo(g / 4, 12); // one step of ½ halves the distance
      expect(step.terms.get('size')!.item()).toBeCloseTo(size, 12);
      expect(step.objective.item()).toBeCloseTo(f + 3 * (g - g / 4) + 0.25 * size, 12);
      expect([...values(theta), ...values(phi)]).toEqual([1, 2, -1, 0.5]);
    });
  });
});

describe('choosing the strength of ridge regression', () => {
  // Lower level: w minimizes ½|Xw - y|² + ½ e^φ |w|². Upper level: ½|X'w - y'|² on held-out rows.
  const X = [
    [1, 0.9],
    [0.2, -0.5],
    [-1.1, -0.7],
    [0.6, 1.2],
  ];
  const y = [2.4, -0.9, -0.8, 1.1];
  const heldOutX = [
    [0.8, 0.1],
    [-0.3, 0.7],
    [1.5, 1],
  ];
  const heldOutY = [0.7, 0.2, 1.6];

  const ridge = (strength: number): number[] => {
    const gram = [0, 1].map((i) =>
      [0, 1].map((j) => X.reduce((t, row) => t + row[i] * row[j], 0) + Number(i === j) * strength),
    );
    return solve(gram, times(transposed(X), y));
  };
  const heldOutLoss = (phi: number): number => {
    const w = ridge(Math.exp(phi));
    return 0.5 * heldOutX.reduce((t, row, i) => t + (row[0] * w[0] + row[1] * w[1] - heldOutY[i]) ** 2, 0);
  };
  /** The minimum of the held-out loss, by golden-section search on the closed form. */
  const best = (() => {
    let [low, high] = [-6, 6];
    const ratio = (Math.sqrt(5) - 1) / 2;
    for (let i = 0; i < 80; i++) {
      const [p, q] = [high - ratio * (high - low), low + ratio * (high - low)];
      if (heldOutLoss(p) < heldOutLoss(q)) high = q;
      else low = p;
    }
    return (low + high) / 2;
  })();

  const matrix = (rows: readonly number[][]): Tensor =>
    Tensor.from(Float64Array.from(rows.flat()), { shape: [rows.length, 2] });
  const residual = (x: Tensor, weights: Tensor, target: Tensor): Tensor =>
    sub(reshape(matmul(x, reshape(weights, [2, 1])), [target.size]), target);

  function problem(w: Tensor, phi: Tensor): BilevelProblem {
    const [trainX, trainY, testX, testY] = [matrix(X), vector(y), matrix(heldOutX), vector(heldOutY)];
    return {
      lower: new Map([['w', w]]),
      upper: new Map([['phi', phi]]),
      upperObjective: ({ lower }) => half(residual(testX, lower.get('w')!, testY)),
      lowerObjective: ({ lower, upper }) => {
        const strength = reshape(exp(upper.get('phi')!), []);
        return add(half(residual(trainX, lower.get('w')!, trainY)), mul(half(lower.get('w')!), strength));
      },
    };
  }

  /** w where f + λ g is smallest at a fixed φ. */
  function settledWeights(lambda: number, phi: number): number[] {
    const gram = (rows: readonly number[][], i: number, j: number): number =>
      rows.reduce((t, row) => t + row[i] * row[j], 0);
    const system = [0, 1].map((i) =>
      [0, 1].map((j) => gram(heldOutX, i, j) + lambda * (gram(X, i, j) + Number(i === j) * Math.exp(phi))),
    );
    const [near, far] = [times(transposed(heldOutX), heldOutY), times(transposed(X), y)];
    return solve(
      system,
      near.map((x, i) => x + lambda * far[i]),
    );
  }

  it.each([-2, 0.5, best])('has the hypergradient of the closed form at φ = %f', (at) => {
    const slope = (heldOutLoss(at + 1e-5) - heldOutLoss(at - 1e-5)) / 2e-5;
    const error = [1e2, 1e4].map((lambda) =>
      scope(() => {
        using optimizer = new BilevelOptimizer(problem(vector(settledWeights(lambda, at)), vector([at])), {
          penalty: lambda,
          lowerLevel: { steps: 250, learningRate: 0.2 },
          learningRates: { lower: 0, upper: 0 },
        });
        optimizer.evaluate();
        return Math.abs(values(optimizer.gradientBuffers.upper.get('phi')!)[0] - slope);
      }),
    );
    expect(error[1]).toBeLessThan(1e-4 * (1 + Math.abs(slope)));
    expect(error[1]).toBeLessThan(error[0] / 50 + 1e-6); // of order 1/λ
  });

  it('finds the strength, the lower level started warm', () => {
    scope(() => {
      const start = -1.5;
      const [w, phi] = [vector(ridge(Math.exp(start))), vector([start])];
      using optimizer = new BilevelOptimizer(problem(w, phi), {
        penalty: 50,
        lowerLevel: { steps: 4, learningRate: 0.2, warmStart: true },
        learningRates: { lower: 0.01, upper: 0.05 },
        optimizer: { kind: 'adamw', beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weightDecay: 0 },
      });
      for (let i = 0; i < 400; i++) scope(() => void optimizer.step());
      const [found] = values(phi);
      expect(Math.abs(best - start)).toBeGreaterThan(0.5);
      expect(Math.abs(found - best)).toBeLessThan(0.1);
      expect(heldOutLoss(found) - heldOutLoss(best)).toBeLessThan(1e-3);
    });
  });
});

describe('solvers of the lower level', () => {
  // L = ½ Σ c_i θ_i²; every solver has its closed recursion.
  const c = [0.5, 2];
  const lower = (solver: 'gradient' | 'momentum' | 'adam', steps: number): number[] =>
    scope(() => {
      const buffer = vector([0, 0]);
      const start = new Map([['w', vector([1, -3])]]);
      const gradient = (theta: Map<string, Tensor>) => {
        buffer.write(values(theta.get('w')!).map((x, i) => c[i] * x));
        return new Map([['w', buffer]]);
      };
      const result = descend(start, start, gradient, { steps, learningRate: 0.05, solver });
      const found = values(result.theta.get('w')!);
      result.release();
      expect(values(start.get('w')!)).toEqual([1, -3]);
      return found;
    });

  it('momentum', () => {
    const expected = [1, -3].map((x0, i) => {
      let [x, v] = [x0, 0];
      for (let k = 0; k < 5; k++) {
        v = k === 0 ? c[i] * x : 0.9 * v + c[i] * x;
        x -= 0.05 * v;
      }
      return x;
    });
    lower('momentum', 5).forEach((x, i) => {
      expect(x).toBeCloseTo(expected[i], 12);
    });
  });

  it('Adam', () => {
    const expected = [1, -3].map((x0, i) => {
      let [x, m, v] = [x0, 0, 0];
      for (let k = 1; k <= 5; k++) {
        const g = c[i] * x;
        m = 0.9 * m + 0.1 * g;
        v = 0.999 * v + 0.001 * g * g;
        x -= (0.05 * (m / (1 - 0.9 ** k))) / (Math.sqrt(v / (1 - 0.999 ** k)) + 1e-8);
      }
      return x;
    });
    lower('adam', 5).forEach((x, i) => {
      expect(x).toBeCloseTo(expected[i], 12);
    });
  });
});

describe('the lower level of the optimizer', () => {
  // g = ½|θ - Aφ|² pulls each coordinate by its distance d alone: every solver has its closed recursion in d.
  const phi = [0.7, -1.1];
  const start = [2, -3];
  const rate = 0.1;

  function distances(solver: 'gradient' | 'momentum' | 'adam', steps: number, from: readonly number[]): number[] {
    return from.map((d0) => {
      let [d, first, second] = [d0, 0, 0];
      for (let k = 1; k <= steps; k++) {
        const g = d;
        if (solver === 'adam') {
          first = 0.9 * first + 0.1 * g;
          second = 0.999 * second + 0.001 * g * g;
          d -= (rate * first) / (1 - 0.9 ** k) / (Math.sqrt(second / (1 - 0.999 ** k)) + 1e-8);
        } else {
          first = (solver === 'momentum' ? 0.9 : 0) * first + g;
          d -= rate * first;
        }
      }
      return d;
    });
  }

  const optimum = (d: readonly number[]): number => d.reduce((total, x) => total + 0.5 * x * x, 0);

  it.each([
    ['gradient', 3],
    ['momentum', 4],
    ['adam', 4],
  ] as const)('%s, %d steps: started warm it goes on where it ended, else at θ', (solver, steps) => {
    for (const warmStart of [true, false])
      scope(() => {
        using optimizer = new BilevelOptimizer(quadratic(vector(start), vector(phi)), {
          penalty: 1,
          lowerLevel: { steps, learningRate: rate, solver, warmStart },
          learningRates: { lower: 0, upper: 0 },
        });
        const image = times(A, phi);
        let d = start.map((x, i) => x - image[i]);
        for (let outer = 0; outer < 3; outer++) {
          const from = warmStart || outer === 0 ? d : start.map((x, i) => x - image[i]);
          d = distances(solver, steps, from);
          expect(optimizer.step().lowerOptimum.item(), `${outer}, warm ${warmStart}`).toBeCloseTo(optimum(d), 11);
        }
      });
  });
});

describe('bad input', () => {
  const make =
    (change: Partial<BilevelOptions>, terms: BilevelProblem['terms'] = []) =>
    () =>
      scope(() => {
        const options = {
          penalty: 1,
          lowerLevel: { steps: 1, learningRate: 0.1 },
          learningRates: { lower: 0.1, upper: 0.1 },
          ...change,
        };
        using optimizer = new BilevelOptimizer({ ...quadratic(vector([0, 0]), vector([0, 0])), terms }, options);
        optimizer.step();
      });
  it.each([
    [{ penalty: -1 }, /penalty \(lambda\): expected a number of at least 0, found -1/],
    [
      { lowerLevel: { steps: 1.5, learningRate: 0.1 } },
      /lower steps \(K\): expected a whole number of at least 0, found 1.5/,
    ],
    [
      { lowerLevel: { steps: 1, learningRate: 0 } },
      /lower learning rate \(alpha\): expected a number above 0, found 0/,
    ],
    [{ learningRates: { lower: -1, upper: 0 } }, /lower learning rate: expected a number of at least 0, found -1/],
    [
      { learningRates: { lower: 0, upper: Number.POSITIVE_INFINITY } },
      /upper learning rate: expected a number of at least 0, found Infinity/,
    ],
  ] as [Partial<BilevelOptions>, RegExp][])('%j', (change, message) => {
    expect(make(change)).toThrow(message);
  });

  it.each([-0.5, Number.NaN, Number.POSITIVE_INFINITY])('a term of weight %f', (weight) => {
    const term = (w: number): BilevelTerm => ({
      name: 'size',
      weight: w,
      value: ({ lower }) => half(lower.get('theta')!),
    });
    expect(make({}, [term(1), term(weight)])).toThrow(
      `weight of the term size: expected a number of at least 0, found ${weight}`,
    );
    expect(make({}, [term(1), term(0)])).not.toThrow();
  });

  it('an empty group', () => {
    const problem = scope(() => ({
      ...quadratic(detachFromScope(vector([0])), detachFromScope(vector([0]))),
      lower: new Map(),
    }));
    expect(
      () =>
        new BilevelOptimizer(problem, {
          penalty: 1,
          lowerLevel: { steps: 0, learningRate: 0 },
          learningRates: { lower: 0, upper: 0 },
        }),
    ).toThrow(/lower variables: expected at least one/);
  });

  it('leaves nothing behind', () => {
    scope(() => {
      const problem = quadratic(vector([0, 0]), vector([0, 0]));
      const before = memory().storages;
      const optimizer = new BilevelOptimizer(problem, {
        penalty: 1,
        lowerLevel: { steps: 2, learningRate: 0.1, warmStart: true, solver: 'adam' },
        learningRates: { lower: 0.1, upper: 0.1 },
      });
      for (let i = 0; i < 3; i++) scope(() => void optimizer.step());
      optimizer.dispose();
      expect(memory().storages).toBe(before);
    });
  });
});
