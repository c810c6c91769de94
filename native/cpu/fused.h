// What the fused row kernels (norm, rotary, swiglu, head, optimizer) share: dtype dispatch, loops over a row in
// vectors, checks of index tensors. Holds no kernel. Everything is forced inline: each instruction set has its own
// copy.
#pragma once

#include "cpu/vec.h"
#include "ops/backend.h"
#include "runtime/error.h"
#include "runtime/threads.h"

#define KG_LAMBDA_INLINE __attribute__((always_inline))

namespace kg::cpu::KG_ISA {

// f(T()) with T the element type of a floating dtype.
template <class F>
KG_INLINE void dispatchFloating(DType dtype, F f) {
  switch (dtype) {
    case DType::F32:
      return f(float());
    case DType::F64:
      return f(double());
    case DType::BF16:
      return f(bf16());
    default:
      fail("expected float32, float64 or bfloat16, found %s", dtypeName(dtype));
  }
}

template <class T>
KG_INLINE constexpr DType dtypeOf() {
  return sizeof(T) == 8 ? DType::F64 : sizeof(T) == 4 ? DType::F32 : DType::BF16;
}

KG_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// f(i, count) over [0, n): count is the vector length, but for what remains at the end.
template <class C, class F>
KG_INLINE void forVectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + Vec<C>::N <= n; i += Vec<C>::N) f(i, Vec<C>::N);
  if (i < n) f(i, static_cast<int>(n - i));
}

// The first `count` lanes from p; the others are 0.
template <class C, class T>
KG_INLINE Vec<C> loadLanes(const T* p, int count) {
  return count == Vec<C>::N ? Vec<C>::load(p) : Vec<C>::loadPartial(p, count);
}

template <class C, class T>
KG_INLINE void storeLanes(T* p, Vec<C> v, int count) {
  if (count == Vec<C>::N) {
    v.store(p);
  } else {
    v.storePartial(p, count);
  }
}

// v as it would be read back after a store to T.
template <class T, class C>
KG_INLINE Vec<C> roundTo(Vec<C> v) {
  if constexpr (sizeof(T) == sizeof(C)) {
    return v;
  } else {
    T lanes[Vec<C>::N];
    v.store(lanes);
    return Vec<C>::load(lanes);
  }
}

// Tasks of at least this many elements are worth a thread.
constexpr int64_t kElementsPerTask = 16384;

KG_INLINE int64_t rowGrain(int64_t rowLength) {
  return rowLength >= kElementsPerTask ? 1 : kElementsPerTask / (rowLength > 0 ? rowLength : 1);
}

KG_INLINE void checkIndices(const char* name, const int32_t* ids, int64_t n, int64_t limit) {
  for (int64_t i = 0; i < n; i++) {
    if (ids[i] < 0 || ids[i] >= limit) {
      fail("expected %s[%lld] in [0, %lld), found %d", name, static_cast<long long>(i), static_cast<long long>(limit),
           ids[i]);
    }
  }
}

// Cotangent row -> primal row; the identity where the kernel was given no rowMap.
struct RowMap {
  const int32_t* map;

  KG_INLINE int64_t operator()(int64_t row) const { return map ? map[row] : row; }

  static KG_INLINE RowMap checked(const TensorView& map, int64_t primalRows) {
    if (!map.present()) return {nullptr};
    checkIndices("rowMap", map.ptr<int32_t>(), map.numel(), primalRows);
    return {map.ptr<int32_t>()};
  }
};

}  // namespace kg::cpu::KG_ISA
