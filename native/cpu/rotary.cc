// Rotary position embedding in Hugging Face's layout: element i of a head turns with element i + D/2. A table lookup by
// position and one rotation; the backward pass is the same with the angle reversed.
#include "cpu/fused.h"

namespace kg::cpu::KG_ISA {

namespace {

template <class T, class C>
KG_INLINE void rotateHead(T* y, const T* x, const C* cosines, const C* sines, C direction, int64_t half) {
  const Vec<C> sign(direction);
  forVectors<C>(half, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const Vec<C> a = loadLanes<C>(x + i, count), b = loadLanes<C>(x + half + i, count);
    const Vec<C> c = loadLanes<C>(cosines + i, count), s = loadLanes<C>(sines + i, count) * sign;
    storeLanes(y + i, a * c - b * s, count);
    storeLanes(y + half + i, b * c + a * s, count);
  });
}

template <class T>
void rotary(const Call& call) {
  using C = compute_t<T>;
  const TensorView &x = call[1], &table = call[3];
  T* y = call[0].ptr<T>();
  const int32_t* positions = call[2].ptr<int32_t>();
  const int64_t rows = x.size(0), heads = x.size(1), width = x.size(2);
  const C direction = call.attr(0) != 0 ? C(-1) : C(1);
  checkIndices("positions", positions, rows, table.size(0));
  parallelFor(rows, rowGrain(heads * width), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      const C* cosines = table.ptr<C>() + positions[r] * width;
      for (int64_t h = 0; h < heads; h++) {
        rotateHead(y + (r * heads + h) * width, x.ptr<T>() + r * x.stride(0) + h * x.stride(1), cosines,
                   cosines + width / 2, direction, width / 2);
      }
    }
  });
}

}  // namespace

void kernel_rotary(const Call& call) {
  dispatchFloating(call[0].dtype, [&](auto t) { rotary<decltype(t)>(call); });
}

}  // namespace kg::cpu::KG_ISA
