// Causal grouped-query attention over packed segments, backward, for any dtype and head dimensions up to 256.
//
// Contract: kernels.def, attentionBackward. As the kernels on tensor cores, on CUDA cores: one kernel's blocks hold
// query rows (delta, dq), the other's keys (dk, dv: over the query heads of their key head, their own segment and then
// its children, query tiles, in this order), so nothing is added by atomics and every sum has one order. The two tiles
// that a block holds stay in shared memory; those that pass by share one place.
//
// H100, 8 segments of 1024, 14 heads, D 64, float32: 52.7 GFLOP; half a shared memory read a multiply-add: 1.6 ms at
// best, 2 to 4 ms expected.
#include "cuda/attention_backward.h"
#include "cuda/attention_general.h"

namespace kg::cuda::attention {

namespace {

template <class T>
struct GeneralCall {
  Backward<T> p;
  compute_t<T>* delta;  // [Hq][cotangent rows]
};

template <class C, int Tile>
struct Tiles {
  C *first, *second, *passing, *square;
  KG_DEVICE explicit Tiles(int D) {
    const int tile = Tile * rowStride(D);
    first = reinterpret_cast<C*>(dynamicShared());
    second = first + tile;
    passing = second + tile;
    square = passing + tile;
  }
};

template <class T, int Tile, int Columns>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kGeneralThreads, 1) queriesGeneralKernel(GeneralCall<T> call) {
  using C = compute_t<T>;
  constexpr int M = Tile / kSide;
  const Backward<T>& p = call.p;
  const int D = p.heads.D, head = static_cast<int>(blockIdx.x % p.heads.query), keyHead = head / p.heads.group;
  const uint32_t slot = blockIdx.x / p.heads.query;
  Chunk chunk;
  const Found found = findChunk(p.segments, slot, Tile, Deal::LastFirst, p.faults, chunk);
  if (found == Found::BadTable) return fillNaN(p.dq, head, D, slot, Tile, p.heads.rows);
  if (found == Found::Nothing) return;
  const Tiles<C, Tile> at(D);
  C *const queries = at.first, *const douts = at.second;
  const KeyRows keyOf = keyRows(p.segments, p.segments[chunk.segment]);
  const int firstRow = keyOf.ownStart + chunk.row, firstKey = keyOf.parentLength + chunk.row;
  const int end = firstKey + chunk.rows;
  const auto queryRow = [&](int r) { return p.rowMap(firstRow + r, p.faults); };
  fillTile<Tile, Columns>(queries, p.q, head, D, chunk.rows, static_cast<C>(p.scale), queryRow);
  fillTile<Tile, Columns>(douts, p.dout, head, D, chunk.rows, C(1), [&](int r) { return firstRow + r; });
  fillTile<Tile, Columns>(at.passing, p.out, head, D, chunk.rows, C(1), queryRow);
  syncThreads();
  C delta[M], lse[M], factor[M];
  rowProducts<C, Tile>(delta, douts, at.passing, D);
  KG_UNROLL for (int i = 0; i < M; i++) {
    const int r = threadRow() + kSide * i;
    factor[i] = static_cast<C>(p.scale);
    lse[i] = INFINITY;
    if (r >= chunk.rows) continue;
    const int64_t primal = queryRow(r);
    lse[i] = primal < 0 ? static_cast<C>(NAN) : p.lse[primal * p.heads.query + head];
    if (threadColumn() == 0) call.delta[static_cast<int64_t>(head) * p.heads.rows + firstRow + r] = delta[i];
  }
  Sums<C, Tile, Columns> dq;
  dq.clear();
  for (int first = 0; first < end; first += Tile) {
    const auto keyRow = [&](int r) { return p.rowMap(keyOf(first + r), p.faults); };
    Square<C, Tile> s, ds;
    syncThreads();
    fillTile<Tile, Columns>(at.passing, p.v, keyHead, D, end - first, C(1), keyRow);
    syncThreads();
    product(ds, douts, at.passing, D);
    syncThreads();
    fillTile<Tile, Columns>(at.passing, p.k, keyHead, D, end - first, C(1), keyRow);
    syncThreads();
    product(s, queries, at.passing, D);
    KG_UNROLL for (int i = 0; i < M; i++) KG_UNROLL for (int j = 0; j < M; j++) {
      const bool seen = threadColumn() + kSide * j <= firstKey - first + threadRow() + kSide * i;
      const C e = seen ? std::exp(s.v[i][j] - lse[i]) : C(0);
      ds.v[i][j] = e * (ds.v[i][j] - delta[i]);
    }
    share(ds, at.square);
    accumulate(dq, at.square, at.passing, D);
  }
  storeSums(dq, factor, p.dq, firstRow, head, D, chunk.rows);
}

// What a block that holds keys adds up over one query head.
template <class C, int Tile, int Columns>
struct KeySums {
  Sums<C, Tile, Columns> dk, dv;
};

// Adds what query rows firstRow..firstRow+count give to the keys (forQueryTiles).
template <class T, int Tile, int Columns>
KG_DEVICE void visitQueries(const GeneralCall<T>& call, const Tiles<compute_t<T>, Tile>& at, int head, int firstRow,
                            int count, int behind, KeySums<compute_t<T>, Tile, Columns>& sums) {
  using C = compute_t<T>;
  constexpr int M = Tile / kSide;
  const Backward<T>& p = call.p;
  const int D = p.heads.D;
  const auto queryRow = [&](int r) { return p.rowMap(firstRow + r, p.faults); };
  C lse[M], delta[M];
  KG_UNROLL for (int j = 0; j < M; j++) {
    const int r = threadColumn() + kSide * j;
    lse[j] = INFINITY;
    delta[j] = 0;
    if (r >= count) continue;
    const int64_t primal = queryRow(r);
    lse[j] = primal < 0 ? static_cast<C>(NAN) : p.lse[primal * p.heads.query + head];
    delta[j] = call.delta[static_cast<int64_t>(head) * p.heads.rows + firstRow + r];
  }
  Square<C, Tile> s, ds;
  syncThreads();
  fillTile<Tile, Columns>(at.passing, p.q, head, D, count, static_cast<C>(p.scale), queryRow);
  syncThreads();
  product(s, at.first, at.passing, D);
  KG_UNROLL for (int i = 0; i < M; i++) KG_UNROLL for (int j = 0; j < M; j++) {
    const bool seen = behind + threadRow() + kSide * i <= threadColumn() + kSide * j;
    s.v[i][j] = seen ? std::exp(s.v[i][j] - lse[j]) : C(0);
  }
  syncThreads();
  fillTile<Tile, Columns>(at.passing, p.dout, head, D, count, C(1), [&](int r) { return firstRow + r; });
  syncThreads();
  product(ds, at.second, at.passing, D);
  share(s, at.square);
  accumulate(sums.dv, at.square, at.passing, D);
  KG_UNROLL for (int i = 0; i < M; i++) KG_UNROLL for (int j = 0; j < M; j++) ds.v[i][j] =
      s.v[i][j] * (ds.v[i][j] - delta[j]);
  share(ds, at.square);
  syncThreads();
  fillTile<Tile, Columns>(at.passing, p.q, head, D, count, static_cast<C>(p.scale), queryRow);
  syncThreads();
  accumulate(sums.dk, at.square, at.passing, D);
}

template <class T, int Tile, int Columns>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kGeneralThreads, 1) keysGeneralKernel(GeneralCall<T> call) {
  using C = compute_t<T>;
  const Backward<T>& p = call.p;
  const int D = p.heads.D, keyHead = static_cast<int>(blockIdx.x % p.heads.key);
  const uint32_t slot = blockIdx.x / p.heads.key;
  Chunk chunk;
  const Found found = findChunk(p.segments, slot, Tile, Deal::FirstFirst, p.faults, chunk);
  if (found == Found::BadTable) {
    fillNaN(p.dk, keyHead, D, slot, Tile, p.heads.rows);
    return fillNaN(p.dv, keyHead, D, slot, Tile, p.heads.rows);
  }
  if (found == Found::Nothing) return;
  const Tiles<C, Tile> at(D);
  const int firstRow = p.segments[chunk.segment].start + chunk.row;
  const auto keyRow = [&](int r) { return p.rowMap(firstRow + r, p.faults); };
  fillTile<Tile, Columns>(at.first, p.k, keyHead, D, chunk.rows, C(1), keyRow);
  fillTile<Tile, Columns>(at.second, p.v, keyHead, D, chunk.rows, C(1), keyRow);
  KeySums<C, Tile, Columns> sums;
  sums.dk.clear();
  sums.dv.clear();
  for (int head = keyHead * p.heads.group; head < (keyHead + 1) * p.heads.group; head++)
    forQueryTiles<Tile>(p.segments, chunk, [&](int row, int count, int behind) {
      visitQueries<T, Tile>(call, at, head, row, count, behind, sums);
    });
  C one[Tile / kSide];
  KG_UNROLL for (int i = 0; i < Tile / kSide; i++) one[i] = 1;
  storeSums(sums.dk, one, p.dk, firstRow, keyHead, D, chunk.rows);  // the scale came with the queries
  storeSums(sums.dv, one, p.dv, firstRow, keyHead, D, chunk.rows);
}

