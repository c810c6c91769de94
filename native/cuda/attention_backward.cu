// Causal grouped-query attention over packed segments, backward, for bfloat16 with head dimensions 64 and 128.
//
// Contract: kernels.def, attentionBackward. Probabilities are recomputed from lse, tile by tile. Two kernels, so that
// nothing is added by atomics and every sum has one order:
//   queriesKernel  a block holds query rows and walks over their keys: delta = rowsum(dout * out), then dq. It leaves
//                  (lse, delta) of its rows for the next one. delta comes from the tensor cores that dout v comes from,
//                  so where one key has all the weight the two cancel to the bit.
//   keysKernel     a block holds keys, transposed: a warp's rows are keys, so that probabilities turn into operands in
//                  registers. It walks over the query heads of its key head, in them over its own segment and all that
//                  have it as their parent, in them over query tiles. Where key heads are few, their query heads are
//                  dealt to several blocks, whose float32 sums sumKernel adds in order. The deal depends on the heads
//                  alone: a row's gradient does not change with the batch.
//
// A prompt that several responses share lies in memory once: for dq the query blocks of each response load its k and v
// for themselves; for dk and dv a block holds the prompt's keys and walks over all its responses, so their sum is made
// where the keys are.
//
// H100, 8 segments of 1024, 14 heads on 2, D 64, pairs = 4.2 M: 7 products of 2 * 64 * 14 * pairs = 52.7 GFLOP (two of
// them over again, the price of no atomics). At the 60 % of 989 TFLOP/s that mma.sync reaches 89 us, 150 to 200 us
// expected. Bytes: queriesKernel 80 MB, keysKernel 34 MB in and 59 MB of float32 sums out, sumKernel 59 + 4 MB: 236 MB,
// 70 us, of which 18 us (sumKernel) are not hidden behind the products.
// Shared memory reads a warp (D 64): queries 16 multiply-adds a byte, keys 10.7: 1,370 a clock beside the 1,270 of
// mma.sync.
#include "cuda/attention_backward.h"
#include "cuda/attention_mma.h"

