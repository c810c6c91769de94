// The case list is complete: every exported op has a case, every kernel of the contract is reached by one, and every
// differentiable op is gradchecked.
import { expect, test, vi } from 'vitest';
import '../../src/ops/methods.js';
import { kernelSignatures } from '../../src/native/launch.js';
import * as elementwise from '../../src/ops/elementwise.js';
import * as head from '../../src/ops/head.js';
import * as lora from '../../src/ops/lora.js';
import * as movement from '../../src/ops/movement.js';
import * as product from '../../src/ops/product.js';
import * as random from '../../src/ops/random.js';
import * as reduce from '../../src/ops/reduce.js';
import * as softmax from '../../src/ops/softmax.js';
import * as transformer from '../../src/ops/transformer.js';
import { scope } from '../../src/tensor/scope.js';
import { allCases, checkedCases } from '../support/cases.js';
import { evaluate } from '../support/checks.js';
import { hostInputs } from '../support/op-case.js';

const { launched } = vi.hoisted(() => ({ launched: new Set<string>() }));
vi.mock('../../src/native/launch.js', async (original) => {
  const real = await original<typeof import('../../src/native/launch.js')>();
  const launch: typeof real.launch = (kernel, ...rest) => {
    launched.add(kernel);
    real.launch(kernel, ...rest);
  };
  return { ...real, launch };
});

// Exports that are no ops of their own.
const others: Record<string, string> = {
  unary: 'the rows have cases by their own names',
  binary: 'the rows have cases by their own names',
  compare: 'the rows have cases by their own names',
  asRows: 'a reshape',
  biasCotangent: 'checked as the gradient of linear',
  VectorContribution: 'checked as the gradient of linear by sequence',
  requireLinear: 'a check',
  LookupContribution: 'checked as the gradient of gatherRows',
  rmsNormDefinition: 'checked beside its fused op',
  addRmsNormDefinition: 'checked beside its fused op',
  rotaryDefinition: 'checked beside its fused op',
  attentionDefinition: 'checked beside its fused op',
  adaptedLinearsDefinition: 'checked beside its fused op',
  lowRankBuffers: 'memory for adaptedLinears',
  fillLowRank: 'copies',
  lowRankOf: 'views',
  headDefinition: 'checked beside its fused op',
};

const modules = { elementwise, head, lora, movement, product, random, reduce, softmax, transformer };

test('every exported op has a case', () => {
  const covered = new Set(checkedCases().map((c) => c.op));
  const exported = Object.values(modules).flatMap((m) =>
    Object.entries(m).flatMap(([name, value]) => (typeof value === 'function' ? [name] : [])),
  );
  expect(exported.filter((name) => !covered.has(name) && !(name in others))).toEqual([]);
  expect(Object.keys(others).filter((name) => !exported.includes(name))).toEqual([]);
});

test('names are unique, and every case that is checked has a reference', () => {
  const names = allCases().map((c) => c.name);
  expect(names.filter((n, i) => names.indexOf(n) !== i)).toEqual([]);
  expect(checkedCases().filter((c) => !c.reference)).toEqual([]);
});

// All kernels, by small cases: those are what runs under the sanitizers and compute-sanitizer.
test('every kernel of the contract is reached by a small case', () => {
  for (const c of checkedCases().filter(({ size }) => size === 'small'))
    scope(() => void evaluate(c, { device: 'cpu', dtype: c.dtypes[0] }, hostInputs(c, c.dtypes[0])));
  const unreached = kernelSignatures().filter((k) => !launched.has(k.name));
  expect(unreached.map((k) => k.name)).toEqual([]);
});

test('every op with a derivative has a case that finite differences can check', () => {
  const differentiable = new Set(checkedCases().flatMap((c) => (c.differentiable ? [c.op] : [])));
  const checked = new Set(checkedCases().flatMap((c) => (c.differentiable && c.size === 'small' ? [c.op] : [])));
  expect([...differentiable].filter((op) => !checked.has(op))).toEqual([]);
});

test('every op has a case that is timed', () => {
  const timed = new Set(allCases().flatMap((c) => (c.size === 'bench' ? [c.op] : [])));
  const kernels = new Set(kernelSignatures().map((k) => k.name));
  const wanted = checkedCases().flatMap((c) => (kernels.has(c.op) && !c.op.endsWith('Backward') ? [c.op] : []));
  expect([...new Set(wanted)].filter((op) => !timed.has(op))).toEqual([]);
});
