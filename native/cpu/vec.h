// The SIMD vector of one instruction set: Vec<float> and Vec<double> over GCC vector extensions, with bfloat16 loads
// and stores. Mathematical functions stand in vec_math.h, included at the end. Owns no loop and no kernel.
//
// Compiled once per instruction set, so everything here is forced inline and lives in kg::cpu::KG_ISA.
#pragma once

#include <cstdint>
#include <cstring>

#include "runtime/dtype.h"

#ifndef KG_ISA
#error "compile with -DKG_ISA=base|avx2|avx512"
#endif

#if defined(__SSE2__)
// gcc 12 reports its own _mm512_undefined_* as uninitialized.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define KG_VEC_BYTES 64
#elif defined(__AVX2__)
#define KG_VEC_BYTES 32
#else
#define KG_VEC_BYTES 16
#endif

namespace kg::cpu::KG_ISA {

typedef float VecF32 __attribute__((vector_size(KG_VEC_BYTES)));
typedef double VecF64 __attribute__((vector_size(KG_VEC_BYTES)));
typedef int32_t VecI32 __attribute__((vector_size(KG_VEC_BYTES)));
typedef int64_t VecI64 __attribute__((vector_size(KG_VEC_BYTES)));
typedef uint32_t VecU32 __attribute__((vector_size(KG_VEC_BYTES)));
typedef uint64_t VecU64 __attribute__((vector_size(KG_VEC_BYTES)));
typedef uint16_t VecHalfU16 __attribute__((vector_size(KG_VEC_BYTES / 2)));
typedef float VecHalfF32 __attribute__((vector_size(KG_VEC_BYTES / 2)));

template <class C>
struct VecTraits;
template <>
struct VecTraits<float> {
  using V = VecF32;
  using I = VecI32;
  using U = VecU32;
  using Int = int32_t;
};
template <>
struct VecTraits<double> {
  using V = VecF64;
  using I = VecI64;
  using U = VecU64;
  using Int = int64_t;
};

// Lanes of all ones or all zeros.
template <class C>
struct Mask {
  typename VecTraits<C>::I v;
  friend KG_INLINE Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
  friend KG_INLINE Mask operator|(Mask a, Mask b) { return {a.v | b.v}; }
  friend KG_INLINE Mask operator!(Mask a) { return {~a.v}; }
  KG_INLINE bool lane(int i) const { return v[i] != 0; }
  KG_INLINE bool any() const {
    int64_t bits = 0;
    for (int i = 0; i < static_cast<int>(KG_VEC_BYTES / sizeof(C)); i++) bits |= v[i];
    return bits != 0;
  }
};

template <class C>
struct Vec {
  using V = typename VecTraits<C>::V;
  static constexpr int N = KG_VEC_BYTES / sizeof(C);
  V v;

  Vec() = default;
  KG_INLINE Vec(V raw) : v(raw) {}
  // x - 0 rather than x + 0, which would turn -0 into 0.
  KG_INLINE Vec(C x) : v(x - V{}) {}

  static KG_INLINE Vec load(const C* p) {
    Vec r;
    memcpy(&r.v, p, sizeof(V));
    return r;
  }
  KG_INLINE void store(C* p) const { memcpy(p, &v, sizeof(V)); }

  // The first n lanes (0 <= n <= N); the others are `fill`.
  static KG_INLINE Vec loadPartial(const C* p, int n, C fill = C(0)) {
    C lanes[N];
    for (int i = 0; i < N; i++) lanes[i] = i < n ? p[i] : fill;
    return load(lanes);
  }
  KG_INLINE void storePartial(C* p, int n) const {
    for (int i = 0; i < N; i++)
      if (i < n) p[i] = v[i];
  }

  static KG_INLINE Vec load(const bf16* p);
  static KG_INLINE Vec loadPartial(const bf16* p, int n, C fill = C(0)) {
    bf16 lanes[N];
    for (int i = 0; i < N; i++) lanes[i] = i < n ? p[i] : bf16(static_cast<float>(fill));
    return load(lanes);
  }
  KG_INLINE void store(bf16* p) const;
  KG_INLINE void storePartial(bf16* p, int n) const {
    bf16 lanes[N];
    store(lanes);
    for (int i = 0; i < N; i++)
      if (i < n) p[i] = lanes[i];
  }