namespace kg::cuda {
namespace attention {

namespace {

constexpr int kQueryTile = 64;  // query rows that keysKernel has in shared memory at a time

// Of a query row: lse in base 2 and delta.
using RowStats = Pack<float, 2>;

struct TensorCoreCall {
  Backward<bf16> p;
  RowStats* stats;  // [Hq][cotangent rows]
  float* partial;   // [splits][cotangent rows][Hk][dk, dv][D]; null with one split
};

// ---- dq -----------------------------------------------------------------------------------------------------------

template <int D, int MT>
struct QueriesShared {
  static constexpr int kRows = 16 * MT * kTileThreads / kWarp;
  bf16 queries[kRows * D], douts[kRows * D];
  struct Stage {
    bf16 keys[kKeyTile * D], values[kKeyTile * D];
  } stages[2];
  KG_DEVICE bf16* outs() { return stages[1].keys; }  // before the second tile of keys
};

// out[m][half] of row g + 8 half: the diagonal of A X^T for the warp's own rows of the tile X.
template <int D, int MT, class A>
KG_DEVICE void rowProducts(float (&out)[MT][2], const A& rows, const bf16* tile, int row) {
  const int g = laneId() / 4, holder = (laneId() & ~3) | (g / 2);
  KG_UNROLL for (int m = 0; m < MT; m++) {
    Accumulator<1, 2> square;
    clear<1, 2>(square);
    KG_UNROLL for (int k = 0; k < D / 16; k++) {
      uint32_t a[4], low[2], high[2];
      rows(a, m, k);
      loadB<D>(low, high, tile, row + 16 * m, k);
      mmaBf16(square[0][0], a, low);
      mmaBf16(square[0][1], a, high);
    }
    out[m][0] = shuffle(g % 2 ? square[0][0][1] : square[0][0][0], holder);
    out[m][1] = shuffle(g % 2 ? square[0][1][3] : square[0][1][2], holder);
  }
}

// The stats of the warp's rows, kept and left for keysKernel. A row that is none sees no key.
template <int D, int MT, class A>
KG_DEVICE void findStats(const TensorCoreCall& call, float (&lse)[MT][2], float (&delta)[MT][2], const A& douts,
                         const bf16* outs, int tileRow, int row, int head, int count) {
  const Backward<bf16>& p = call.p;
  rowProducts<D, MT>(delta, douts, outs, tileRow);
  KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int half = 0; half < 2; half++) {
    const int r = 16 * m + laneId() / 4 + 8 * half;
    lse[m][half] = INFINITY;
    if (r >= count) continue;
    const int64_t primal = p.rowMap(row + r, p.faults);
    lse[m][half] = primal < 0 ? NAN : p.lse[primal * p.heads.query + head] * kLog2e;
    if (laneId() % 4 == 0)
      call.stats[static_cast<int64_t>(head) * p.heads.rows + row + r] = {{lse[m][half], delta[m][half]}};
  }
}

// scores -> probabilities, 0 behind a row's last key (`ahead` as in the forward).
template <bool kMasked, int MT, int NT>
KG_DEVICE void probabilities(Accumulator<MT, NT>& s, const float (&lse)[MT][2], float c, int ahead) {
  const int g = laneId() / 4, t = laneId() % 4;
  KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int n = 0; n < NT; n++) KG_UNROLL for (int i = 0; i < 4; i++) {
    const float e = fastExp2(fmaf(s[m][n][i], c, -lse[m][i / 2]));
    s[m][n][i] = kMasked && 8 * n + 2 * t + i % 2 > ahead + 16 * m + g + 8 * (i / 2) ? 0 : e;
  }
}

template <int D, int MT>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kTileThreads) queriesKernel(TensorCoreCall call) {
  using Shared = QueriesShared<D, MT>;
  constexpr int kKeys = 32;  // scores in registers at a time
  Shared& shared = *reinterpret_cast<Shared*>(dynamicShared());
  const Backward<bf16>& p = call.p;
  const int head = static_cast<int>(blockIdx.x % p.heads.query), keyHead = head / p.heads.group;
  const uint32_t slot = blockIdx.x / p.heads.query;
  Chunk chunk;
  const Found found = findChunk(p.segments, slot, Shared::kRows, Deal::LastFirst, p.faults, chunk);
  if (found == Found::BadTable) return fillNaN(p.dq, head, D, slot, Shared::kRows, p.heads.rows);
  if (found == Found::Nothing) return;
  const KeyRows keyOf = keyRows(p.segments, p.segments[chunk.segment]);
  const int firstRow = keyOf.ownStart + chunk.row;
  const int keys = keyOf.parentLength + chunk.row + chunk.rows;
  const auto queryRow = [&](int r) { return p.rowMap(firstRow + r, p.faults); };
  const auto loadKeys = [&](int tile) {
    const int first = tile * kKeyTile;
    auto& stage = shared.stages[tile % 2];
    loadTiles<D, kKeyTile>(stage.keys, p.k, keyHead, stage.values, p.v, keyHead, keys - first,
                           [&](int r) { return p.rowMap(keyOf(first + r), p.faults); });
    copyAsyncCommit();
  };
  loadTiles<D, Shared::kRows>(shared.queries, p.q, head, shared.outs(), p.out, head, chunk.rows, queryRow);
  loadTile<D, Shared::kRows>(shared.douts, p.dout, head, chunk.rows, [&](int r) { return firstRow + r; });
  copyAsyncCommit();
  loadKeys(0);
  copyAsyncWait<1>();
  syncThreads();

  const int warpRow = warpId() * 16 * MT, firstKey = keyOf.parentLength + chunk.row + warpRow;
  const bool idle = warpRow >= chunk.rows;
  const float c = static_cast<float>(p.scale) * kLog2e;
  SharedRows<D, MT> queries, douts;
  queries.load(shared.queries, warpRow);
  douts.load(shared.douts, warpRow);
  float lse[MT][2], delta[MT][2];
  findStats<D, MT>(call, lse, delta, douts, shared.outs(), warpRow, firstRow + warpRow, head, chunk.rows - warpRow);
  Accumulator<MT, D / 8> dq;
  clear<MT, D / 8>(dq);
  const int tiles = (keys + kKeyTile - 1) / kKeyTile;
  for (int tile = 0; tile < tiles; tile++) {
    copyAsyncWait<0>();
    syncThreads();  // the tile is there, and no warp reads the other one any more
    if (tile + 1 < tiles) loadKeys(tile + 1);
    if (idle) continue;
    const auto& stage = shared.stages[tile % 2];
    for (int first = 0; first < kKeyTile; first += kKeys) {
      const int ahead = firstKey - tile * kKeyTile - first;
      if (ahead + 16 * MT - 1 < 0) break;
      Accumulator<MT, kKeys / 8> s, ds;
      productWithRows<D, MT, kKeys / 8>(s, queries, stage.keys, first);
      ahead < kKeys - 1 ? probabilities<true, MT, kKeys / 8>(s, lse, c, ahead)
                        : probabilities<false, MT, kKeys / 8>(s, lse, c, ahead);
      productWithRows<D, MT, kKeys / 8>(ds, douts, stage.values, first);
      KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int n = 0; n < kKeys / 8; n++)
          KG_UNROLL for (int i = 0; i < 4; i++) ds[m][n][i] = s[m][n][i] * (ds[m][n][i] - delta[m][i / 2]);
      accumulateRows<D, MT, kKeys / 8>(dq, ds, stage.keys, first);
    }
  }
  if (idle) return;
  float factor[MT][2];
  KG_UNROLL for (int m = 0; m < MT; m++) factor[m][0] = factor[m][1] = static_cast<float>(p.scale);
  storeRows<D, MT>(dq, factor, shared.queries, warpRow, p.dq, firstRow + warpRow, head, chunk.rows - warpRow);
}

