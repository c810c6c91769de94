// The tangent of attention's backward: what phi = <qDot, dq> + <kDot, dk> + <vDot, dv> sends to dout, q, k and v. With
// c the scale, s = c q.k, p = softmax(s), dp = dout.v, delta = sum p dp, and
//   t = c (qDot.k + q.kDot), e = dout.vDot, r = sum p t, m = sum p (dp t + e) - 2 delta r,
//   z = p (dp t - dp r - delta t + e - m), the derivative of phi for s; ds = p (dp - delta), that for t:
//   outDot = sum p (t - r) v + p vDot       dq = c sum z k + ds kDot
//   dv = sum p (t - r) dout                 dk = c sum z q + ds qDot
// Two passes over the keys of a chunk of rows: the first for r, m and outDot, the second for the rest. Memory: tiles.
#include "cpu/attention_backward.h"

namespace kg::cpu::KG_ISA {
namespace attention {
namespace {

template <class T>
struct Tangent : CotangentSide<T> {
  using C = compute_t<T>;
  HeadRows<T> outDot;
  HeadRows<const T> qDot, kDot, vDot, dout, q, k, v, out;
  const C* lse;
};

// One worker's tiles. Query-side tiles hold one chunk: rows [lane][Dp], transposed [Dp][lane], [lane].
template <class C>
struct TangentTiles {
  C *keys, *values, *keyDots, *valueDots, *dKeys, *dValues;  // [kKeyTile][Dp]
  C *p, *t, *dp, *e;                                         // [kKeyTile][lane]
  C *queryRows, *queries, *queryDotRows, *queryDots, *doutRows, *douts, *sums;
  C *scratchRows, *scratchOuts;  // of one block
  C *limit, *lse, *delta, *r, *m;
  TangentTiles(Arena& arena, int64_t blocks, int64_t Dp) {
    constexpr int W = kLanes<C>;
    for (C** tile : {&keys, &values, &keyDots, &valueDots, &dKeys, &dValues}) *tile = arena.take<C>(kKeyTile * Dp);
    for (C** tile : {&p, &t, &dp, &e}) *tile = arena.take<C>(kKeyTile * W);
    for (C** tile : {&queryRows, &queries, &queryDotRows, &queryDots, &doutRows, &douts, &sums})
      *tile = arena.take<C>(blocks * W * Dp);
    for (C** tile : {&scratchRows, &scratchOuts}) *tile = arena.take<C>(W * Dp);
    for (C** tile : {&limit, &lse, &delta, &r, &m}) *tile = arena.take<C>(blocks * W);
  }
};

template <class T, class C>
void packChunk(const Tangent<T>& p, const Lanes& lanes, TangentTiles<C>& t) {
  constexpr int W = kLanes<C>;
  const int64_t D = p.heads.D, Dp = p.Dp;
  const auto primal = [&](int64_t row) { return p.primal(row); };
  const auto same = [](int64_t row) { return row; };
  for (int64_t first = 0; first < lanes.count; first += W) {
    const int64_t at = first * Dp;
    packBlock(p.dout, lanes, first, D, C(1), t.doutRows + at, Dp, same);
    transpose(t.doutRows + at, W, Dp, t.douts + at);
    packBlock(p.out, lanes, first, D, C(1), t.queryRows + at, Dp, primal);
    transpose(t.queryRows + at, W, Dp, t.queries + at);
    deltaOfBlock(t.queries + at, t.douts + at, Dp, t.delta + first);
    packBlock(p.q, lanes, first, D, p.scale, t.queryRows + at, Dp, primal);
    transpose(t.queryRows + at, W, Dp, t.queries + at);
    packBlock(p.qDot, lanes, first, D, p.scale, t.queryDotRows + at, Dp, same);
    transpose(t.queryDotRows + at, W, Dp, t.queryDots + at);
    for (int64_t lane = first; lane < first + W; lane++) {
      const bool real = lane < lanes.count;
      t.limit[lane] = real ? static_cast<C>(lanes.lastKey(lane)) : C(-1);
      t.lse[lane] = real ? p.lse[primal(lanes.row(lane)) * p.heads.query + lanes.head(lane)] : C(0);
      t.r[lane] = t.m[lane] = 0;
    }
  }
  const int64_t all = roundUp(lanes.count, W) * Dp;
  memset(static_cast<void*>(t.sums), 0, all * sizeof(C));
}

template <class T, class C>
void packTile(const Tangent<T>& p, const KeyRows& rows, int64_t keyHead, int64_t start, int64_t keys,
              TangentTiles<C>& t) {
  packKeys(p.k, keyHead, rows, p.rowMap, start, keys, p.heads.D, t.keys, p.Dp);
  packKeys(p.v, keyHead, rows, p.rowMap, start, keys, p.heads.D, t.values, p.Dp);
  packKeys(p.kDot, keyHead, rows, nullptr, start, keys, p.heads.D, t.keyDots, p.Dp);
  packKeys(p.vDot, keyHead, rows, nullptr, start, keys, p.heads.D, t.valueDots, p.Dp);
}

// p, t, dp and e of a block and a tile of keys.
template <class C>
void productTiles(const BlockTile& seen, int64_t block, int64_t tileStart, int64_t Dp, TangentTiles<C>& t) {
  const int64_t first = block * kLanes<C>, at = first * Dp, keys = roundUp(seen.keys, kTileRows);
  laneProduct<Order::RowMajor, Start::Zero>(keys, Dp, t.keys, Dp, t.queries + at, t.p);
  (seen.masked ? probabilityTile<true, C> : probabilityTile<false, C>)(keys, tileStart, t.p, t.limit + first,
                                                                       t.lse + first);
  laneProduct<Order::RowMajor, Start::Zero>(keys, Dp, t.keys, Dp, t.queryDots + at, t.t);
  laneProduct<Order::RowMajor, Start::Add>(keys, Dp, t.keyDots, Dp, t.queries + at, t.t);
  laneProduct<Order::RowMajor, Start::Zero>(keys, Dp, t.values, Dp, t.douts + at, t.dp);
  laneProduct<Order::RowMajor, Start::Zero>(keys, Dp, t.valueDots, Dp, t.douts + at, t.e);
}

// r += p t, m += p (dp t + e); t becomes p t.
template <class C>
void momentTile(int64_t keys, const TangentTiles<C>& t, C* r, C* m) {
  using V = Vec<C>;
  constexpr int W = kLanes<C>;
  for (int x = 0; x < W; x += V::N) {
    V first = V::load(r + x), second = V::load(m + x);
    for (int64_t at = x; at < keys * W; at += W) {
      const V p = V::load(t.p + at), pt = p * V::load(t.t + at);
      first = first + pt;
      second = second + fma(V::load(t.dp + at), pt, p * V::load(t.e + at));
      pt.store(t.t + at);
    }
    first.store(r + x);
    second.store(m + x);
  }
}

template <class C>
void visitForMoments(const Lanes& lanes, int64_t block, int64_t tileStart, int64_t Dp, TangentTiles<C>& t) {
  const int64_t first = block * kLanes<C>;
  const BlockTile seen = blockTile<C>(lanes, block, tileStart);
  if (seen.keys == 0) return;
  productTiles(seen, block, tileStart, Dp, t);
  momentTile(roundUp(seen.keys, kTileRows), t, t.r + first, t.m + first);
  laneProduct<Order::ColumnMajor, Start::Add>(Dp, seen.keys, t.values, Dp, t.t, t.sums + first * Dp);
  laneProduct<Order::ColumnMajor, Start::Add>(Dp, seen.keys, t.valueDots, Dp, t.p, t.sums + first * Dp);
}

// outDot = sums - r out, m -= 2 delta r; the sums are zero again.
template <class T, class C>
void finishMoments(const Tangent<T>& p, const Lanes& lanes, TangentTiles<C>& t) {
  using V = Vec<C>;
  constexpr int W = kLanes<C>;
  C *rows = t.scratchRows, *outs = t.scratchOuts;
  for (int64_t first = 0; first < lanes.count; first += W) {
    C* sums = t.sums + first * p.Dp;
    packBlock(p.out, lanes, first, p.heads.D, C(1), rows, p.Dp, [&](int64_t row) { return p.primal(row); });
    transpose(rows, W, p.Dp, outs);
    for (int x = 0; x < W; x += V::N) {
      const V r = V::load(t.r + first + x);
      (V::load(t.m + first + x) - V(C(2)) * V::load(t.delta + first + x) * r).store(t.m + first + x);
      for (int64_t at = x; at < p.Dp * W; at += W) (V::load(sums + at) - r * V::load(outs + at)).store(sums + at);
    }
    transpose(sums, p.Dp, W, rows);
    for (int64_t i = 0; i < W && first + i < lanes.count; i++)
      storeRow(rows + i * p.Dp, C(1), p.outDot.at(lanes.row(first + i), lanes.head(first + i)), p.heads.D);
    memset(static_cast<void*>(sums), 0, W * p.Dp * sizeof(C));
  }
}

// dp becomes ds, e becomes z, t becomes p (t - r).
template <class C>
void derivativeTile(int64_t keys, const TangentTiles<C>& t, int64_t first) {
  using V = Vec<C>;
  constexpr int W = kLanes<C>;
  for (int x = 0; x < W; x += V::N) {
    const V delta = V::load(t.delta + first + x), r = V::load(t.r + first + x), m = V::load(t.m + first + x);
    for (int64_t at = x; at < keys * W; at += W) {
      const V p = V::load(t.p + at), dp = V::load(t.dp + at), dot = V::load(t.t + at);
      (p * (fma(dp - delta, dot, V::load(t.e + at)) - dp * r - m)).store(t.e + at);
      (p * (dp - delta)).store(t.dp + at);
      (p * (dot - r)).store(t.t + at);
    }
  }
}

template <class C>
void visitForGradients(const Lanes& lanes, int64_t block, int64_t tileStart, int64_t Dp, TangentTiles<C>& t) {
  const int64_t first = block * kLanes<C>, at = first * Dp;
  const BlockTile seen = blockTile<C>(lanes, block, tileStart);
  if (seen.keys == 0) return;
  const int64_t keys = roundUp(seen.keys, kTileRows);
  productTiles(seen, block, tileStart, Dp, t);
  derivativeTile(keys, t, first);
  rowProduct(keys, t.t, t.doutRows + at, t.dValues, Dp);
  rowProduct(keys, t.e, t.queryRows + at, t.dKeys, Dp);
  rowProduct(keys, t.dp, t.queryDotRows + at, t.dKeys, Dp);
  laneProduct<Order::ColumnMajor, Start::Add>(Dp, seen.keys, t.keys, Dp, t.e, t.sums + at);
  laneProduct<Order::ColumnMajor, Start::Add>(Dp, seen.keys, t.keyDots, Dp, t.dp, t.sums + at);
}

template <class T, class C>
void runChunk(const Tangent<T>& p, const Chunk& chunk, int64_t split, int64_t keyHead, TangentTiles<C>& t) {
  constexpr int W = kLanes<C>;
  const KeyRows rows = keyRows(p.segments, chunk.segment);
  const Lanes lanes = lanesOf(chunk, rows, p.heads.group, keyHead);
  packChunk(p, lanes, t);
  const int64_t end = lanes.lastKey(lanes.count - 1) + 1;
  const auto tileKeys = [&](int64_t start) { return end - start < kKeyTile ? end - start : kKeyTile; };
  for (int64_t start = 0; start < end; start += kKeyTile) {
    packTile(p, rows, keyHead, start, tileKeys(start), t);
    for (int64_t block = 0; block * W < lanes.count; block++) visitForMoments(lanes, block, start, p.Dp, t);
  }
  finishMoments(p, lanes, t);
  for (int64_t start = 0; start < end; start += kKeyTile) {
    packTile(p, rows, keyHead, start, tileKeys(start), t);
    memset(static_cast<void*>(t.dKeys), 0, kKeyTile * p.Dp * sizeof(C));
    memset(static_cast<void*>(t.dValues), 0, kKeyTile * p.Dp * sizeof(C));
    for (int64_t block = 0; block * W < lanes.count; block++) visitForGradients(lanes, block, start, p.Dp, t);
    for (int64_t j = 0; j < tileKeys(start); j++) {
      C* gradients = p.keyGradients(split, keyHead, rows(start + j));
      addRow(t.dKeys + j * p.Dp, gradients, p.Dp);
      addRow(t.dValues + j * p.Dp, gradients + p.Dp, p.Dp);
    }
  }
  storeQueries(p, lanes, t.sums, t.queryRows);
}

template <class T>
void tangent(const Call& call) {
  using C = compute_t<T>;
  Tangent<T> p;
  readSide<T>("attentionTangent", call, {1, 7, 8, 13}, p);
  if (p.heads.T == 0) return;
  p.outDot = HeadRows<T>(call[0]);
  p.qDot = HeadRows<const T>(call[4]);
  p.kDot = HeadRows<const T>(call[5]);
  p.vDot = HeadRows<const T>(call[6]);
  p.dout = HeadRows<const T>(call[7]);
  p.q = HeadRows<const T>(call[8]);
  p.k = HeadRows<const T>(call[9]);
  p.v = HeadRows<const T>(call[10]);
  p.out = HeadRows<const T>(call[11]);
  p.lse = call[12].ptr<const C>();
  runFamilies<TangentTiles<C>>(call, p, [&](const Chunk& chunk, int64_t split, int64_t keyHead, TangentTiles<C>& t) {
    runChunk(p, chunk, split, keyHead, t);
  });
}

}  // namespace
}  // namespace attention

void kernel_attentionTangent(const Call& call) {
  switch (call[8].dtype) {
    case DType::F32:
      return attention::tangent<float>(call);
    case DType::F64:
      return attention::tangent<double>(call);
    case DType::BF16:
      return attention::tangent<bf16>(call);
    default:
      fail("[attentionTangent] expected q float32, float64 or bfloat16, found %s; cast it first",
           dtypeName(call[8].dtype));
  }
}

}  // namespace kg::cpu::KG_ISA
