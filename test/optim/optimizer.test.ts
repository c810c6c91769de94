// AdamW and SGD step by step as torch takes them; groups, decay, skipping, masters beside bfloat16, memory.
import { describe, expect, it } from 'vitest';
import { KeelgradError } from '../../src/errors.js';
import '../../src/ops/methods.js';
import { Optimizer, type OptimizerOptions } from '../../src/optim/optimizer.js';
import type { DType } from '../../src/tensor/dtype.js';
import { scope } from '../../src/tensor/scope.js';
import { memory } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { describeWithShared, readSharedJson } from '../shared.js';

type Nested = number | Nested[];
type Values = Record<string, Nested>;

interface RecordedOptimizer {
  readonly name: string;
  readonly class: string;
  readonly arguments: {
    readonly lr: number;
    readonly betas?: [number, number];
    readonly eps?: number;
    readonly weight_decay: number;
    readonly momentum?: number;
    readonly dampening?: number;
    readonly nesterov?: boolean;
  };
  readonly missing?: Record<string, number[]>;
  readonly lr_factors: number[];
  readonly float64: Values[];
  readonly float32?: Values[];
}

const flat = (values: Nested): number[] => [values].flat(9) as number[];

/** A map of tensors with values of their own. */
const upload = (values: Values, dtype: DType): Map<string, Tensor> =>
  new Map(Object.entries(values).map(([name, v]) => [name, Tensor.from(v as never, { dtype })]));

const scalar = (value: number): Tensor => Tensor.from(Float64Array.of(value));
const noChange = () => ({ factor: scalar(1), skip: scalar(0) });

function optionsOf({ class: name, arguments: a }: RecordedOptimizer): OptimizerOptions {
  const common = { weightDecay: a.weight_decay, decays: () => true };
  if (name === 'torch.optim.SGD') return { kind: 'sgd', momentum: a.momentum!, ...common };
  const [beta1, beta2] = a.betas ?? [0.9, 0.999];
  return { kind: 'adamw', beta1, beta2, epsilon: a.eps ?? 1e-8, ...common };
}

/** Not here: L2 in Adam, dampening, Nesterov. */
const isOurs = ({ class: name, arguments: a }: RecordedOptimizer): boolean =>
  name === 'torch.optim.AdamW' || (name === 'torch.optim.SGD' && a.dampening === 0 && !a.nesterov);

describeWithShared('recorded optimizers', 'golden/training/optimizers.json', () => {
  const golden = () => readSharedJson('golden/training/optimizers.json');
  const recorded: RecordedOptimizer[] = golden().optimizers;
  const cases = recorded
    .filter(isOurs)
    .flatMap((entry) =>
      (['float64', 'float32'] as const).filter((dtype) => entry[dtype]).map((dtype) => ({ ...entry, dtype })),
    );

  it.each(cases)('$name x $lr_factors in $dtype', (entry) => {
    const { gradients, initial } = golden();
    const { dtype, missing = {}, lr_factors } = entry;
    const tolerance = dtype === 'float64' ? 1e-13 : 2e-6;
    scope(() => {
      const parameters = upload(initial, dtype);
      const buffers = upload(gradients[0], dtype);
      // A parameter without a gradient in some steps is stepped on its own: a group's parameters all have one.
      const optimizers = [...parameters].map(([name, t]) => {
        const group = { name, parameters: new Map([[name, t]]), gradients: new Map([[name, buffers.get(name)!]]) };
        return { name, optimizer: new Optimizer([group], optionsOf(entry)) };
      });
      entry[dtype]!.forEach((expected, step) => {
        for (const { name, optimizer } of optimizers) {
          if (missing[name]?.includes(step)) continue;
          buffers.get(name)!.write(flat(gradients[step][name]));
          optimizer.step([entry.arguments.lr * lr_factors[step]], noChange());
        }
        for (const [name, t] of parameters)
          flat(expected[name]).forEach((value, i) => {
            const found = t.dataSync()[i];
            expect(Math.abs(found - value), `step ${step} ${name}[${i}]`).toBeLessThan(
              tolerance * Math.max(1, Math.abs(value)),
            );
          });
      });
      for (const { optimizer } of optimizers) optimizer.dispose();
    });
  });
});

