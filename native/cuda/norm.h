// What the kernels of RMSNorm share: how a row is shared out among lanes and held in registers, and how a weight's
// gradient is summed over rows in a fixed order. Holds no row of the contract.
#pragma once

#include "cuda/packs.h"

namespace kg::cuda {

constexpr int kSlots = 4;         // packs that a lane holds of a row
constexpr int kRowThreads = 128;  // of a block whose warps have a row each
constexpr int kMostThreads =
    256;  // of a block that has one row: four packs, their sums and the next row fit into 255 registers

// How a row is shared out: part of the results, so it follows from width and dtype alone.
struct RowShape {
  int width, packs;
  int lanes;  // threads a row

  bool oneWarp() const { return lanes == kWarp; }
  int threads() const { return oneWarp() ? kRowThreads : lanes; }
  int rowsAtOnce() const { return threads() / lanes; }
};

template <class T>
RowShape rowShape(int64_t width) {
  const int64_t packs = ceilDiv(width, kPack<T>);
  const int64_t lanes = roundUp(ceilDiv(packs, kSlots), kWarp);
  return {static_cast<int>(width), static_cast<int>(packs),
          static_cast<int>(lanes < kMostThreads ? lanes : kMostThreads)};
}

inline bool fits(const RowShape& shape) { return shape.packs <= shape.lanes * kSlots; }

// f(slot, pack) for the packs of a row that lane `lane` of `lanes` owns; kHeld: at most kSlots of them, unrolled.
template <bool kHeld, class F>
KG_DEVICE void forPacks(const RowShape& shape, int lane, F f) {
  if constexpr (kHeld) {
    KG_UNROLL for (int s = 0; s < kSlots; s++) {
      const int pack = lane + s * shape.lanes;
      if (pack < shape.packs) f(s, pack);
    }
  } else {
    for (int pack = lane; pack < shape.packs; pack += shape.lanes) f(0, pack);
  }
}

// A row whose packs stay in registers (kHeld) or are read again at each use.
template <class T, bool kHeld, bool kAligned>
struct Row {
  const T* data;
  Pack<T, kPack<T>> held[kHeld ? kSlots : 1];

  KG_DEVICE void read(const T* row, const RowShape& shape, int lane) {
    data = row;
    if constexpr (kHeld) {
      forPacks<true>(shape, lane, [&](int s, int pack) { held[s] = loadFrom<kAligned>(row, pack, shape.width); });
    }
  }
  KG_DEVICE Wide<compute_t<T>, kPack<T>> get(const RowShape& shape, int s, int pack) const {
    if constexpr (kHeld) return widen(held[s]);
    return widen(loadFrom<kAligned>(data, pack, shape.width));
  }
};

template <class C>
KG_DEVICE C rowSum(C v, const RowShape& shape, C* shared) {
  return shape.lanes == kWarp ? warpSum(v) : blockSum(v, shared);
}

// The sums over a block's rows for the columns that a lane owns: in registers, or (wide rows) in the block's own row of
// partials.
template <class T, bool kHeld>
struct WeightSums {
  using C = compute_t<T>;
  Wide<C, kPack<T>> held[kHeld ? kSlots : 1];
  C* partial;

  KG_DEVICE void begin(C* row, const RowShape& shape, int lane) {
    partial = row;
    forPacks<kHeld>(shape, lane, [&](int s, int pack) {
      KG_UNROLL for (int i = 0; i < kPack<T>; i++) {
        const int at = pack * kPack<T> + i;
        if constexpr (kHeld) held[s].v[i] = 0;
        if constexpr (!kHeld) {
          if (at < shape.width) partial[at] = 0;
        }
      }
    });
  }
  // term(slot, pack): what a row adds, as Wide<C, kPack<T>>.
  template <class F>
  KG_DEVICE void add(const RowShape& shape, int lane, F term) {
    forPacks<kHeld>(shape, lane, [&](int s, int pack) {
      const auto more = term(s, pack);
      KG_UNROLL for (int i = 0; i < kPack<T>; i++) {
        const int at = pack * kPack<T> + i;
        if constexpr (kHeld) held[s].v[i] += more.v[i];
        if constexpr (!kHeld) {
          if (at < shape.width) partial[at] += more.v[i];
        }
      }
    });
  }
  // The warps' sums in ascending order; `shared` [warps, width] where warps have rows of their own.
  KG_DEVICE void end(const RowShape& shape, int lane, C* shared) {
    if constexpr (!kHeld) return;
    C* own = shape.lanes == kWarp ? shared + static_cast<int64_t>(warpId()) * shape.width : partial;
    forPacks<true>(shape, lane, [&](int s, int pack) {
      KG_UNROLL for (int i = 0; i < kPack<T>; i++) {
        const int at = pack * kPack<T> + i;
        if (at < shape.width) own[at] = held[s].v[i];
      }
    });
    if (shape.lanes != kWarp) return;
    syncThreads();
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    for (int at = static_cast<int>(threadIdx.x); at < shape.width; at += static_cast<int>(blockDim.x)) {
      C sum = 0;
      for (int w = 0; w < warps; w++) sum += shared[w * shape.width + at];
      partial[at] = sum;
    }
  }
};

// dweight[c] += the sum of partials[count, width] over its first axis: 32 warps take count / 32 rows each, in ascending
// order, for 32 columns; the warps' sums follow in ascending order.
template <class C>
KG_GLOBAL void KG_LAUNCH_BOUNDS(1024) addPartials(C* dweight, const C* partials, int count, int width) {
  KG_SHARED(C, sums, 32 * 33);
  const int column = static_cast<int>(blockIdx.x) * kWarp + laneId();
  C sum = 0;
  if (column < width) {
    KG_UNROLL_BY(4)
    for (int p = warpId(); p < count; p += 32) sum += partials[static_cast<int64_t>(p) * width + column];
  }
  sums[warpId() * 33 + laneId()] = sum;
  syncThreads();
  if (warpId() != 0 || column >= width) return;
  C total = 0;
  for (int w = 0; w < 32; w++) total += sums[w * 33 + laneId()];
  dweight[column] += total;
}

// ---- host helpers --------------------------------------------------------------------------------------------------

// f(held, aligned) with both as types; rows too wide for registers are read element by element: rare, and it saves
// kernels.
template <class F>
void dispatchLayout(const RowShape& shape, bool aligned, F f) {
  if (!fits(shape)) return f(Flag<false>{}, Flag<false>{});
  dispatchFlag(aligned, [&](auto a) { f(Flag<true>{}, a); });
}

// The partition of rows for dweight: part of the result, so it follows from the number of rows alone. Some four blocks
// a multiprocessor of the largest devices.
constexpr int64_t kLeastRowsPerPartial = 16, kMostPartials = 512;
inline int64_t rowsPerPartial(int64_t rows) {
  const int64_t even = ceilDiv(rows, kMostPartials);
  return even > kLeastRowsPerPartial ? even : kLeastRowsPerPartial;
}

}  // namespace kg::cuda
