// What the forward and the backward of attention share: views, the lanes of a chunk and the key tile.
// Allocates nothing: all memory is handed in.
#pragma once

#include "cpu/attention_plan.h"
#include "cpu/attention_tile.h"

namespace kg::cpu::KG_ISA::attention {

// A [rows, heads, D] tensor, unit stride on the last axis.
template <class T>
struct HeadRows {
  T* data;
  int64_t rowStride, headStride;
  HeadRows() = default;
  explicit HeadRows(const TensorView& t) : data(t.ptr<T>()), rowStride(t.stride(0)), headStride(t.stride(1)) {}
  KG_INLINE T* at(int64_t row, int64_t head) const { return data + row * rowStride + head * headStride; }
};

struct Heads {
  int64_t T, query, key, group, D;  // rows, heads, query heads a key head, head dimension
};

static inline Heads checkedHeads(const char* op, const TensorView& q, const TensorView& k, const TensorView& v) {
  if (q.ndim != 3 || k.ndim != 3 || v.ndim != 3 || q.size(2) != k.size(2) || k.size(2) != v.size(2) ||
      k.size(1) != v.size(1) || q.size(0) != k.size(0) || k.size(0) != v.size(0))
    fail("[%s] expected q [T, Hq, D], k and v [T, Hk, D], found q [%lld, %lld, %lld], k [%lld, %lld, %lld]", op,
         (long long)q.shape[0], (long long)q.shape[1], (long long)q.shape[2], (long long)k.shape[0],
         (long long)k.shape[1], (long long)k.shape[2]);
  if (k.size(1) == 0 || q.size(1) % k.size(1) != 0)
    fail("[%s] expected the query heads to be a multiple of the key heads, found %lld and %lld", op,
         (long long)q.size(1), (long long)k.size(1));
  if (q.size(2) > kMostHeadDimension)
    fail("[%s] expected a head dimension of %lld at most, found %lld", op, (long long)kMostHeadDimension,
         (long long)q.size(2));
  return {q.size(0), q.size(1), k.size(1), q.size(1) / k.size(1), q.size(2)};
}

// Query rows a chunk, and the blocks of lanes that a full chunk fills.
template <class C>
KG_INLINE int64_t chunkRowsFor(int64_t group) {
  return group < kChunkLanes ? kChunkLanes / group : 1;
}
template <class C>
KG_INLINE int64_t chunkBlocksFor(int64_t group) {
  return (chunkRowsFor<C>(group) * group + kLanes<C> - 1) / kLanes<C>;
}

// One chunk's lanes: lane l is query row row + l / group of the segment, head firstHead + l % group.
struct Lanes {
  int64_t count, group, firstHead;
  int64_t layoutRow;  // of the chunk's first query row
  int64_t firstKey;   // the last logical key that the chunk's first query row sees
  KG_INLINE int64_t row(int64_t lane) const { return layoutRow + lane / group; }
  KG_INLINE int64_t head(int64_t lane) const { return firstHead + lane % group; }
  KG_INLINE int64_t lastKey(int64_t lane) const { return firstKey + lane / group; }
};

static inline Lanes lanesOf(const Chunk& chunk, const KeyRows& keys, int64_t group, int64_t keyHead) {
  return {chunk.rows * group, group, keyHead * group, keys.ownStart + chunk.row, keys.parentLength + chunk.row};
}

// What a block of lanes has to do with the key tile that starts at `tileStart`.
struct BlockTile {
  int64_t keys;  // that some lane sees, 0..kKeyTile
  bool masked;   // not every lane sees all of them
};

template <class C>
KG_INLINE BlockTile blockTile(const Lanes& lanes, int64_t block, int64_t tileStart) {
  const int64_t first = block * kLanes<C>;
  const int64_t last = first + kLanes<C> < lanes.count ? first + kLanes<C> - 1 : lanes.count - 1;
  const int64_t seen = lanes.lastKey(last) + 1 - tileStart;
  if (seen <= 0) return {0, false};
  const bool whole = lanes.lastKey(first) >= tileStart + kKeyTile - 1 && last == first + kLanes<C> - 1;
  return {seen < kKeyTile ? seen : kKeyTile, !whole};
}

// Copies the tile's key rows of one head to out[kKeyTile][Dp]; rows that do not exist become zero.
template <class T, class C>
static void packKeys(const HeadRows<const T>& x, int64_t head, const KeyRows& rows, const int32_t* rowMap,
                     int64_t tileStart, int64_t count, int64_t D, C* out, int64_t Dp) {
  for (int64_t j = 0; j < kKeyTile; j++) {
    if (j < count) {
      const int64_t row = rows(tileStart + j);
      packRow(x.at(rowMap ? rowMap[row] : row, head), D, C(1), out + j * Dp, Dp);
    } else {
      memset(static_cast<void*>(out + j * Dp), 0, Dp * sizeof(C));
    }
  }
}

// Hands out 64-byte aligned arrays from one block; with a null base it only counts the bytes.
struct Arena {
  char* base;
  size_t used = 0;
  template <class E>
  E* take(int64_t n) {
    const size_t at = used;
    used += roundUp(n * static_cast<int64_t>(sizeof(E)), 64);
    return base ? reinterpret_cast<E*>(base + at) : nullptr;
  }
};

}  // namespace kg::cpu::KG_ISA::attention
