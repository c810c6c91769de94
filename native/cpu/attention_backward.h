// What the backward of attention and its tangent share: rows of the cotangent layout, packing, probabilities from lse,
// and the plan by which no two jobs write the same memory and every sum has an order fixed by its family's shape.
// Everything is indexed by rows of the cotangent layout; primal rows are reached through rowMap.
#pragma once

#include "cpu/attention.h"
#include "runtime/threads.h"

namespace kg::cpu::KG_ISA {
namespace attention {
namespace {

template <class T>
struct CotangentSide {
  using C = compute_t<T>;
  Heads heads;  // heads.T: cotangent rows
  int64_t Dp;
  C scale;
  HeadRows<T> dq, dk, dv;
  const int32_t* rowMap;
  SegmentTable segments;  // of the cotangent layout
  C* partial;             // [split][key head][cotangent row][dk, dv][Dp]

  KG_INLINE int64_t primal(int64_t row) const { return rowMap ? rowMap[row] : row; }
  KG_INLINE C* keyGradients(int64_t split, int64_t keyHead, int64_t row) const {
    return partial + ((split * heads.key + keyHead) * heads.T + row) * 2 * Dp;
  }
};

// rows[lane][Dp] of one block: factor * x at each lane's row and head, zeros for a lane without a row.
template <class T, class C, class RowOf>
KG_INLINE void packBlock(const HeadRows<const T>& x, const Lanes& lanes, int64_t first, int64_t D, C factor, C* rows,
                         int64_t Dp, const RowOf& rowOf) {
  for (int64_t i = 0; i < kLanes<C>; i++) {
    const int64_t lane = first + i;
    if (lane < lanes.count)
      packRow(x.at(rowOf(lanes.row(lane)), lanes.head(lane)), D, factor, rows + i * Dp, Dp);
    else
      memset(static_cast<void*>(rows + i * Dp), 0, Dp * sizeof(C));
  }
}

// delta = sum of out * dout in the very order of d probabilities: where one key has all the weight, the two cancel.
template <class C>
void deltaOfBlock(const C* outs, const C* douts, int64_t Dp, C* delta) {
  using V = Vec<C>;
  constexpr int W = kLanes<C>;
  for (int x = 0; x < W; x += V::N) {
    V sum(C(0));
    for (int64_t at = x; at < Dp * W; at += W) sum = fma(V::load(outs + at), V::load(douts + at), sum);
    sum.store(delta + x);
  }
}

// scores -> probabilities, in place; 0 where masked.
template <bool Masked, class C>
void probabilityTile(int64_t keys, int64_t tileStart, C* scores, const C* limit, const C* lse) {
  using V = Vec<C>;
  constexpr int W = kLanes<C>;
  for (int x = 0; x < W; x += V::N) {
    const V last = V::load(limit + x), norm = V::load(lse + x);
    for (int64_t j = 0; j < keys; j++) {
      V e = expOfDifference(V::load(scores + j * W + x) - norm);
      if (Masked) e = select(last >= V(static_cast<C>(tileStart + j)), e, V(C(0)));
      e.store(scores + j * W + x);
    }
  }
}

template <class C>
KG_INLINE void addRow(const C* src, C* dst, int64_t Dp) {
  for (int64_t d = 0; d < Dp; d += Vec<C>::N) (Vec<C>::load(dst + d) + Vec<C>::load(src + d)).store(dst + d);
}

// dq of a chunk's rows, from its transposed sums; `rows` is overwritten.
template <class T, class C>
void storeQueries(const CotangentSide<T>& p, const Lanes& lanes, const C* sums, C* rows) {
  constexpr int W = kLanes<C>;
  for (int64_t first = 0; first < lanes.count; first += W) {
    transpose(sums + first * p.Dp, p.Dp, W, rows + first * p.Dp);
    for (int64_t lane = first; lane < first + W && lane < lanes.count; lane++)
      storeRow(rows + lane * p.Dp, p.scale, p.dq.at(lanes.row(lane), lanes.head(lane)), p.heads.D);
  }
}

inline void checkRowMap(const char* op, const TensorView& map, int64_t rows, int64_t primalRows) {
  const int32_t* to = map.ptr<const int32_t>();
  if (map.dtype != DType::I32 || map.numel() != rows)
    fail("[%s] expected rowMap int32 [%lld], found %s with %lld entries", op, (long long)rows, dtypeName(map.dtype),
         (long long)map.numel());
  for (int64_t i = 0; i < rows; i++)
    if (to[i] < 0 || to[i] >= primalRows)
      fail("[%s] expected rowMap entries in [0, %lld), found %d at %lld", op, (long long)primalRows, to[i],
           (long long)i);
}

// Where a call's tensors begin: dq dk dv; dout; q k v; segments, cotangentSegments, rowMap.
struct Places {
  int dq, dout, q, segments;
};

template <class T>
void readSide(const char* op, const Call& call, const Places& at, CotangentSide<T>& p) {
  p.heads = checkedHeads(op, call[at.q], call[at.q + 1], call[at.q + 2]);
  const int64_t primalRows = p.heads.T;
  p.heads.T = call[at.dout].size(0);
  const TensorView &map = call[at.segments + 2], &own = call[at.segments + 1];
  if (map.present())
    checkRowMap(op, map, p.heads.T, primalRows);
  else if (p.heads.T != primalRows)
    fail("[%s] expected dout with %lld rows, found %lld; give a rowMap", op, (long long)primalRows,
         (long long)p.heads.T);
  p.Dp = paddedDim<compute_t<T>>(p.heads.D);
  p.scale = static_cast<compute_t<T>>(call.attr(0));
  p.dq = HeadRows<T>(call[at.dq]);
  p.dk = HeadRows<T>(call[at.dq + 1]);
  p.dv = HeadRows<T>(call[at.dq + 2]);
  p.rowMap = map.present() ? map.ptr<const int32_t>() : nullptr;
  p.segments = checkedSegments(op, own.present() ? own : call[at.segments], p.heads.T);
  p.partial = nullptr;
}

template <class T>
void clearKeyGradients(const CotangentSide<T>& p, const FamilyPlan& plan, const Job& job, int64_t keyHead) {
  const Family& family = plan.families[job.family];
  const Chunk* chunks = plan.chunks + family.firstChunk;
  for (int32_t i = 0; i < family.chunkCount; i++)
    memset(static_cast<void*>(p.keyGradients(job.split, keyHead, p.segments[chunks[i].segment].start + chunks[i].row)),
           0, chunks[i].rows * 2 * p.Dp * sizeof(compute_t<T>));
}

// dk and dv of a chunk's rows: the sum over the family's splits, rounded once.
template <class T>
void gatherKeyGradients(const CotangentSide<T>& p, const Chunk& chunk, int64_t keyHead) {
  using C = compute_t<T>;
  const int64_t first = p.segments[chunk.segment].start + chunk.row;
  for (int64_t row = first; row < first + chunk.rows; row++) {
    C* total = p.keyGradients(0, keyHead, row);
    for (int32_t split = 1; split < chunk.splits; split++) addRow(p.keyGradients(split, keyHead, row), total, 2 * p.Dp);
    storeRow(total, C(1), p.dk.at(row, keyHead), p.heads.D);
    storeRow(total + p.Dp, C(1), p.dv.at(row, keyHead), p.heads.D);
  }
}

// runChunk(chunk, split, keyHead, tiles) for all chunks, each job's in order; then dk and dv. Tiles(arena, blocks, Dp).
template <class Tiles, class T, class F>
void runFamilies(const Call& call, CotangentSide<T>& p, const F& runChunk) {
  using C = compute_t<T>;
  const int64_t chunkRows = chunkRowsFor<C>(p.heads.group), blocks = chunkBlocksFor<C>(p.heads.group);
  const int64_t S = p.segments.count, chunks = maxChunks(p.segments, p.heads.T, chunkRows), heads = p.heads.key;
  const int64_t partials = splitsFor(p.heads.T, heads) * heads * p.heads.T * 2 * p.Dp;
  Arena measure{nullptr};
  Tiles(measure, blocks, p.Dp);
  const size_t tileBytes = measure.used, tilesBytes = tileBytes * threadCount();
  const size_t planBytes = chunks * sizeof(Chunk) + S * (sizeof(Family) + kMaxSplits * sizeof(Job) + 8) + 5 * 64;
  char* memory = static_cast<char*>(scratch(call, tilesBytes + partials * sizeof(C) + planBytes));
  Arena rest{memory + tilesBytes};
  p.partial = rest.take<C>(partials);
  FamilyPlan plan{
      rest.take<Chunk>(chunks), rest.take<Family>(S), rest.take<Job>(S * kMaxSplits), rest.take<int32_t>(2 * S), 0, 0};
  planFamilies(p.segments, chunkRows, heads, plan);
  parallelFor(plan.jobCount * heads, 1, [&](int64_t begin, int64_t end, int worker) {
    Arena arena{memory + tileBytes * worker};
    Tiles tiles(arena, blocks, p.Dp);
    for (int64_t i = begin; i < end; i++) {
      const Job& job = plan.jobs[i / heads];
      const Family& family = plan.families[job.family];
      clearKeyGradients(p, plan, job, i % heads);
      for (int32_t c = job.split; c < family.chunkCount; c += family.splits)
        runChunk(plan.chunks[family.firstChunk + c], job.split, i % heads, tiles);
    }
  });
  parallelFor(plan.chunkCount * heads, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) gatherKeyGradients(p, plan.chunks[i / heads], i % heads);
  });
}

}  // namespace
}  // namespace attention
}  // namespace kg::cpu::KG_ISA
