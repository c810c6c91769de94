// Causal grouped-query attention over packed segments, forward: the host half, and the kernel for bfloat16 with head
// dimensions 64 and 128.
//
// Contract: kernels.def, attention. FlashAttention-2 (Dao 2023): a block holds 16 MT rows a warp of one query head and
// walks over their logical keys in tiles of 64, copied one tile ahead; scores stay in registers, the softmax is online
// in base 2 with float32 accumulation. A row's value depends on its logical keys alone: tiles are aligned on (parent
// rows ++ own rows), and to a row a tile behind its last key is as if it were not there, bit for bit.
//
// H100, 8 segments of 1024, 14 heads on 2, D 64: pairs = 8 * 1024 * 1025 / 2, flops = 4 * 64 * 14 * pairs = 15.0 GFLOP
// (+ 6 % for the diagonal); bytes = q 14.7 + out 14.7 + k, v 4.2 + lse 0.5 MB = 34 MB. 10.2 us of memory, 15 us of
// tensor cores at 989 TFLOP/s; mma.sync reaches about 60 % of those and the exponentials (58.8 M at 16 a clock a
// multiprocessor, 16 us) run beside it: 26 us at best, 45 to 60 us expected.
// A prompt that several responses share lies in memory once; the query blocks of each response load its k and v for
// themselves, from L2 after the first.
// Shared memory reads a warp and tile (D 64, MT 2): 16 KB for 0.26 M multiply-adds, 16 a byte: 2,048 a clock, twice
// what mma.sync takes; with MT 1 it would be the limit.
#include "cuda/attention_forward.h"
#include "cuda/attention_mma.h"

namespace kg::cuda {
namespace attention {

namespace {

// What the rows of a warp carry through their keys: row g + 8 half of each 16.
template <int D, int MT>
struct RowState {
  Accumulator<MT, D / 8> sums;
  float maximum[MT][2];  // of the raw scores
  float total[MT][2];    // of this lane's columns alone until the end
};

template <int D, int MT>
KG_DEVICE void start(RowState<D, MT>& state) {
  clear<MT, D / 8>(state.sums);
  KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int half = 0; half < 2; half++) {
    state.maximum[m][half] = -INFINITY;
    state.total[m][half] = 0;
  }
}

// Scores of keys behind a row's last one become -inf. `ahead`: the last key that the warp's first row sees, minus the
// tile's first key.
template <int MT>
KG_DEVICE void maskScores(Accumulator<MT, kKeyTile / 8>& s, int ahead) {
  const int g = laneId() / 4, t = laneId() % 4;
  KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int n = 0; n < kKeyTile / 8; n++)
      KG_UNROLL for (int i = 0; i < 4; i++) if (8 * n + 2 * t + i % 2 > ahead + 16 * m + g + 8 * (i / 2)) s[m][n][i] =
          -INFINITY;
}

// scores -> exp2(c * (score - new maximum)); rescales what the row has summed so far.
template <int D, int MT>
KG_DEVICE void softmaxTile(Accumulator<MT, kKeyTile / 8>& s, RowState<D, MT>& state, float c) {
  KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int half = 0; half < 2; half++) {
    float top = state.maximum[m][half];
    KG_UNROLL for (int n = 0; n < kKeyTile / 8; n++) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
    top = fmaxf(top, shuffleXor(top, 1));
    top = fmaxf(top, shuffleXor(top, 2));
    const float rescale = fastExp2((state.maximum[m][half] - top) * c), shift = top * c;
    state.maximum[m][half] = top;
    float sum = 0;
    KG_UNROLL for (int n = 0; n < kKeyTile / 8; n++) KG_UNROLL for (int i = 2 * half; i < 2 * half + 2; i++) {
      s[m][n][i] = fastExp2(fmaf(s[m][n][i], c, -shift));
      sum += s[m][n][i];
    }
    state.total[m][half] = fmaf(state.total[m][half], rescale, sum);
    KG_UNROLL for (int n = 0; n < D / 8; n++) {
      state.sums[m][n][2 * half] *= rescale;
      state.sums[m][n][2 * half + 1] *= rescale;
    }
  }
}

// Divides by the totals and writes the warp's rows and their lse.
template <int D, int MT>
KG_DEVICE void storeState(const Forward<bf16>& p, RowState<D, MT>& state, bf16* tile, int tileRow, int64_t row,
                          int head, int count) {
  const int g = laneId() / 4;
  float factor[MT][2];
  KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int half = 0; half < 2; half++) {
    float total = state.total[m][half];
    total += shuffleXor(total, 1);
    total += shuffleXor(total, 2);
    factor[m][half] = 1.0f / total;
    const int r = 16 * m + g + 8 * half;
    if (laneId() % 4 == 0 && r < count)
      p.lse[(row + r) * p.heads.query + head] = fmaf(state.maximum[m][half], static_cast<float>(p.scale), logf(total));
  }
  storeRows<D, MT>(state.sums, factor, tile, tileRow, p.out, row, head, count);
}

