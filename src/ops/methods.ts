// The fluent interface: methods of Tensor, each a free function of src/ops. For users: the package itself calls the free
// functions, so that no module depends on this one having been loaded.
import { Tensor } from '../tensor/tensor.js';
import * as elementwise from './elementwise.js';
import * as movement from './movement.js';
import * as product from './product.js';
import * as reduce from './reduce.js';
import * as rows from './softmax.js';

const methods = {
  neg: elementwise.neg,
  abs: elementwise.abs,
  sign: elementwise.sign,
  exp: elementwise.exp,
  expm1: elementwise.expm1,
  log: elementwise.log,
  log1p: elementwise.log1p,
  sqrt: elementwise.sqrt,
  rsqrt: elementwise.rsqrt,
  reciprocal: elementwise.reciprocal,
  square: elementwise.square,
  sin: elementwise.sin,
  cos: elementwise.cos,
  tanh: elementwise.tanh,
  sigmoid: elementwise.sigmoid,
  logSigmoid: elementwise.logSigmoid,
  softplus: elementwise.softplus,
  relu: elementwise.relu,
  silu: elementwise.silu,
  add: elementwise.add,
  sub: elementwise.sub,
  mul: elementwise.mul,
  div: elementwise.div,
  pow: elementwise.pow,
  maximum: elementwise.maximum,
  minimum: elementwise.minimum,
  equal: elementwise.equal,
  notEqual: elementwise.notEqual,
  less: elementwise.less,
  lessEqual: elementwise.lessEqual,
  greater: elementwise.greater,
  greaterEqual: elementwise.greaterEqual,
  clamp: elementwise.clamp,
  sum: reduce.sum,
  mean: reduce.mean,
  max: reduce.max,
  min: reduce.min,
  argmax: movement.argmax,
  matmul: product.matmul,
  softmax: rows.softmax,
  logSoftmax: rows.logSoftmax,
  logSumExp: rows.logSumExp,
  cast: movement.cast,
  clone: movement.clone,
  asContiguous: movement.contiguous,
  reshape: movement.reshape,
  permute: movement.permute,
  transpose: movement.transpose,
  broadcastTo: movement.broadcastTo,
  unsqueeze: movement.unsqueeze,
  squeeze: movement.squeeze,
  slice: movement.slice,
  gatherRows: movement.gatherRows,
  to: movement.to,
};

type Methods = typeof methods;
type Rest<F> = F extends (x: Tensor, ...rest: infer R) => infer T ? (...rest: R) => T : never;
type Fluent = { [K in keyof Methods]: Rest<Methods[K]> };

declare module '../tensor/tensor.js' {
  interface Tensor extends Fluent {}
}

for (const [name, f] of Object.entries(methods) as [string, (x: Tensor, ...rest: unknown[]) => unknown][])
  Object.defineProperty(Tensor.prototype, name, {
    value(this: Tensor, ...rest: unknown[]) {
      return f(this, ...rest);
    },
    configurable: true,
    writable: true,
  });