template <class T, int Tile, int Columns>
void enqueue(const Call& call, const Backward<T>& p) {
  using C = compute_t<T>;
  const GeneralCall<T> on{
      p, static_cast<C*>(scratch(call, static_cast<size_t>(p.heads.rows) * p.heads.query * sizeof(C)))};
  const size_t bytes = (3 * Tile * rowStride(p.heads.D) + Tile * (Tile + 1)) * sizeof(C);
  const int64_t slots = slotsFor(p.segments, Tile);
  launch(call, {gridOf(slots * p.heads.query), kGeneralThreads, bytes}, queriesGeneralKernel<T, Tile, Columns>, on);
  launch(call, {gridOf(slots * p.heads.key), kGeneralThreads, bytes}, keysGeneralKernel<T, Tile, Columns>, on);
}

// Three tiles of rows and a square of scores within 99 KiB. float64 has one kernel for all D (attention_general.cu).
template <class T>
void backwardFor(const Call& call, const Backward<T>& p) {
  if constexpr (sizeof(compute_t<T>) == 4) {
    if (p.heads.D <= 64) return enqueue<T, 64, 64 / kSide>(call, p);
    if (p.heads.D <= 128) return enqueue<T, 32, 128 / kSide>(call, p);
  }
  enqueue<T, 16, 256 / kSide>(call, p);
}

}  // namespace

void backwardGeneral(const Call& call, const Backward<float>& p) { backwardFor(call, p); }
void backwardGeneral(const Call& call, const Backward<double>& p) { backwardFor(call, p); }
void backwardGeneral(const Call& call, const Backward<bf16>& p) { backwardFor(call, p); }

}  // namespace kg::cuda::attention