// ---- dk, dv -------------------------------------------------------------------------------------------------------

template <int D, int MT>
struct KeysShared {
  static constexpr int kRows = 16 * MT * kTileThreads / kWarp;
  bf16 keys[kRows * D], values[kRows * D];
  struct Stage {
    bf16 queries[kQueryTile * D], douts[kQueryTile * D];
    RowStats stats[kQueryTile];
  } stages[2];
};

// A tile of query rows that see a block's keys.
struct QueryTile {
  int head, segment, row;  // row: of the segment's own
};

// The tiles of a block's key head, in order: heads; its own segment, then its children; rows.
struct QueryTiles {
  const SegmentTable* table;
  int segment, keyRow, heads, stride;  // heads: end of the query heads; stride: from one to the next
  QueryTile at;
  KG_DEVICE bool done() const { return at.head >= heads; }
  KG_DEVICE int length() const { return (*table)[at.segment].length; }
  KG_DEVICE bool own() const { return at.segment == segment; }
  KG_DEVICE void advance() {
    at.row += kQueryTile;
    if (at.row < length()) return;
    const bool parent = (*table)[segment].parent < 0;
    at.segment = parent ? nextChild(*table, segment, at.segment) : table->count;
    at.row = 0;
    if (at.segment < table->count) return;
    at.segment = segment;
    at.row = keyRow;
    at.head += stride;
  }
};

// Transposed: rows are keys, columns queries. scores -> probabilities in place, with the stats of the columns; 0 where
// a key lies behind the query (`behind`: first key minus first query).
template <bool kMasked, int MT, int NT>
KG_DEVICE void columnProbabilities(Accumulator<MT, NT>& s, const RowStats* stats, float c, int behind) {
  const int g = laneId() / 4, t = laneId() % 4;
  KG_UNROLL for (int n = 0; n < NT; n++) {
    const Pack<float, 4> pair = loadPack<float, 4>(reinterpret_cast<const float*>(stats + 8 * n + 2 * t));
    KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int i = 0; i < 4; i++) {
      const float e = fastExp2(fmaf(s[m][n][i], c, -pair.v[2 * (i % 2)]));
      s[m][n][i] = kMasked && behind + 16 * m + g + 8 * (i / 2) > 8 * n + 2 * t + i % 2 ? 0 : e;
    }
  }
}

