// The executor: errors of the arithmetic surface at the next read with the op's name and harm nothing else; the ring pushes
// back; the event loop stays free; large graphs.
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import '../../src/ops/methods.js';
import { grad } from '../../src/autograd/transforms.js';
import { launch } from '../../src/native/launch.js';
import { addInPlace } from '../../src/ops/elementwise.js';
import { concat, copyInto, zeros } from '../../src/ops/movement.js';
import { scope } from '../../src/tensor/scope.js';
import { memory, setDefaultDevice, synchronize } from '../../src/tensor/storage.js';
import { Tensor } from '../../src/tensor/tensor.js';
import { testDevices } from '../support/devices.js';

const table = (): Tensor =>
  Tensor.from([
    [1, 2],
    [3, 4],
  ]);
const failing = (t: Tensor): Tensor => t.gatherRows(Tensor.from(Int32Array.of(9)));

describe.each(testDevices())('on %s', (device) => {
  // A GPU, and more so its imitation, takes long for many small commands.
  const many = (count: number): number => (device === 'cpu' ? count : count / 50);
  let before = 0;
  beforeAll(() => setDefaultDevice(device));
  afterAll(() => setDefaultDevice('cpu'));
  beforeEach(() => {
    before = memory().storages;
  });
  afterEach(() => expect(memory().storages).toBe(before));

  describe('deferred errors', () => {
    test('reject the read, naming the op, and again for every read of the tensor', async () => {
      const [t, bad] = scope(() => {
        const x = table();
        return [x, failing(x)];
      });
      await expect(bad.data()).rejects.toThrow(/^\[gatherRows\].*9/);
      await expect(bad.data()).rejects.toThrow('[gatherRows]');
      expect(() => bad.dataSync()).toThrow('[gatherRows]');
      expect([...(await t.data())]).toEqual([1, 2, 3, 4]);
      t.dispose();
      bad.dispose();
    });

    test('pass on to what depends on the tensor, under the name of the op that failed', () => {
      scope(() => {
        const bad = failing(table()).mul(2).add(1).sum();
        expect(() => bad.item()).toThrow('[gatherRows]');
      });
    });

    test('reach what depends on them also when they are told of before it is read', () => {
      scope(() => {
        const x = table();
        const bad = failing(x);
        const [dependent, sound] = [bad.mul(2).add(1), x.mul(2).add(1)];
        const joined = concat([x, dependent]);
        expect(() => synchronize()).toThrow('[gatherRows]');
        for (let i = 0; i < 2; i++) {
          for (const t of [dependent, joined, bad]) expect(() => t.dataSync()).toThrow('[gatherRows]');
          expect([...sound.dataSync()]).toEqual([3, 5, 7, 9]);
        }
      });
    });

    test('end where a tensor is overwritten before anybody is told', () => {
      scope(() => {
        const x = table();
        const [bad, part] = [failing(x), failing(x)];
        const early = bad.mul(2);
        bad.write([5, 6]);
        part.slice(1, 0, 1).write([5]);
        const late = bad.mul(2);
        expect(() => synchronize()).toThrow('[gatherRows]');
        expect(() => early.dataSync()).toThrow('[gatherRows]');
        expect(() => part.dataSync()).toThrow('[gatherRows]');
        expect([[...bad.dataSync()], [...late.dataSync()]]).toEqual([
          [5, 6],
          [10, 12],
        ]);
      });
    });

    test('of several ops are each told of', () => {
      scope(() => {
        const x = table();
        const [first, second] = [
          x.gatherRows(Tensor.from(Int32Array.of(9))),
          x.gatherRows(Tensor.from(Int32Array.of(8))),
        ];
        expect(() => first.dataSync()).toThrow('found 9');
        expect(() => second.dataSync()).toThrow('found 8');
      });
    });

    test('leave unrelated tensors as they are, older and newer', () => {
      scope(() => {
        const x = table();
        const early = x.mul(2);
        const bad = failing(x);
        const late = x.mul(3);
        expect(() => synchronize()).toThrow('[gatherRows]');
        expect([...early.dataSync()]).toEqual([2, 4, 6, 8]);
        expect([...late.dataSync()]).toEqual([3, 6, 9, 12]);
        expect(() => bad.dataSync()).toThrow('[gatherRows]');
        expect([...late.dataSync()]).toEqual([3, 6, 9, 12]);
      });
    });

    test('that nobody has read surface at the next read of anything, once', async () => {
      const x = scope(() => {
        const t = table();
        failing(t);
        return t;
      });
      await expect(x.data()).rejects.toThrow('[gatherRows]');
      expect([...(await x.data())]).toEqual([1, 2, 3, 4]);
      x.dispose();
    });

    test('end with their tensor: memory that is used again is sound', () => {
      scope(() => {
        const bad = failing(table());
        expect(() => bad.dataSync()).toThrow('[gatherRows]');
        bad.dispose();
      });
      for (let i = 0; i < 20; i++)
        scope(() => {
          const t = Tensor.empty([1, 2]);
          t.write([i, i]);
          expect(t.sum().item()).toBe(2 * i);
        });
    });

    test('are healed by overwriting the whole tensor', () => {
      scope(() => {
        const bad = failing(table());
        expect(() => bad.dataSync()).toThrow('[gatherRows]');
        bad.write([5, 6]);
        expect([...bad.dataSync()]).toEqual([5, 6]);
      });
    });

    test('stay where only a part is overwritten', () => {
      scope(() => {
        const bad = failing(table());
        expect(() => bad.dataSync()).toThrow('[gatherRows]');
        bad.slice(1, 0, 1).write([5]);
        expect(() => bad.dataSync()).toThrow('[gatherRows]');
        copyInto(bad.slice(1, 0, 1), Tensor.from([[1]]));
        expect(() => bad.dataSync()).toThrow('[gatherRows]');
        copyInto(bad, Tensor.from([[1, 2]]));
        expect([...bad.dataSync()]).toEqual([1, 2]);
      });
    });

    test('in a kernel that writes in place leave its operands valid', () => {
      scope(() => {
        const [param, gradient] = [Tensor.from([1, 2]), Tensor.from([1, 1], { dtype: 'float64' })];
        const scalars = Tensor.from(Float64Array.of(0.1, 1, 1, 0));
        launch('sgd', [scalars, param, null, gradient, null], [0, 0]);
        expect(() => synchronize()).toThrow('[sgd]');
        expect([...param.dataSync()]).toEqual([1, 2]);
      });
    });
  });

  describe('what is refused when it is enqueued', () => {
    test('an unknown kernel', () => {
      expect(() => launch('nonsense', [])).toThrow('[launch] no kernel is named nonsense');
    });

    test('more axes than the contract has', () => {
      using x = Tensor.empty([1, 1, 1, 1, 1, 1, 1, 1, 1]);
      expect(() => scope(() => x.add(1))).toThrow(/\[add\] expected at most 8 axes, found 9 \(f32/);
    });
  });

  describe('the ring', () => {
    test('pushes back under many small ops, whose order is kept', () => {
      scope(() => {
        const count = many(200_000);
        const [total, one] = [zeros([4]), Tensor.from([1, 2, 3, 4])];
        const { reserved } = memory();
        for (let i = 0; i < count; i++) addInPlace(total, one);
        expect([...total.dataSync()]).toEqual([count, 2 * count, 3 * count, 4 * count]);
        expect(memory().reserved).toBe(reserved);
      });
    });

    test('many tensors made and dropped reuse the same memory', () => {
      scope(() => {
        const x = Tensor.from(new Float32Array(1000).fill(1));
        x.add(1).dispose();
        const { reserved } = memory();
        let y = x.add(0);
        for (let i = 0; i < many(50_000); i++) {
          const next = y.add(1);
          y.dispose();
          y = next;
        }
        expect(y.dataSync()[999]).toBe(many(50_000) + 1);
        expect(memory().reserved).toBe(reserved);
      });
    });

    test('a command with a thousand tensors', () => {
      scope(() => {
        const tensors = Array.from({ length: 1000 }, (_, i) => Tensor.from([i]));
        const total = Tensor.from(Float64Array.of(0));
        launch('sumSquares', [total, ...tensors], [0]);
        expect(total.item()).toBe((999 * 1000 * 1999) / 6);
      });
    });

    test('uploads between ops take their turn', () => {
      scope(() => {
        const x = Tensor.from([1]);
        const sums: Tensor[] = [];
        for (let i = 0; i < many(1000); i++) {
          x.write([i]);
          sums.push(x.mul(2));
        }
        expect(sums.map((t) => t.item())).toEqual(Array.from({ length: many(1000) }, (_, i) => 2 * i));
      });
    });
  });

  describe('large graphs', () => {
    test('the gradient through a long row of ops', () => {
      scope(() => {
        const x = Tensor.from(Float64Array.of(0.5));
        const [g] = grad((t: Tensor) => {
          let y = t;
          for (let i = 0; i < many(10_000); i++) y = y.mul(1.0001).add(1e-6);
          return y.sum();
        })(x);
        expect(g.item()).toBeCloseTo(1.0001 ** many(10_000), 9);
      });
    });

    test('the gradient of a sum over thousands of branches, and of its gradient', () => {
      scope(() => {
        const x = Tensor.from(Float64Array.of(0.5));
        const wide = (t: Tensor): Tensor => {
          let total = t.mul(0);
          for (let i = 1; i <= many(2500); i++) total = total.add(t.square().mul(i));
          return total.sum();
        };
        const sum = (many(2500) * (many(2500) + 1)) / 2;
        expect(grad(wide)(x)[0].item()).toBe(sum);
        expect(grad((t: Tensor) => grad(wide)(t)[0].sum())(x)[0].item()).toBe(2 * sum);
      });
    });
  });

  describe('JavaScript', () => {
    test('keeps running while a long product is awaited', async () => {
      const [x, y] = scope(() => {
        const a = Tensor.from(new Float32Array(1024 * 1024).fill(0.001), { shape: [1024, 1024] });
        let product = a;
        for (let i = 0; i < 12; i++) product = product.matmul(a);
        return [a, product];
      });
      let turns = 0;
      let done = false;
      const spin = (): void => {
        turns++;
        if (!done) setImmediate(spin);
      };
      setImmediate(spin);
      const values = await y.data();
      done = true;
      expect(turns).toBeGreaterThan(10);
      expect(values.length).toBe(1024 * 1024);
      x.dispose();
      y.dispose();
    });

    test('a hundred reads at once resolve in order of asking', async () => {
      const tensors = Array.from({ length: 100 }, (_, i) => Tensor.from([i]));
      const order: number[] = [];
      await Promise.all(tensors.map((t) => t.data().then(([v]) => order.push(v))));
      expect(order).toEqual(Array.from({ length: 100 }, (_, i) => i));
      for (const t of tensors) t.dispose();
    });
  });
});
