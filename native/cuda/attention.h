// What all kernels of attention share: the views and checks of a call, the segment table on the device, and how a block
// finds its work in it. Holds no kernel and no tile of numbers.
//
// The host may not read the table, so a grid has an upper bound of blocks (slots); each finds its chunk of a segment by
// a prefix sum over the table, and checks the whole table on the way: nothing behind a malformed one is ever addressed.
#pragma once

#include "cuda/packs.h"

namespace kg::cuda::attention {

// A [rows, heads, D] tensor, unit stride on the last axis.
template <class T>
struct HeadRows {
  T* data;
  int64_t rowStride, headStride;
  static HeadRows of(const TensorView& t) { return {t.ptr<T>(), t.stride(0), t.stride(1)}; }
  KG_DEVICE T* at(int64_t row, int head) const { return data + row * rowStride + head * headStride; }
};

struct Heads {
  int32_t rows, query, key, group, D;  // rows of the layout, heads, query heads a key head, head dimension
  int32_t splits;                      // blocks that share a key head where keys are held
};

struct Segment {
  int32_t start, length, parent;
};

struct SegmentTable {
  const int32_t* rows;  // [count, 4]
  int32_t count, total;
  KG_DEVICE Segment operator[](int s) const { return {rows[4 * s], rows[4 * s + 1], rows[4 * s + 2]}; }
};

// Row of the layout that holds logical key j of a segment: its parent's rows come first, then its own.
struct KeyRows {
  int32_t parentStart, parentLength, ownStart;
  KG_DEVICE int operator()(int j) const { return j < parentLength ? parentStart + j : ownStart + (j - parentLength); }
};

KG_DEVICE KeyRows keyRows(const SegmentTable& table, const Segment& own) {
  if (own.parent < 0) return {0, 0, own.start};
  const Segment parent = table[own.parent];
  return {parent.start, parent.length, own.start};
}

// `rows` rows of a segment from its row `row` on.
struct Chunk {
  int32_t segment, row, rows;
};

enum class Found { Chunk, Nothing, BadTable };
// Query chunks: the last has most keys. Key chunks: the first has most queries. Longest work first, within a segment.
enum class Deal { LastFirst, FirstFirst };

// Whether segment s continues the table as it must; if this holds for all, all rows are within [0, total).
KG_DEVICE bool wellFormed(const SegmentTable& table, int s) {
  const Segment own = table[s];
  int64_t expected = 0;
  if (s > 0) expected = static_cast<int64_t>(table[s - 1].start) + table[s - 1].length;
  if (own.start != expected || own.length < 0 || own.parent < -1 || own.parent >= s) return false;
  if (own.parent >= 0 && table[own.parent].parent >= 0) return false;
  return s + 1 < table.count || expected + own.length == table.total;
}

KG_DEVICE uint32_t chunksOf(int32_t length, int chunkRows) {
  return length > 0 ? (static_cast<uint32_t>(length) + chunkRows - 1) / chunkRows : 0;
}

// This thread's share of the table: its chunks, and the first malformed segment (-1: none).
struct Share {
  int first, end, bad;
  uint32_t chunks;
};
KG_DEVICE Share shareOfTable(const SegmentTable& table, int chunkRows) {
  const int threads = static_cast<int>(blockDim.x), each = (table.count + threads - 1) / threads;
  Share share{static_cast<int>(threadIdx.x) * each, 0, -1, 0};
  share.end = share.first + each < table.count ? share.first + each : table.count;
  for (int s = share.first; s < share.end; s++) {
    if (!wellFormed(table, s) && share.bad < 0) share.bad = s;
    share.chunks += chunksOf(table[s].length, chunkRows);
  }
  if (table.count == 0 && table.total > 0 && threadIdx.x == 0) share.bad = 0;
  return share;
}

KG_DEVICE uint32_t inclusiveWarpSum(uint32_t v) {
  for (int delta = 1; delta < kWarp; delta <<= 1) {
    const uint32_t below = shuffleUp(v, delta);
    if (laneId() >= delta) v += below;
  }
  return v;
}

// Chunk `slot` of the table. All threads of the block take part, once a kernel; all receive the same.
KG_DEVICE Found findChunk(const SegmentTable& table, uint32_t slot, int chunkRows, Deal deal, const FaultSink& faults,
                          Chunk& chunk) {
  KG_SHARED(int32_t, found, 4);
  KG_SHARED(uint32_t, warpChunks, kWarp);
  KG_SHARED(int32_t, warpBad, kWarp);
  const Share share = shareOfTable(table, chunkRows);
  if (share.bad >= 0) reportFault(faults, FaultKind::BadSegments, share.bad, 0, 0);
  const uint32_t through = inclusiveWarpSum(share.chunks);
  const bool bad = anyLane(share.bad >= 0);
  if (threadIdx.x == 0) found[0] = -1;
  if (laneId() == kWarp - 1) {
    warpChunks[warpId()] = through;
    warpBad[warpId()] = bad;
  }
  syncThreads();
  bool anyBad = false;
  uint32_t at = through - share.chunks;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; w++) {
    anyBad = anyBad || warpBad[w] != 0;
    if (w < warpId()) at += warpChunks[w];
  }
  if (anyBad) return Found::BadTable;
  if (slot >= at && slot < at + share.chunks) {
    for (int s = share.first; s < share.end; s++) {
      const int32_t length = table[s].length;
      const uint32_t count = chunksOf(length, chunkRows);
      if (slot >= at && slot < at + count) {
        const int row = static_cast<int>(deal == Deal::LastFirst ? at + count - 1 - slot : slot - at) * chunkRows;
        found[0] = s;
        found[1] = row;
        found[2] = length - row < chunkRows ? length - row : chunkRows;
      }
      at += count;
    }
  }
  syncThreads();
  chunk = {found[0], found[1], found[2]};
  return chunk.segment < 0 ? Found::Nothing : Found::Chunk;
}

