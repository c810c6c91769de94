// What the row kernels (norm, rotary, swiglu) share: rows moved in packs of 16 bytes, computed in the wide type, and
// the map from cotangent to primal rows. Holds no kernel.
#pragma once

#include <cmath>

#include "cuda/block.h"

namespace kg::cuda {

// Elements of one 16-byte access.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

// Elements in the type that arithmetic is done in.
template <class C, int N>
struct Wide {
  C v[N];
};

template <class T, int N>
KG_DEVICE Wide<compute_t<T>, N> widen(const Pack<T, N>& p) {
  Wide<compute_t<T>, N> w;
  KG_UNROLL for (int i = 0; i < N; i++) w.v[i] = p.v[i];
  return w;
}

// Rounds to nearest even where T is narrower.
template <class T, class C, int N>
KG_DEVICE Pack<T, N> narrow(const Wide<C, N>& w) {
  Pack<T, N> p;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    KG_UNROLL for (int i = 0; i < N; i += 2) {
      const uint32_t both = packBf16(w.v[i], w.v[i + 1]);
      p.v[i].bits = static_cast<uint16_t>(both);
      p.v[i + 1].bits = static_cast<uint16_t>(both >> 16);
    }
  } else {
    KG_UNROLL for (int i = 0; i < N; i++) p.v[i] = w.v[i];
  }
  return p;
}

// Pack `index` of a row of `width` elements. kAligned: the row lies on 16 bytes and holds whole packs. Otherwise
// element by element, zeros beyond the end: the same elements come to the same lane, so no sum depends on where a row
// lies.
template <bool kAligned, class T>
KG_DEVICE Pack<T, kPack<T>> loadFrom(const T* row, int index, int width) {
  const int64_t at = static_cast<int64_t>(index) * kPack<T>;
  if constexpr (kAligned) {
    return loadPack<T, kPack<T>>(row + at);
  } else {
    Pack<T, kPack<T>> p;
    KG_UNROLL for (int i = 0; i < kPack<T>; i++) p.v[i] = at + i < width ? row[at + i] : T(0.0f);
    return p;
  }
}

template <bool kAligned, class T>
KG_DEVICE void storeTo(T* row, int index, int width, const Pack<T, kPack<T>>& p) {
  const int64_t at = static_cast<int64_t>(index) * kPack<T>;
  if constexpr (kAligned) {
    storePack<T, kPack<T>>(row + at, p);
  } else {
    KG_UNROLL for (int i = 0; i < kPack<T>; i++) {
      if (at + i < width) row[at + i] = p.v[i];
    }
  }
}

// Cotangent row -> primal row; the identity where the kernel was given no rowMap.
struct RowMap {
  const int32_t* map;
  int64_t primalRows;

  static RowMap of(const TensorView& map, int64_t primalRows) {
    return {map.present() ? map.ptr<int32_t>() : nullptr, primalRows};
  }
  // -1, and a fault, where the map leaves the primal rows.
  KG_DEVICE int64_t operator()(int64_t row, const FaultSink& faults) const {
    if (!map) return row;
    const int64_t primal = map[row];
    if (primal >= 0 && primal < primalRows) return primal;
    reportFault(faults, FaultKind::RowOutOfRange, primal, row, primalRows);
    return -1;
  }
};

// ---- host helpers --------------------------------------------------------------------------------------------------

// True where rows of `view`, `stride` elements apart, all begin on 16 bytes.
inline bool onPacks(const TensorView& view, int64_t stride) {
  const size_t step = static_cast<size_t>(stride) * dtypeSize(view.dtype);
  return !view.present() || (reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && step % 16 == 0);
}

// f(Flag<true or false>{}): a condition of the host as a template argument. `decltype(flag)::value`.
template <bool kFlag>
struct Flag {
  static constexpr bool value = kFlag;
};
template <class F>
void dispatchFlag(bool flag, F f) {
  flag ? f(Flag<true>{}) : f(Flag<false>{});
}

}  // namespace kg::cuda
