// The rows of elementwise.def as functors, and the int32 lane that lets them compile for integers. Owns no loop.
#pragma once

#include "cpu/fused.h"
#include "cpu/strided.h"

namespace kg::cpu::KG_ISA {

// int32 as a vector of one lane, with wrap-around arithmetic: the same loops serve it, and the compiler vectorizes
// them.
template <>
struct Vec<int32_t> {
  static constexpr int N = 1;
  int32_t v;

  Vec() = default;
  KG_INLINE Vec(int32_t x) : v(x) {}
  static KG_INLINE Vec wrap(uint32_t x) { return static_cast<int32_t>(x); }
  static KG_INLINE Vec load(const int32_t* p) { return *p; }
  static KG_INLINE Vec loadPartial(const int32_t* p, int) { return *p; }
  KG_INLINE void store(int32_t* p) const { *p = v; }
  KG_INLINE void storePartial(int32_t* p, int) const { *p = v; }
  KG_INLINE uint32_t bits() const { return static_cast<uint32_t>(v); }

  friend KG_INLINE Vec operator+(Vec a, Vec b) { return wrap(a.bits() + b.bits()); }
  friend KG_INLINE Vec operator-(Vec a, Vec b) { return wrap(a.bits() - b.bits()); }
  friend KG_INLINE Vec operator*(Vec a, Vec b) { return wrap(a.bits() * b.bits()); }
  // Truncates; the one quotient that does not fit wraps.
  friend KG_INLINE Vec operator/(Vec a, Vec b) {
    if (b.v == 0) fail("expected int32 divisors other than 0, found 0; try dividing in float32");
    return b.v == -1 ? wrap(0u - a.bits()) : Vec(a.v / b.v);
  }
  friend KG_INLINE bool operator>(Vec a, Vec b) { return a.v > b.v; }
  friend KG_INLINE bool operator<(Vec a, Vec b) { return a.v < b.v; }
  friend KG_INLINE bool operator!=(Vec a, Vec b) { return a.v != b.v; }
};
using IntLane = Vec<int32_t>;

namespace m {
KG_INLINE IntLane highest(IntLane) { return INT32_MAX; }
KG_INLINE IntLane lowest(IntLane) { return INT32_MIN; }
KG_INLINE IntLane pow(IntLane x, IntLane y) {
  if (y.v < 0) fail("expected int32 exponents of at least 0, found %d; try float32", y.v);
  uint32_t result = 1, base = x.bits();
  for (int32_t e = y.v; e != 0; e >>= 1, base *= base)
    if (e & 1) result *= base;
  return IntLane::wrap(result);
}
}  // namespace m

#define KG_UNARY(name, expression)  \
  struct Row_##name {               \
    template <class C>              \
    static KG_INLINE C apply(C x) { \
      return expression;            \
    }                               \
  };
#define KG_BINARY(name, expression)      \
  struct Row_##name {                    \
    template <class C>                   \
    static KG_INLINE C apply(C x, C y) { \
      return expression;                 \
    }                                    \
  };
#define KG_COMPARE(name, expression)        \
  struct Row_##name {                       \
    template <class C>                      \
    static KG_INLINE bool apply(C x, C y) { \
      return expression;                    \
    }                                       \
  };
#define KG_REDUCE(name, initial, combination) \
  struct Row_##name {                         \
    template <class C>                        \
    static KG_INLINE C identity() {           \
      return initial;                         \
    }                                         \
    template <class C>                        \
    static KG_INLINE C apply(C a, C x) {      \
      return combination;                     \
    }                                         \
  };
#include "ops/all.def"

}  // namespace kg::cpu::KG_ISA
