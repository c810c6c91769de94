// Causal grouped-query attention over packed segments, backward: probabilities are recomputed from lse tile by tile.
#include "cpu/attention_backward.h"

namespace kg::cpu::KG_ISA {
namespace attention {
namespace {

template <class T>
struct Backward : CotangentSide<T> {
  using C = compute_t<T>;
  HeadRows<const T> dout, q, k, v, out;
  const C* lse;
};

// One worker's tiles. Query-side tiles hold one chunk: [block][lane][Dp], transposed [block][Dp][lane], [block][lane].
template <class C>
struct BackwardTiles {
  C *keys, *values, *dKeys, *dValues, *probabilities, *dScores;
  C *queryRows, *queries, *doutRows, *douts, *dQueries, *limit, *lse, *delta;
  BackwardTiles(Arena& arena, int64_t blocks, int64_t Dp) {
    constexpr int W = kLanes<C>;
    for (C** tile : {&keys, &values, &dKeys, &dValues}) *tile = arena.take<C>(kKeyTile * Dp);
    for (C** tile : {&probabilities, &dScores}) *tile = arena.take<C>(kKeyTile * W);
    for (C** tile : {&queryRows, &queries, &doutRows, &douts, &dQueries}) *tile = arena.take<C>(blocks * W * Dp);
    for (C** tile : {&limit, &lse, &delta}) *tile = arena.take<C>(blocks * W);
  }
};

// A lane without a row sees no key (limit -1).
template <class T, class C>
void packChunk(const Backward<T>& p, const Lanes& lanes, BackwardTiles<C>& t) {
  constexpr int W = kLanes<C>;
  const int64_t D = p.heads.D, Dp = p.Dp;
  const auto primal = [&](int64_t row) { return p.primal(row); };
  for (int64_t first = 0; first < lanes.count; first += W) {
    const int64_t at = first * Dp;
    packBlock(p.dout, lanes, first, D, C(1), t.doutRows + at, Dp, [](int64_t row) { return row; });
    transpose(t.doutRows + at, W, Dp, t.douts + at);
    packBlock(p.out, lanes, first, D, C(1), t.queryRows + at, Dp, primal);
    transpose(t.queryRows + at, W, Dp, t.queries + at);
    deltaOfBlock(t.queries + at, t.douts + at, Dp, t.delta + first);
    packBlock(p.q, lanes, first, D, p.scale, t.queryRows + at, Dp, primal);
    transpose(t.queryRows + at, W, Dp, t.queries + at);
    memset(static_cast<void*>(t.dQueries + at), 0, W * Dp * sizeof(C));
    for (int64_t lane = first; lane < first + W; lane++) {
      const bool real = lane < lanes.count;
      t.limit[lane] = real ? static_cast<C>(lanes.lastKey(lane)) : C(-1);
      t.lse[lane] = real ? p.lse[primal(lanes.row(lane)) * p.heads.query + lanes.head(lane)] : C(0);
    }
  }
}

// d probabilities -> d scores, in place: p * (dp - delta).
template <class C>
void dScoreTile(int64_t keys, const C* probabilities, C* dScores, const C* delta) {
  using V = Vec<C>;
  constexpr int W = kLanes<C>;
  for (int x = 0; x < W; x += V::N) {
    const V shift = V::load(delta + x);
    for (int64_t at = x; at < keys * W; at += W)
      (V::load(probabilities + at) * (V::load(dScores + at) - shift)).store(dScores + at);
  }
}

template <class C>
void visitTile(const Lanes& lanes, int64_t block, int64_t tileStart, int64_t Dp, BackwardTiles<C>& t) {
  constexpr int W = kLanes<C>;
  const BlockTile seen = blockTile<C>(lanes, block, tileStart);
  if (seen.keys == 0) return;
  const int64_t at = block * W, keys = roundUp(seen.keys, kTileRows);
  laneProduct<Order::RowMajor, Start::Zero>(keys, Dp, t.keys, Dp, t.queries + at * Dp, t.probabilities);
  auto probability = seen.masked ? probabilityTile<true, C> : probabilityTile<false, C>;
  probability(keys, tileStart, t.probabilities, t.limit + at, t.lse + at);
  rowProduct(keys, t.probabilities, t.doutRows + at * Dp, t.dValues, Dp);
  laneProduct<Order::RowMajor, Start::Zero>(keys, Dp, t.values, Dp, t.douts + at * Dp, t.dScores);
  dScoreTile(keys, t.probabilities, t.dScores, t.delta + at);
  rowProduct(keys, t.dScores, t.queryRows + at * Dp, t.dKeys, Dp);
  laneProduct<Order::ColumnMajor, Start::Add>(Dp, seen.keys, t.keys, Dp, t.dScores, t.dQueries + at * Dp);
}

template <class T, class C>
void runChunk(const Backward<T>& p, const Chunk& chunk, int64_t split, int64_t keyHead, BackwardTiles<C>& t) {
  constexpr int W = kLanes<C>;
  const KeyRows rows = keyRows(p.segments, chunk.segment);
  const Lanes lanes = lanesOf(chunk, rows, p.heads.group, keyHead);
  packChunk(p, lanes, t);
  const int64_t end = lanes.lastKey(lanes.count - 1) + 1;
  for (int64_t start = 0; start < end; start += kKeyTile) {
    const int64_t keys = end - start < kKeyTile ? end - start : kKeyTile;
    packKeys(p.k, keyHead, rows, p.rowMap, start, keys, p.heads.D, t.keys, p.Dp);
    packKeys(p.v, keyHead, rows, p.rowMap, start, keys, p.heads.D, t.values, p.Dp);
    memset(static_cast<void*>(t.dKeys), 0, kKeyTile * p.Dp * sizeof(C));
    memset(static_cast<void*>(t.dValues), 0, kKeyTile * p.Dp * sizeof(C));
    for (int64_t block = 0; block * W < lanes.count; block++) visitTile(lanes, block, start, p.Dp, t);
    for (int64_t j = 0; j < keys; j++) {
      C* gradients = p.keyGradients(split, keyHead, rows(start + j));
      addRow(t.dKeys + j * p.Dp, gradients, p.Dp);
      addRow(t.dValues + j * p.Dp, gradients + p.Dp, p.Dp);
    }
  }
  storeQueries(p, lanes, t.dQueries, t.queryRows);
}

template <class T>
void backward(const Call& call) {
  using C = compute_t<T>;
  Backward<T> p;
  readSide<T>("attentionBackward", call, {0, 3, 4, 9}, p);
  if (p.heads.T == 0) return;
  p.dout = HeadRows<const T>(call[3]);
  p.q = HeadRows<const T>(call[4]);
  p.k = HeadRows<const T>(call[5]);
  p.v = HeadRows<const T>(call[6]);
  p.out = HeadRows<const T>(call[7]);
  p.lse = call[8].ptr<const C>();
  runFamilies<BackwardTiles<C>>(call, p, [&](const Chunk& chunk, int64_t split, int64_t keyHead, BackwardTiles<C>& t) {
    runChunk(p, chunk, split, keyHead, t);
  });
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

}  // namespace kg::cpu::KG_ISA