// The first segment after `s` that has rows and is a child of `parent`; count if there is none. For whole warps.
KG_DEVICE int nextChild(const SegmentTable& table, int parent, int s) {
  for (int first = s + 1; first < table.count; first += kWarp) {
    const int mine = first + laneId();
    bool child = false;
    if (mine < table.count) {
      const Segment other = table[mine];
      child = other.parent == parent && other.length > 0;
    }
    const int nearest = warpReduce(child ? mine : table.count, [](int a, int b) { return a < b ? a : b; });
    if (nearest < table.count) return nearest;
  }
  return table.count;
}

// NaN into the rows that slot `slot` of chunkRows rows each would cover if there were no segments: together, all rows.
template <class T>
KG_DEVICE void fillNaN(const HeadRows<T>& x, int head, int D, uint32_t slot, int chunkRows, int total) {
  const int64_t first = static_cast<int64_t>(slot) * chunkRows;
  for (int64_t row = first + warpId(); row < first + chunkRows && row < total; row += blockDim.x / kWarp)
    for (int d = laneId(); d < D; d += kWarp) x.at(row, head)[d] = static_cast<compute_t<T>>(NAN);
}

// ---- host half ----------------------------------------------------------------------------------------------------

inline Heads checkedHeads(const char* op, const TensorView& q, const TensorView& k, const TensorView& v) {
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
  return {static_cast<int32_t>(q.size(0)), static_cast<int32_t>(q.size(1)),
          static_cast<int32_t>(k.size(1)), static_cast<int32_t>(q.size(1) / k.size(1)),
          static_cast<int32_t>(q.size(2)), 1};
}

inline SegmentTable checkedSegments(const char* op, const TensorView& t, int64_t rows) {
  if (t.dtype != DType::I32 || t.ndim != 2 || t.size(1) != 4)
    fail("[%s] expected segments int32 [S, 4], found %s with %d axes", op, dtypeName(t.dtype), t.ndim);
  return {t.ptr<const int32_t>(), static_cast<int32_t>(t.size(0)), static_cast<int32_t>(rows)};
}

// Every segment has at most one chunk that is not full; one slot more covers a table without segments.
inline int64_t slotsFor(const SegmentTable& table, int chunkRows) {
  return table.total / chunkRows + (table.count > 0 ? table.count : 1);
}

// True where every row and head of t begins on 16 bytes.
inline bool alignedRows(const TensorView& t) {
  return onPacks(t, t.size(0) > 1 ? t.stride(0) : 0) && onPacks(t, t.size(1) > 1 ? t.stride(1) : 0);
}

}  // namespace kg::cuda::attention
