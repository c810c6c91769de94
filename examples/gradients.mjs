// Tensors, gradients of any order, and deterministic memory. Run it: node examples/gradients.mjs
import { grad, hvp, memory, scope, Tensor, valueAndGrad } from 'keelgrad';

const x = Tensor.from([
  [1, 2],
  [3, 4],
]);
const [loss, [gx]] = valueAndGrad((x) => x.matmul(x).sum())(x);
console.log(`${x}`, loss.item(), await gx.data()); // f32[2,2]@cpu 54 [7, 11, 9, 13]: the event loop stayed free

// Gradients are made of ops, so they have gradients: the second derivative of x³ at 2, and a Hessian times a vector.
const [second] = grad((t) => grad((u) => u.mul(u).mul(u).sum())(t)[0].sum())(Tensor.from([2]));
const curvature = hvp((t) => t.mul(t).mul(t).sum(), [Tensor.from([1, 2])], [Tensor.from([1, 1])]);
console.log(second.item(), await curvature[0].data()); // 12 [6, 12]

// What a scope does not return is freed when it ends, not when a collector gets to it.
const before = memory().allocated;
const norm = scope(() => x.square().sum().sqrt().item());
console.log(norm.toFixed(4), memory().allocated === before); // 5.4772 true
