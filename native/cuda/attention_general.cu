// Causal grouped-query attention over packed segments, forward, for any dtype and head dimensions up to 256.
//
// Contract: kernels.def, attention. As the kernel on tensor cores, on CUDA cores: a block holds Tile query rows of a
// head and walks over their logical keys in tiles of as many, aligned on the logical key axis; the tile depends on
// dtype and head dimension alone. Everything is computed in the accumulation dtype, and nothing of T x T exists.
//
// H100, 8 segments of 1024, 14 heads, D 64, float32: 15.0 GFLOP, 68 MB. A multiply-add takes half a shared memory read
// (4 x 4 a thread): half of 67 TFLOP/s at best, 0.45 ms; 0.6 to 1 ms expected.
#include "cuda/attention_forward.h"
#include "cuda/attention_general.h"

namespace kg::cuda::attention {

namespace {

template <class C, int Tile, int Columns>
struct RowState {
  static constexpr int M = Tile / kSide;
  Sums<C, Tile, Columns> sums;
  C maximum[M], total[M];  // total: of this thread's columns alone until the end
};

// scores -> exp(score - new maximum); rescales what the row has summed so far. A row sees its keys up to ahead + row.
template <class C, int Tile, int Columns>
KG_DEVICE void softmaxTile(Square<C, Tile>& s, RowState<C, Tile, Columns>& state, int ahead) {
  constexpr int M = Tile / kSide;
  KG_UNROLL for (int i = 0; i < M; i++) {
    C top = state.maximum[i];
    KG_UNROLL for (int j = 0; j < M; j++) {
      if (threadColumn() + kSide * j > ahead + threadRow() + kSide * i) s.v[i][j] = -INFINITY;
      top = std::fmax(top, s.v[i][j]);
    }
    for (int mask = kSide / 2; mask > 0; mask >>= 1) top = std::fmax(top, shuffleXor(top, mask));
    const C rescale = std::exp(state.maximum[i] - top);
    state.maximum[i] = top;
    C sum = 0;
    KG_UNROLL for (int j = 0; j < M; j++) {
      s.v[i][j] = std::exp(s.v[i][j] - top);
      sum += s.v[i][j];
    }
    state.total[i] = std::fma(state.total[i], rescale, sum);
    KG_UNROLL for (int c = 0; c < Columns; c++) state.sums.v[i][c] *= rescale;
  }
}

template <class T, class C, int Tile, int Columns>
KG_DEVICE void storeState(const Forward<T>& p, const RowState<C, Tile, Columns>& state, int64_t row, int head,
                          int count) {
  constexpr int M = Tile / kSide;
  C factor[M];
  KG_UNROLL for (int i = 0; i < M; i++) {
    C total = state.total[i];
    for (int mask = kSide / 2; mask > 0; mask >>= 1) total += shuffleXor(total, mask);
    factor[i] = C(1) / total;
    const int r = threadRow() + kSide * i;
    if (threadColumn() == 0 && r < count) p.lse[(row + r) * p.heads.query + head] = state.maximum[i] + std::log(total);
  }
  storeSums(state.sums, factor, p.out, row, head, p.heads.D, count);
}

template <class T, int Tile, int Columns>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kGeneralThreads) forwardGeneralKernel(Forward<T> p) {
  using C = compute_t<T>;
  const int D = p.heads.D, head = static_cast<int>(blockIdx.x % p.heads.query), keyHead = head / p.heads.group;
  const uint32_t slot = blockIdx.x / p.heads.query;
  Chunk chunk;
  const Found found = findChunk(p.segments, slot, Tile, Deal::LastFirst, p.faults, chunk);
  if (found == Found::BadTable) return fillNaN(p.out, head, D, slot, Tile, p.heads.rows);
  if (found == Found::Nothing) return;
  C* const queries = reinterpret_cast<C*>(dynamicShared());
  C* const keys = queries + Tile * rowStride(D);  // and values, in turn
  C* const square = keys + Tile * rowStride(D);
  const KeyRows keyOf = keyRows(p.segments, p.segments[chunk.segment]);
  const int firstRow = keyOf.ownStart + chunk.row, firstKey = keyOf.parentLength + chunk.row;
  const int end = firstKey + chunk.rows;
  fillTile<Tile, Columns>(queries, p.q, head, D, chunk.rows, static_cast<C>(p.scale),
                          [&](int r) { return firstRow + r; });
  RowState<C, Tile, Columns> state;
  state.sums.clear();
  KG_UNROLL for (int i = 0; i < Tile / kSide; i++) {
    state.maximum[i] = -INFINITY;
    state.total[i] = 0;
  }
  for (int first = 0; first < end; first += Tile) {
    const auto keyRow = [&](int r) { return keyOf(first + r); };
    fillTile<Tile, Columns>(keys, p.k, keyHead, D, end - first, C(1), keyRow);
    syncThreads();
    Square<C, Tile> s;
    product(s, queries, keys, D);
    softmaxTile(s, state, firstKey - first);
    share(s, square);
    syncThreads();
    fillTile<Tile, Columns>(keys, p.v, keyHead, D, end - first, C(1), keyRow);
    syncThreads();
    accumulate(state.sums, square, keys, D);
    syncThreads();
  }
  storeState(p, state, firstRow, head, chunk.rows);
}

template <class T, int Tile, int Columns>
void enqueue(const Call& call, const Forward<T>& p) {
  const size_t elements = 2 * Tile * rowStride(p.heads.D) + Tile * (Tile + 1);
  launch(call, {gridOf(slotsFor(p.segments, Tile) * p.heads.query), kGeneralThreads, elements * sizeof(compute_t<T>)},
         forwardGeneralKernel<T, Tile, Columns>, p);
}

// Two tiles of rows and a square of scores within 99 KiB. float64, for checks of gradients, has one kernel for all D:
// it need not be fast, and kernels take long to compile.
template <class T>
void forwardFor(const Call& call, const Forward<T>& p) {
  if constexpr (sizeof(compute_t<T>) == 8) {
    enqueue<T, 16, 256 / kSide>(call, p);
  } else {
    if (p.heads.D <= 128) return enqueue<T, 64, 128 / kSide>(call, p);
    enqueue<T, 32, 256 / kSide>(call, p);
  }
}

}  // namespace

void forwardGeneral(const Call& call, const Forward<float>& p) { forwardFor(call, p); }
void forwardGeneral(const Call& call, const Forward<double>& p) { forwardFor(call, p); }
void forwardGeneral(const Call& call, const Forward<bf16>& p) { forwardFor(call, p); }

}  // namespace kg::cuda::attention
