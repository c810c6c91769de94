// Sorting a short vector on its device, differentiably: the order never visits the host.
import { add, equal, less, mul } from '../../ops/elementwise.js';
import { cast, unsqueeze } from '../../ops/movement.js';
import { sum } from '../../ops/reduce.js';
import { Tensor } from '../../tensor/tensor.js';

/**
 * The values `[B]` in ascending order, ties in their own order. A product with a permutation matrix `[B, B]`, so that the
 * gradient goes to the element that stands at each place; meant for batches, not for long vectors.
 */
export function sortAscending(x: Tensor): Tensor {
  const places = Tensor.from(
    Float64Array.from({ length: x.size }, (_, i) => i),
    { dtype: x.dtype, device: x.device },
  );
  const number = (condition: Tensor): Tensor => cast(condition, x.dtype);
  const [row, column] = [unsqueeze(x, 0), unsqueeze(x, 1)];
  const ties = mul(number(equal(row, column)), number(less(unsqueeze(places, 0), unsqueeze(places, 1))));
  const ranks = sum(add(number(less(row, column)), ties), { axes: 1 });
  const permutation = number(equal(unsqueeze(ranks, 0), unsqueeze(places, 1)));
  return sum(mul(permutation, row), { axes: 1 });
}