  KG_INLINE C operator[](int i) const { return v[i]; }
  KG_INLINE C first() const { return v[0]; }

  friend KG_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend KG_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend KG_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend KG_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend KG_INLINE Vec operator-(Vec a) { return -a.v; }
  KG_INLINE Vec& operator+=(Vec b) { return v += b.v, *this; }
  KG_INLINE Vec& operator-=(Vec b) { return v -= b.v, *this; }
  KG_INLINE Vec& operator*=(Vec b) { return v *= b.v, *this; }
  friend KG_INLINE Mask<C> operator>(Vec a, Vec b) { return {a.v > b.v}; }
  friend KG_INLINE Mask<C> operator>=(Vec a, Vec b) { return {a.v >= b.v}; }
  friend KG_INLINE Mask<C> operator<(Vec a, Vec b) { return {a.v < b.v}; }
  friend KG_INLINE Mask<C> operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
  friend KG_INLINE Mask<C> operator==(Vec a, Vec b) { return {a.v == b.v}; }
  friend KG_INLINE Mask<C> operator!=(Vec a, Vec b) { return {a.v != b.v}; }
};

#if defined(__AVX512F__)
template <>
KG_INLINE Vec<float> Vec<float>::loadPartial(const float* p, int n, float fill) {
  return Vec(reinterpret_cast<V>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1), p)));
}
template <>
KG_INLINE void Vec<float>::storePartial(float* p, int n) const {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
}
template <>
KG_INLINE Vec<double> Vec<double>::loadPartial(const double* p, int n, double fill) {
  return Vec(reinterpret_cast<V>(_mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>((1u << n) - 1), p)));
}
template <>
KG_INLINE void Vec<double>::storePartial(double* p, int n) const {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v);
}
#endif

template <>
KG_INLINE Vec<float> Vec<float>::load(const bf16* p) {
  VecHalfU16 h;
  memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
  return reinterpret_cast<V>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)), 16));
#elif defined(__AVX2__)
  return reinterpret_cast<V>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)), 16));
#else
  return reinterpret_cast<V>(__builtin_convertvector(h, VecU32) << 16);
#endif
}

// Round to nearest even; NaN stays a quiet NaN.
template <>
KG_INLINE void Vec<float>::store(bf16* p) const {
  const VecU32 u = reinterpret_cast<VecU32>(v);
  const VecU32 rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const VecU32 top = (v != v ? (u | 0x400000u) : rounded) >> 16;
#if defined(__AVX512F__)
  const VecHalfU16 h = reinterpret_cast<VecHalfU16>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(top)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(top), reinterpret_cast<__m256i>(top));
  const VecHalfU16 h = reinterpret_cast<VecHalfU16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  const VecHalfU16 h = __builtin_convertvector(top, VecHalfU16);
#endif
  memcpy(p, &h, sizeof h);
}

// N doubles from N floats, and back (rounded).
KG_INLINE Vec<double> loadWide(const float* p) {
  VecHalfF32 h;
  memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
  // gcc 12 converts quarters otherwise.
  return reinterpret_cast<VecF64>(_mm512_cvtps_pd(reinterpret_cast<__m256>(h)));
#else
  return __builtin_convertvector(h, VecF64);
#endif
}
KG_INLINE void storeNarrow(Vec<double> x, float* p) {
  const VecHalfF32 h = __builtin_convertvector(x.v, VecHalfF32);
  memcpy(p, &h, sizeof h);
}

template <class C>
KG_INLINE Vec<C> select(Mask<C> m, Vec<C> a, Vec<C> b) {
  return m.v ? a.v : b.v;
}