// dp -> p * (dp - delta), in place.
template <int MT, int NT>
KG_DEVICE void columnScores(Accumulator<MT, NT>& dp, const Accumulator<MT, NT>& p, const RowStats* stats) {
  KG_UNROLL for (int n = 0; n < NT; n++) {
    const Pack<float, 4> pair = loadPack<float, 4>(reinterpret_cast<const float*>(stats + 8 * n + 2 * (laneId() % 4)));
    KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int i = 0; i < 4; i++) dp[m][n][i] =
        p[m][n][i] * (dp[m][n][i] - pair.v[2 * (i % 2) + 1]);
  }
}

// The warp's rows of a float32 sum, to[row][D] with `stride` between rows.
template <int D, int MT>
KG_DEVICE void storePartial(const Accumulator<MT, D / 8>& x, float* to, int64_t stride, int count) {
  const int g = laneId() / 4, t = laneId() % 4;
  KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int half = 0; half < 2; half++) {
    const int r = 16 * m + g + 8 * half;
    if (r >= count) continue;
    KG_UNROLL for (int n = 0; n < D / 8; n++)
        storePack<float, 2>(to + r * stride + 8 * n + 2 * t, {{x[m][n][2 * half], x[m][n][2 * half + 1]}});
  }
}

// `partial` of a split as a tensor of heads: dk at 2 keyHead, dv at 2 keyHead + 1.
template <int D>
KG_DEVICE HeadRows<float> partialOf(const TensorCoreCall& call, int split) {
  const int64_t rowStride = static_cast<int64_t>(call.p.heads.key) * 2 * D;
  return {call.partial + split * rowStride * call.p.heads.rows, rowStride, D};
}

