// Every op at the shapes of the case list, value and gradient, with the matrix products in a table of their own.
import { load } from './build.mjs';
import { measure } from './harness.mjs';

const sizes = { float64: 8, float32: 4, bfloat16: 2, int32: 4 };
const productDtypes = ['float32', 'bfloat16', 'float64'];

/** Pieces of work, not run yet: { section, name, dtype, run }. */
export async function opWork({ device, dtypes, time, peer }) {
  const { allCases } = await load('test/support/cases.js');
  const { Tensor } = await load('src/tensor/tensor.js');
  const { scope } = await load('src/tensor/scope.js');
  const { synchronize } = await load('src/tensor/storage.js');
  const { vjp } = await load('src/autograd/transforms.js');
  const cases = await load('test/support/op-case.js');
  const { randomSource, sizeOf } = await load('test/support/host.js');

  /** Inputs laid out as the case says, made once. */
  function inputsOf(c, dtype) {
    const random = randomSource(c.name);
    return c.inputs.map((spec) => {
      const values = Float32Array.from({ length: sizeOf(spec.shape) }, (_, at) => spec.value(random, at));
      const t = Tensor.from(values, { shape: spec.shape, dtype: cases.dtypeOf(spec, dtype), device });
      return cases.layOut(t, spec.layout);
    });
  }

  const isVariable = (spec) => !spec.fixed && (spec.kind === 'value' || spec.kind === 'accumulator');

  function forward(c, at, inputs) {
    return () => {
      scope(() => void c.run(at, ...inputs));
      synchronize(device);
    };
  }

  function gradient(c, at, inputs) {
    const variables = inputs.filter((_, i) => isVariable(c.inputs[i]));
    const f = (...xs) => {
      let next = 0;
      return c.run(at, ...inputs.map((t, i) => (isVariable(c.inputs[i]) ? xs[next++] : t)));
    };
    const cotangent = scope(() =>
      c
        .run(at, ...inputs)
        .mul(0)
        .add(1),
    );
    return () => {
      scope(() => void vjp(f, variables, cotangent));
      synchronize(device);
    };
  }

  function work(c, dtype, withGradient) {
    const at = { device, dtype };
    const run = async () => {
      const inputs = inputsOf(c, dtype);
      const call = withGradient ? gradient(c, at, inputs) : forward(c, at, inputs);
      const measured = await measure(call, { time });
      for (const t of inputs) t.dispose();
      const told = {
        op: c.op,
        inputs: c.inputs.map(({ shape, kind, layout, fixed }) => ({ shape, kind, layout, fixed: !!fixed })),
      };
      const theirs = await peer?.time({ ...told, dtype, params: c.params, gradient: withGradient, time: time / 1e3 });
      return { ...measured, peer: theirs ?? undefined };
    };
    const { flops, elements } = c.cost;
    return {
      section: c.op === 'matmul' ? 'gemm' : withGradient ? 'ops, value and gradient' : 'ops, value',
      name: c.name,
      dtype,
      // Two products of the same size make the gradient.
      flops: flops && flops * (withGradient ? 3 : 1),
      bytes: elements && !withGradient ? elements * sizes[dtype] : undefined,
      run,
    };
  }

  return allCases()
    .filter((c) => c.size === 'bench')
    .flatMap((c) => {
      const wanted = c.op === 'matmul' ? productDtypes : dtypes.filter((d) => c.dtypes.includes(d));
      const gradients = c.differentiable && c.op !== 'matmul' ? [false, true] : [false];
      return gradients.flatMap((g) => wanted.map((dtype) => work(c, dtype, g)));
    });
}