// a * b + c, in one rounding where the instruction set has it.
template <class C>
KG_INLINE Vec<C> fma(Vec<C> a, Vec<C> b, Vec<C> c) {
  return a.v * b.v + c.v;
}
// a > b ? a : b and a < b ? a : b: where either is NaN the result is b.
template <class C>
KG_INLINE Vec<C> max(Vec<C> a, Vec<C> b) {
  return a.v > b.v ? a.v : b.v;
}
template <class C>
KG_INLINE Vec<C> min(Vec<C> a, Vec<C> b) {
  return a.v < b.v ? a.v : b.v;
}
template <class C>
KG_INLINE Vec<C> vsqrt(Vec<C> x) {
  C lanes[Vec<C>::N];
  x.store(lanes);
  for (C& lane : lanes) lane = sizeof(C) == 4 ? C(__builtin_sqrtf(float(lane))) : C(__builtin_sqrt(double(lane)));
  return Vec<C>::load(lanes);
}

#if defined(__AVX512F__)
#define KG_VEC_INTRINSIC(name, suffix) _mm512_##name##_##suffix
#elif defined(__AVX2__)
#define KG_VEC_INTRINSIC(name, suffix) _mm256_##name##_##suffix
#elif defined(__SSE2__)
#define KG_VEC_INTRINSIC(name, suffix) _mm_##name##_##suffix
#endif
#ifdef KG_VEC_INTRINSIC
#define KG_VEC_SPECIALIZE(C, suffix)                                                            \
  template <>                                                                                   \
  KG_INLINE Vec<C> max(Vec<C> a, Vec<C> b) {                                                    \
    return reinterpret_cast<typename VecTraits<C>::V>(KG_VEC_INTRINSIC(max, suffix)(a.v, b.v)); \
  }                                                                                             \
  template <>                                                                                   \
  KG_INLINE Vec<C> min(Vec<C> a, Vec<C> b) {                                                    \
    return reinterpret_cast<typename VecTraits<C>::V>(KG_VEC_INTRINSIC(min, suffix)(a.v, b.v)); \
  }                                                                                             \
  template <>                                                                                   \
  KG_INLINE Vec<C> vsqrt(Vec<C> x) {                                                            \
    return reinterpret_cast<typename VecTraits<C>::V>(KG_VEC_INTRINSIC(sqrt, suffix)(x.v));     \
  }
KG_VEC_SPECIALIZE(float, ps)
KG_VEC_SPECIALIZE(double, pd)
#undef KG_VEC_SPECIALIZE
#endif
#ifdef __FMA__
template <>
KG_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return reinterpret_cast<VecF32>(KG_VEC_INTRINSIC(fmadd, ps)(a.v, b.v, c.v));
}
template <>
KG_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return reinterpret_cast<VecF64>(KG_VEC_INTRINSIC(fmadd, pd)(a.v, b.v, c.v));
}
#endif
#undef KG_VEC_INTRINSIC

// Lane i paired with lane i ^ Step.
template <int Step, class C>
KG_INLINE Vec<C> swapLanes(Vec<C> x) {
  typename VecTraits<C>::I order;
  for (int i = 0; i < Vec<C>::N; i++) order[i] = i ^ Step;
  return __builtin_shuffle(x.v, order);
}

// Horizontal reductions as a fixed tree: halves, quarters, ...
template <class C>
KG_INLINE C hsum(Vec<C> x) {
  if constexpr (Vec<C>::N >= 16) x += swapLanes<8>(x);
  if constexpr (Vec<C>::N >= 8) x += swapLanes<4>(x);
  if constexpr (Vec<C>::N >= 4) x += swapLanes<2>(x);
  x += swapLanes<1>(x);
  return x.first();
}
template <class C>
KG_INLINE C hmax(Vec<C> x) {
  if constexpr (Vec<C>::N >= 16) x = max(x, swapLanes<8>(x));
  if constexpr (Vec<C>::N >= 8) x = max(x, swapLanes<4>(x));
  if constexpr (Vec<C>::N >= 4) x = max(x, swapLanes<2>(x));
  x = max(x, swapLanes<1>(x));
  return x.first();
}
template <class C>
KG_INLINE C hmin(Vec<C> x) {
  return -hmax(-x);
}

}  // namespace kg::cpu::KG_ISA

#include "cpu/vec_math.h"