template <int D, int MT, int NQ>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kTileThreads) keysKernel(TensorCoreCall call) {
  using Shared = KeysShared<D, MT>;
  Shared& shared = *reinterpret_cast<Shared*>(dynamicShared());
  const Backward<bf16>& p = call.p;
  const int blocks = p.heads.key * p.heads.splits, block = static_cast<int>(blockIdx.x % blocks);
  const int keyHead = block % p.heads.key, split = block / p.heads.key;
  const uint32_t slot = blockIdx.x / blocks;
  Chunk chunk;
  const Found found = findChunk(p.segments, slot, Shared::kRows, Deal::FirstFirst, p.faults, chunk);
  if (found == Found::BadTable) {
    if (p.heads.splits > 1)
      return fillNaN(partialOf<D>(call, split), 2 * keyHead, 2 * D, slot, Shared::kRows, p.heads.rows);
    fillNaN(p.dk, keyHead, D, slot, Shared::kRows, p.heads.rows);
    return fillNaN(p.dv, keyHead, D, slot, Shared::kRows, p.heads.rows);
  }
  if (found == Found::Nothing) return;
  const int firstRow = p.segments[chunk.segment].start + chunk.row;
  loadTiles<D, Shared::kRows>(shared.keys, p.k, keyHead, shared.values, p.v, keyHead, chunk.rows,
                              [&](int r) { return p.rowMap(firstRow + r, p.faults); });

  const int firstHead = keyHead * p.heads.group;
  QueryTiles next{&p.segments,    chunk.segment,
                  chunk.row,      firstHead + p.heads.group,
                  p.heads.splits, {firstHead + split, chunk.segment, chunk.row}};
  const int thread = static_cast<int>(threadIdx.x);
  RowStats stats{};
  // Starts the copies of `next`; its stats wait in registers until its stage is free for them.
  const auto load = [&](int stage) {
    const QueryTile tile = next.at;
    const int first = p.segments[tile.segment].start + tile.row, valid = next.length() - tile.row;
    bf16 *const queries = shared.stages[stage].queries, *const douts = shared.stages[stage].douts;
    loadTile<D, kQueryTile>(queries, p.q, tile.head, valid, [&](int r) { return p.rowMap(first + r, p.faults); });
    loadTile<D, kQueryTile>(douts, p.dout, tile.head, valid, [&](int r) { return first + r; });
    copyAsyncCommit();
    if (thread >= kQueryTile) return;
    stats = {{INFINITY, 0}};
    if (thread < valid) stats = call.stats[static_cast<int64_t>(tile.head) * p.heads.rows + first + thread];
  };
  load(0);
  if (thread < kQueryTile) shared.stages[0].stats[thread] = stats;

  const int warpRow = warpId() * 16 * MT;
  const bool idle = warpRow >= chunk.rows;
  const float c = static_cast<float>(p.scale) * kLog2e;
  SharedRows<D, MT> keys, values;
  keys.load(shared.keys, warpRow);
  values.load(shared.values, warpRow);
  Accumulator<MT, D / 8> dk, dv;
  clear<MT, D / 8>(dk);
  clear<MT, D / 8>(dv);
  for (int stage = 0; !next.done(); stage ^= 1) {
    // How far the warp's first key lies behind the tile's first query; children see all keys.
    const int behind = next.own() ? chunk.row + warpRow - next.at.row : -kQueryTile;
    copyAsyncWait<0>();
    syncThreads();  // the tile is there, and no warp reads the other one any more
    next.advance();
    if (!next.done()) load(stage ^ 1);
    const auto& tile = shared.stages[stage];
    for (int first = 0; first < kQueryTile && !idle; first += NQ) {
      if (behind >= first + NQ) continue;
      Accumulator<MT, NQ / 8> s, ds;
      productWithRows<D, MT, NQ / 8>(s, keys, tile.queries, first);
      behind + 16 * MT - 1 > first ? columnProbabilities<true, MT, NQ / 8>(s, tile.stats + first, c, behind - first)
                                   : columnProbabilities<false, MT, NQ / 8>(s, tile.stats + first, c, 0);
      accumulateRows<D, MT, NQ / 8>(dv, s, tile.douts, first);
      productWithRows<D, MT, NQ / 8>(ds, values, tile.douts, first);
      columnScores<MT, NQ / 8>(ds, s, tile.stats + first);
      accumulateRows<D, MT, NQ / 8>(dk, ds, tile.queries, first);
    }
    if (!next.done() && thread < kQueryTile) shared.stages[stage ^ 1].stats[thread] = stats;
  }
  if (idle) return;
  const int row = firstRow + warpRow, count = chunk.rows - warpRow;
  if (p.heads.splits > 1) {
    const HeadRows<float> partial = partialOf<D>(call, split);
    storePartial<D, MT>(dk, partial.at(row, 2 * keyHead), partial.rowStride, count);
    storePartial<D, MT>(dv, partial.at(row, 2 * keyHead + 1), partial.rowStride, count);
    return;
  }
  float factor[MT][2];
  KG_UNROLL for (int m = 0; m < MT; m++) factor[m][0] = factor[m][1] = static_cast<float>(p.scale);
  storeRows<D, MT>(dk, factor, shared.keys, warpRow, p.dk, row, keyHead, count);
  KG_UNROLL for (int m = 0; m < MT; m++) factor[m][0] = factor[m][1] = 1;
  storeRows<D, MT>(dv, factor, shared.values, warpRow, p.dv, row, keyHead, count);
}

// dk and dv of one row and key head a warp: the splits in order, rounded once.
constexpr int kSumThreads = 256;
template <int D>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kSumThreads) sumKernel(TensorCoreCall call) {
  const Backward<bf16>& p = call.p;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kSumThreads / kWarp) + warpId();
  if (index >= static_cast<int64_t>(p.heads.rows) * p.heads.key) return;
  const int64_t row = index / p.heads.key;
  const int keyHead = static_cast<int>(index % p.heads.key);
  const int64_t splitStride = static_cast<int64_t>(p.heads.rows) * p.heads.key * 2 * D;
  KG_UNROLL for (int at = 4 * laneId(); at < 2 * D; at += 4 * kWarp) {  // dk, then dv
    Pack<float, 4> sum{};
    const float* from = partialOf<D>(call, 0).at(row, 2 * keyHead) + at;
    for (int split = 0; split < p.heads.splits; split++) {
      const Pack<float, 4> x = loadPack<float, 4>(from + split * splitStride);
      KG_UNROLL for (int i = 0; i < 4; i++) sum.v[i] += x.v[i];
    }
    const float f = at < D ? static_cast<float>(p.scale) : 1.0f;
    bf16* to = at < D ? p.dk.at(row, keyHead) + at : p.dv.at(row, keyHead) + (at - D);
    storePack<uint32_t, 2>(reinterpret_cast<uint32_t*>(to),
                           {{packBf16(sum.v[0] * f, sum.v[1] * f), packBf16(sum.v[2] * f, sum.v[3] * f)}});
  }
}

