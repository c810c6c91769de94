// The namespace `m` that the rows of elementwise.def are written in, for one number a thread, and the int32 lane that
// lets them compile for integers. NaN, infinities and signed zeros behave as in cpu/vec_math.h; float32 functions are
// within 4 ulp (CUDA's library without its fast variants).
#pragma once

#include <cmath>

#include "cuda/gpu.h"

namespace kg::cuda {

// int32 with wrap-around arithmetic. A division by zero gives 0: the kernel reports it.
struct IntLane {
  int32_t v;

  IntLane() = default;
  KG_DEVICE IntLane(int32_t x) : v(x) {}
  KG_DEVICE explicit operator int32_t() const { return v; }
  KG_DEVICE static IntLane wrap(uint32_t x) { return static_cast<int32_t>(x); }
  KG_DEVICE uint32_t bits() const { return static_cast<uint32_t>(v); }

  friend KG_DEVICE IntLane operator+(IntLane a, IntLane b) { return wrap(a.bits() + b.bits()); }
  friend KG_DEVICE IntLane operator-(IntLane a, IntLane b) { return wrap(a.bits() - b.bits()); }
  friend KG_DEVICE IntLane operator*(IntLane a, IntLane b) { return wrap(a.bits() * b.bits()); }
  // Truncates; the one quotient that does not fit wraps.
  friend KG_DEVICE IntLane operator/(IntLane a, IntLane b) {
    if (b.v == 0) return 0;
    return b.v == -1 ? wrap(0u - a.bits()) : IntLane(a.v / b.v);
  }
  friend KG_DEVICE bool operator>(IntLane a, IntLane b) { return a.v > b.v; }
  friend KG_DEVICE bool operator<(IntLane a, IntLane b) { return a.v < b.v; }
  friend KG_DEVICE bool operator!=(IntLane a, IntLane b) { return a.v != b.v; }
};

// What a row computes in: the compute type, integers as lanes that wrap.
template <class T>
struct RowCompute {
  using type = compute_t<T>;
};
template <>
struct RowCompute<int32_t> {
  using type = IntLane;
};
template <class T>
using row_compute_t = typename RowCompute<T>::type;

template <class C>
KG_DEVICE C infinity() {
  return static_cast<C>(__builtin_huge_val());
}

namespace m {

template <class C>
KG_DEVICE C select(bool mask, C a, C b) {
  return mask ? a : b;
}

#define KG_FUNCTION(name)                                \
  KG_DEVICE float name(float x) { return ::name##f(x); } \
  KG_DEVICE double name(double x) { return ::name(x); }
KG_FUNCTION(exp)
KG_FUNCTION(expm1)
KG_FUNCTION(log)
KG_FUNCTION(log1p)
KG_FUNCTION(sqrt)
KG_FUNCTION(sin)
KG_FUNCTION(cos)
KG_FUNCTION(tanh)
#undef KG_FUNCTION
KG_DEVICE float abs(float x) { return ::fabsf(x); }
KG_DEVICE double abs(double x) { return ::fabs(x); }
KG_DEVICE float pow(float x, float y) { return ::powf(x, y); }
KG_DEVICE double pow(double x, double y) { return ::pow(x, y); }

// e^-|x| never overflows; x NaN stays NaN through it.
template <class C>
KG_DEVICE C sigmoid(C x) {
  const C e = exp(-abs(x));
  return (x < C(0) ? e : C(1)) / (C(1) + e);
}
template <class C>
KG_DEVICE C softplus(C x) {
  return (x > C(0) ? x : C(0)) + log1p(exp(-abs(x)));
}
template <class C>
KG_DEVICE C logSigmoid(C x) {
  return (x < C(0) ? x : C(0)) - log1p(exp(-abs(x)));
}

// By squaring; a negative exponent gives 1: the kernel reports it.
KG_DEVICE IntLane pow(IntLane x, IntLane y) {
  uint32_t result = 1, base = x.bits();
  for (int32_t e = y.v > 0 ? y.v : 0; e != 0; e >>= 1, base *= base)
    if (e & 1) result *= base;
  return IntLane::wrap(result);
}

// The identities of min and max.
template <class C>
KG_DEVICE C highest(C) {
  return infinity<C>();
}
template <class C>
KG_DEVICE C lowest(C) {
  return -infinity<C>();
}
KG_DEVICE IntLane highest(IntLane) { return INT32_MAX; }
KG_DEVICE IntLane lowest(IntLane) { return INT32_MIN; }

}  // namespace m

}  // namespace kg::cuda
