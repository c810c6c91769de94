// SwiGLU, silu(gate) * up, forward and backward. Every tensor is [R, F] with unit stride on F and any stride on R, so
// that gate and up (and their gradients) may be halves of one product.
#include "cpu/fused.h"

namespace kg::cpu::KG_ISA {

namespace {

template <class T>
KG_INLINE T* rowOf(const TensorView& v, int64_t r) {
  return v.ptr<T>() + r * v.stride(0);
}

template <class T>
void swiglu(const Call& call) {
  using C = compute_t<T>;
  const int64_t rows = call[0].size(0), width = call[0].size(1);
  parallelFor(rows, rowGrain(width), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      T* y = rowOf<T>(call[0], r);
      const T *gate = rowOf<T>(call[1], r), *up = rowOf<T>(call[2], r);
      forVectors<C>(width, [&](int64_t i, int count) KG_LAMBDA_INLINE {
        const Vec<C> g = loadLanes<C>(gate + i, count);
        storeLanes(y + i, g * vsigmoid(g) * loadLanes<C>(up + i, count), count);
      });
    }
  });
}

// With s = sigmoid(gate): dup = dy * gate * s, dgate = dy * up * s * (1 + gate * (1 - s)).
template <class T, class C>
KG_INLINE void gradientRow(T* dgate, T* dup, const T* dy, const T* gate, const T* up, int64_t n) {
  const Vec<C> one(C(1));
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const Vec<C> d = loadLanes<C>(dy + i, count), g = loadLanes<C>(gate + i, count);
    const Vec<C> s = vsigmoid(g), ds = d * s;
    const Vec<C> dg = ds * loadLanes<C>(up + i, count) * (one + g * (one - s));
    storeLanes(dup + i, ds * g, count);
    storeLanes(dgate + i, dg, count);
  });
}

template <class T>
void swigluBackward(const Call& call) {
  const TensorView& gate = call[3];
  const int64_t rows = call[2].size(0), width = call[2].size(1);
  const RowMap rowMap = RowMap::checked(call[5], gate.size(0));
  parallelFor(rows, rowGrain(width), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      const int64_t primal = rowMap(r);
      gradientRow<T, compute_t<T>>(rowOf<T>(call[0], r), rowOf<T>(call[1], r), rowOf<T>(call[2], r),
                                   rowOf<T>(gate, primal), rowOf<T>(call[4], primal), width);
    }
  });
}

}  // namespace

void kernel_swiglu(const Call& call) {
  dispatchFloating(call[0].dtype, [&](auto t) { swiglu<decltype(t)>(call); });
}

void kernel_swigluBackward(const Call& call) {
  dispatchFloating(call[2].dtype, [&](auto t) { swigluBackward<decltype(t)>(call); });
}

}  // namespace kg::cpu::KG_ISA