// ---- host half ----------------------------------------------------------------------------------------------------

// Blocks that share a key head: about 16 a chunk of keys in all.
int splitsOf(const Heads& heads) {
  const int wanted = (16 + heads.key - 1) / heads.key;
  return wanted < heads.group ? wanted : heads.group;
}

template <int D, int QueryMT, int KeyMT, int NQ>
void enqueue(const Call& call, TensorCoreCall on) {
  using Queries = QueriesShared<D, QueryMT>;
  using Keys = KeysShared<D, KeyMT>;
  Heads& heads = on.p.heads;
  heads.splits = splitsOf(heads);
  const int64_t rows = heads.rows, keyBlocks = static_cast<int64_t>(heads.key) * heads.splits;
  const int64_t statsBytes = roundUp(rows * heads.query * sizeof(RowStats), 64);
  const int64_t partialBytes = heads.splits > 1 ? rows * keyBlocks * 2 * D * sizeof(float) : 0;
  char* memory = static_cast<char*>(scratch(call, statsBytes + partialBytes));
  on.stats = reinterpret_cast<RowStats*>(memory);
  on.partial = reinterpret_cast<float*>(memory + statsBytes);
  const int64_t querySlots = slotsFor(on.p.segments, Queries::kRows), keySlots = slotsFor(on.p.segments, Keys::kRows);
  launch(call, {gridOf(querySlots * heads.query), kTileThreads, sizeof(Queries)}, queriesKernel<D, QueryMT>, on);
  launch(call, {gridOf(keySlots * keyBlocks), kTileThreads, sizeof(Keys)}, keysKernel<D, KeyMT, NQ>, on);
  if (heads.splits > 1)
    launch(call, {gridOf(ceilDiv(rows * heads.key, kSumThreads / kWarp)), kSumThreads}, sumKernel<D>, on);
}

template <class T>
void backward(const Call& call) {
  Backward<T> p{};
  readSide("attentionBackward", call, {0, 3, 4, 9}, p);
  p.dout = HeadRows<const T>::of(call[3]);
  p.q = HeadRows<const T>::of(call[4]);
  p.k = HeadRows<const T>::of(call[5]);
  p.v = HeadRows<const T>::of(call[6]);
  p.out = HeadRows<const T>::of(call[7]);
  p.lse = call[8].ptr<const compute_t<T>>();
  if (p.heads.rows == 0 || p.heads.query == 0) return;
  if constexpr (sizeof(T) == sizeof(bf16)) {
    bool aligned = p.heads.D == 64 || p.heads.D == 128;
    for (int i = 0; i < 8; i++) aligned = aligned && alignedRows(call[i]);
    const TensorCoreCall on{p, nullptr, nullptr};
    if (aligned) return p.heads.D == 64 ? enqueue<64, 2, 2, 32>(call, on) : enqueue<128, 1, 1, 64>(call, on);
  }
  backwardGeneral(call, p);
}

}  // namespace
}  // namespace attention

void kernel_attentionBackward(const Call& call) {
  switch (call[4].dtype) {
    case DType::F32:
      return attention::backward<float>(call);
    case DType::F64:
      return attention::backward<double>(call);
    case DType::BF16:
      return attention::backward<bf16>(call);
    default:
      fail("[attentionBackward] expected q float32, float64 or bfloat16, found %s; cast it first",
           dtypeName(call[4].dtype));
  }
}

}  // namespace kg::cuda