template <int D, int MT>
struct ForwardShared {
  static constexpr int kRows = 16 * MT * kTileThreads / kWarp;
  bf16 queries[kRows * D];
  bf16 keys[2][kKeyTile * D], values[2][kKeyTile * D];
};

template <int D, int MT>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kTileThreads) forwardKernel(Forward<bf16> p) {
  using Shared = ForwardShared<D, MT>;
  Shared& shared = *reinterpret_cast<Shared*>(dynamicShared());
  const int head = static_cast<int>(blockIdx.x % p.heads.query), keyHead = head / p.heads.group;
  const uint32_t slot = blockIdx.x / p.heads.query;
  Chunk chunk;
  const Found found = findChunk(p.segments, slot, Shared::kRows, Deal::LastFirst, p.faults, chunk);
  if (found == Found::BadTable) return fillNaN(p.out, head, D, slot, Shared::kRows, p.heads.rows);
  if (found == Found::Nothing) return;
  const KeyRows keyOf = keyRows(p.segments, p.segments[chunk.segment]);
  const int firstRow = keyOf.ownStart + chunk.row;
  const int keys = keyOf.parentLength + chunk.row + chunk.rows;  // that the last row sees
  const auto loadKeys = [&](int tile) {
    const int first = tile * kKeyTile;
    loadTiles<D, kKeyTile>(shared.keys[tile % 2], p.k, keyHead, shared.values[tile % 2], p.v, keyHead, keys - first,
                           [&](int r) { return keyOf(first + r); });
    copyAsyncCommit();
  };
  loadTile<D, Shared::kRows>(shared.queries, p.q, head, chunk.rows, [&](int r) { return firstRow + r; });
  copyAsyncCommit();
  loadKeys(0);
  copyAsyncWait<1>();
  syncThreads();

  const int warpRow = warpId() * 16 * MT, firstKey = keyOf.parentLength + chunk.row + warpRow;
  const bool idle = warpRow >= chunk.rows;
  const float c = static_cast<float>(p.scale) * kLog2e;
  std::conditional_t<D == 64, HeldRows<D, MT>, SharedRows<D, MT>> queries;  // as registers allow
  queries.load(shared.queries, warpRow);
  RowState<D, MT> state;
  start(state);
  const int tiles = (keys + kKeyTile - 1) / kKeyTile;
  for (int tile = 0; tile < tiles; tile++) {
    copyAsyncWait<0>();
    syncThreads();  // the tile is there, and no warp reads the other one any more
    if (tile + 1 < tiles) loadKeys(tile + 1);
    const int ahead = firstKey - tile * kKeyTile;
    if (idle || ahead + 16 * MT - 1 < 0) continue;
    Accumulator<MT, kKeyTile / 8> s;
    productWithRows<D, MT, kKeyTile / 8>(s, queries, shared.keys[tile % 2], 0);
    if (ahead < kKeyTile - 1) maskScores<MT>(s, ahead);
    softmaxTile<D, MT>(s, state, c);
    accumulateRows<D, MT, kKeyTile / 8>(state.sums, s, shared.values[tile % 2], 0);
  }
  if (!idle) storeState(p, state, shared.queries, warpRow, firstRow + warpRow, head, chunk.rows - warpRow);
}

template <int D, int MT>
void enqueue(const Call& call, const Forward<bf16>& p) {
  using Shared = ForwardShared<D, MT>;
  const int64_t slots = slotsFor(p.segments, Shared::kRows);
  launch(call, {gridOf(slots * p.heads.query), kTileThreads, sizeof(Shared)}, forwardKernel<D, MT>, p);
}

template <class T>
void forward(const Call& call) {
  const Heads heads = checkedHeads("attention", call[2], call[3], call[4]);
  const Forward<T> p{HeadRows<const T>::of(call[2]),
                     HeadRows<const T>::of(call[3]),
                     HeadRows<const T>::of(call[4]),
                     HeadRows<T>::of(call[0]),
                     call[1].ptr<compute_t<T>>(),
                     checkedSegments("attention", call[5], heads.rows),
                     heads,
                     call.attr(0),
                     context(call).faults};
  if (heads.rows == 0 || heads.query == 0) return;
  if constexpr (sizeof(T) == sizeof(bf16)) {
    bool aligned = (heads.D == 64 || heads.D == 128) && p.scale > 0;  // the online maximum is that of raw scores
    for (int i : {0, 2, 3, 4}) aligned = aligned && alignedRows(call[i]);
    if (aligned) return heads.D == 64 ? enqueue<64, 2>(call, p) : enqueue<128, 2>(call, p);
  }
  forwardGeneral(call, p);
}

}  // namespace
}  // namespace attention

void kernel_attention(const Call& call) {
  switch (call[2].dtype) {
    case DType::F32:
      return attention::forward<float>(call);
    case DType::F64:
      return attention::forward<double>(call);
    case DType::BF16:
      return attention::forward<bf16>(call);
    default:
      fail("[attention] expected q float32, float64 or bfloat16, found %s; cast it first", dtypeName(call[2].dtype));
  }
}

}  // namespace kg::cuda