describe('Optimizer', () => {
  const adamw = (more: Partial<OptimizerOptions> = {}): OptimizerOptions =>
    ({ kind: 'adamw', beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weightDecay: 0, ...more }) as OptimizerOptions;
  const sgd = (more: object = {}): OptimizerOptions => ({ kind: 'sgd', momentum: 0, weightDecay: 0, ...more });
  const list = (...values: number[]): Tensor => Tensor.from(Float64Array.from(values));
  const matrix = (...values: number[]): Tensor => Tensor.from(Float64Array.from(values), { shape: [1, values.length] });
  const group = (name: string, parameters: Record<string, Tensor>, gradients: Record<string, Tensor>) => ({
    name,
    parameters: new Map(Object.entries(parameters)),
    gradients: new Map(Object.entries(gradients)),
  });

  it('SGD: decay is added to the gradient, momentum starts from the first gradient', () => {
    scope(() => {
      const p = matrix(1, -2);
      const o = new Optimizer([group('g', { p }, { p: matrix(0.5, 1) })], sgd({ momentum: 0.9, weightDecay: 0.1 }));
      let expected = [1, -2];
      let velocity = [0, 0];
      for (let step = 0; step < 4; step++) {
        o.step([0.1], noChange());
        velocity = velocity.map((v, i) => (step === 0 ? 0 : 0.9 * v) + [0.5, 1][i] + 0.1 * expected[i]);
        expected = expected.map((x, i) => x - 0.1 * velocity[i]);
        expect(Math.max(...expected.map((x, i) => Math.abs(x - p.dataSync()[i])))).toBeLessThan(1e-15);
      }
      o.dispose();
    });
  });

  it('by default decays what has two axes or more', () => {
    scope(() => {
      const [w, b] = [matrix(1), list(1)];
      const o = new Optimizer([group('g', { w, b }, { w: matrix(0), b: list(0) })], adamw({ weightDecay: 0.5 }));
      o.step([0.1], noChange());
      expect([w.item(), b.item()]).toEqual([1 - 0.1 * 0.5, 1]);
      o.dispose();
    });
  });

  it('takes each group at its own rate, and the whole step times the clip factor', () => {
    scope(() => {
      const [a, b] = [list(1), list(1)];
      const groups = [group('x', { a }, { a: list(1) }), group('y', { b }, { b: list(1) })];
      const o = new Optimizer(groups, sgd());
      o.step([0.1, 0.01], { factor: scalar(0.5), skip: scalar(0) });
      expect([a.item(), b.item()]).toEqual([0.95, 0.995]);
      expect(o.steps).toBe(1);
      expect([...o.masters('y')]).toEqual([['b', b]]);
      expect(o.masters('z').size).toBe(0);
      o.dispose();
    });
  });

  it.each([
    adamw({ weightDecay: 0.1, decays: () => true }),
    sgd({ momentum: 0.9, weightDecay: 0.1, decays: () => true }),
  ])('a step that is skipped leaves weights and state as they were: $kind', (options) => {
    scope(() => {
      const run = (skipped: number[]): number[] => {
        const p = list(1, 2);
        const g = list(0.5, -1);
        const o = new Optimizer([group('g', { p }, { p: g })], options);
        o.step([0.1], noChange());
        for (const bad of skipped) {
          g.write([bad, bad]);
          const before = [...p.dataSync()];
          o.step([0.1], { factor: scalar(Number.NaN), skip: scalar(1) });
          expect([...p.dataSync()]).toEqual(before);
        }
        o.dispose();
        return [...p.dataSync()];
      };
      expect(run([Number.NaN, Number.POSITIVE_INFINITY])).toEqual(run([]));
    });
  });

  it('keeps float32 masters beside bfloat16: small steps add up', () => {
    scope(() => {
      const p = Tensor.from(Float32Array.of(1), { dtype: 'bfloat16' });
      const g = Tensor.from(Float32Array.of(1));
      const o = new Optimizer([group('g', { p }, { p: g })], sgd());
      for (let step = 0; step < 100; step++) o.step([1e-4], noChange());
      const master = o.masters('g').get('p')!;
      expect(master.dtype).toBe('float32');
      expect(Math.abs(master.item() - 0.99)).toBeLessThan(1e-5);
      expect(p.cast('float32').item()).toBe(master.cast('bfloat16').cast('float32').item());
      expect(p.cast('float32').item()).toBe(0.98828125);
      o.dispose();
    });
  });

  it('gives back its state and masters, not the parameters', () => {
    const start = memory().storages;
    const p = Tensor.from(Float32Array.of(1), { dtype: 'bfloat16' });
    const g = Tensor.from(Float32Array.of(1));
    const o = new Optimizer([group('g', { p }, { p: g })], adamw());
    expect(memory().storages).toBe(start + 5);
    o.dispose();
    expect(memory().storages).toBe(start + 2);
    expect(p.disposed).toBe(false);
    p.dispose();
    g.dispose();
    expect(memory().storages).toBe(start);
  });

  it('refuses a parameter without a gradient buffer, and leaves nothing behind', () => {
    scope(() => {
      const [p, q] = [list(1), list(2)];
      const start = memory().storages;
      const refused = (): Optimizer => new Optimizer([group('g', { p, q }, { p: list(0) })], adamw());
      scope(() => expect(refused).toThrow(KeelgradError));
      scope(() => expect(refused).toThrow(/parameter q has no gradient buffer/));
      expect(memory().storages).toBe(start);
    });
  });
});
