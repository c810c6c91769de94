// Causal grouped-query attention over packed segments, forward: tiled online softmax in O(T) memory.
// A row's value depends on its own logical key sequence alone: never on its chunk, its block or the number of threads.
#include "cpu/attention.h"

#include "runtime/threads.h"

namespace kg::cpu::KG_ISA {
namespace attention {
namespace {

template <class T>
struct Forward {
  using C = compute_t<T>;
  Heads heads;
  int64_t Dp;
  C scale;
  HeadRows<const T> q, k, v;
  HeadRows<T> out;
  C* lse;
  SegmentTable segments;
};

// One worker's tiles. The accumulators hold one chunk: [block][Dp][lane] and [block][lane].
template <class C>
struct ForwardTiles {
  C *keys, *values, *scores, *rows, *queries, *sums, *limit, *maximum, *total, *factor;
  ForwardTiles(Arena& arena, int64_t blocks, int64_t Dp) {
    constexpr int W = kLanes<C>;
    keys = arena.take<C>(kKeyTile * Dp);
    values = arena.take<C>(kKeyTile * Dp);
    scores = arena.take<C>(kKeyTile * W);
    rows = arena.take<C>(W * Dp);
    queries = arena.take<C>(blocks * W * Dp);
    sums = arena.take<C>(blocks * W * Dp);
    limit = arena.take<C>(blocks * W);
    maximum = arena.take<C>(blocks * W);
    total = arena.take<C>(blocks * W);
    factor = arena.take<C>(W);
  }
};

// Queries are scaled once, here. A lane without a row asks with zeros and is never stored.
template <class T, class C>
void packQueries(const Forward<T>& p, const Lanes& lanes, ForwardTiles<C>& t) {
  constexpr int W = kLanes<C>;
  for (int64_t first = 0; first < lanes.count; first += W) {
    for (int64_t i = 0; i < W; i++) {
      const int64_t lane = first + i;
      const bool real = lane < lanes.count;
      if (real)
        packRow(p.q.at(lanes.row(lane), lanes.head(lane)), p.heads.D, p.scale, t.rows + i * p.Dp, p.Dp);
      else
        memset(static_cast<void*>(t.rows + i * p.Dp), 0, p.Dp * sizeof(C));
      t.limit[lane] = static_cast<C>(lanes.lastKey(real ? lane : lanes.count - 1));
      t.maximum[lane] = -static_cast<C>(__builtin_inf());
      t.total[lane] = 0;
    }
    transpose(t.rows, W, p.Dp, t.queries + first * p.Dp);
  }
}

// scores[j][lane] -> exp(score - new maximum), 0 where masked; updates maximum and total; factor = exp(old - new).
template <bool Masked, class C>
void softmaxTile(int64_t keys, int64_t tileStart, C* scores, const C* limit, C* maximum, C* total, C* factor) {
  using V = Vec<C>;
  constexpr int W = kLanes<C>;
  const V none(-static_cast<C>(__builtin_inf()));
  for (int x = 0; x < W; x += V::N) {
    const V last = V::load(limit + x), before = V::load(maximum + x);
    V top = before;
    for (int64_t j = 0; j < keys; j++) {
      V s = V::load(scores + j * W + x);
      if (Masked) s = select(last >= V(static_cast<C>(tileStart + j)), s, none);
      top = max(top, s);
    }
    V sum(C(0));
    for (int64_t j = 0; j < keys; j++) {
      V e = expOfDifference(V::load(scores + j * W + x) - top);
      if (Masked) e = select(last >= V(static_cast<C>(tileStart + j)), e, V(C(0)));
      e.store(scores + j * W + x);
      sum = sum + e;
    }
    const V rescale = expOfDifference(before - top);
    rescale.store(factor + x);
    top.store(maximum + x);
    fma(V::load(total + x), rescale, sum).store(total + x);
  }
}

template <class C>
void visitTile(const Lanes& lanes, int64_t block, int64_t tileStart, int64_t Dp, ForwardTiles<C>& t) {
  constexpr int W = kLanes<C>;
  const BlockTile seen = blockTile<C>(lanes, block, tileStart);
  if (seen.keys == 0) return;
  const int64_t at = block * W;
  laneProduct<Order::RowMajor, Start::Zero>(roundUp(seen.keys, kTileRows), Dp, t.keys, Dp, t.queries + at * Dp,
                                            t.scores);
  auto softmax = seen.masked ? softmaxTile<true, C> : softmaxTile<false, C>;
  softmax(seen.keys, tileStart, t.scores, t.limit + at, t.maximum + at, t.total + at, t.factor);
  if (tileStart == 0)
    laneProduct<Order::ColumnMajor, Start::Zero>(Dp, seen.keys, t.values, Dp, t.scores, t.sums + at * Dp);
  else
    laneProduct<Order::ColumnMajor, Start::Scale>(Dp, seen.keys, t.values, Dp, t.scores, t.sums + at * Dp, t.factor);
}

// Adding 0 makes -0 a +0: whether a masked key added its 0 to an accumulator then never shows.
template <class T, class C>
void storeChunk(const Forward<T>& p, const Lanes& lanes, ForwardTiles<C>& t) {
  using V = Vec<C>;
  constexpr int W = kLanes<C>;
  for (int64_t first = 0; first < lanes.count; first += W) {
    C* sums = t.sums + first * p.Dp;
    for (int x = 0; x < W; x += V::N) {
      const V total = V::load(t.total + first + x);
      for (int64_t d = 0; d < p.Dp; d++) (V::load(sums + d * W + x) / total + V(C(0))).store(sums + d * W + x);
      (V::load(t.maximum + first + x) + vlog(total)).store(t.maximum + first + x);
    }
    transpose(sums, p.Dp, W, t.rows);
    for (int64_t i = 0; i < W && first + i < lanes.count; i++) {
      const int64_t row = lanes.row(first + i), head = lanes.head(first + i);
      storeRow(t.rows + i * p.Dp, C(1), p.out.at(row, head), p.heads.D);
      p.lse[row * p.heads.query + head] = t.maximum[first + i];
    }
  }
}

template <class T, class C>
void runChunk(const Forward<T>& p, const Chunk& chunk, int64_t keyHead, ForwardTiles<C>& t) {
  constexpr int W = kLanes<C>;
  const KeyRows rows = keyRows(p.segments, chunk.segment);
  const Lanes lanes = lanesOf(chunk, rows, p.heads.group, keyHead);
  packQueries(p, lanes, t);
  const int64_t end = lanes.lastKey(lanes.count - 1) + 1;
  for (int64_t start = 0; start < end; start += kKeyTile) {
    const int64_t keys = end - start < kKeyTile ? end - start : kKeyTile;
    packKeys(p.k, keyHead, rows, nullptr, start, keys, p.heads.D, t.keys, p.Dp);
    packKeys(p.v, keyHead, rows, nullptr, start, keys, p.heads.D, t.values, p.Dp);
    for (int64_t block = 0; block * W < lanes.count; block++) visitTile(lanes, block, start, p.Dp, t);
  }
  storeChunk(p, lanes, t);
}

template <class T>
void forward(const Call& call) {
  using C = compute_t<T>;
  const Heads heads = checkedHeads("attention", call[2], call[3], call[4]);
  const Forward<T> p{heads,
                     paddedDim<C>(heads.D),
                     static_cast<C>(call.attr(0)),
                     HeadRows<const T>(call[2]),
                     HeadRows<const T>(call[3]),
                     HeadRows<const T>(call[4]),
                     HeadRows<T>(call[0]),
                     call[1].ptr<C>(),
                     checkedSegments("attention", call[5], heads.T)};
  if (heads.T == 0) return;
  const int64_t chunkRows = chunkRowsFor<C>(heads.group), blocks = chunkBlocksFor<C>(heads.group);
  Arena measure{nullptr};
  measure.take<Chunk>(maxChunks(p.segments, heads.T, chunkRows));
  const size_t tilesAt = measure.used;
  ForwardTiles<C>(measure, blocks, p.Dp);
  const size_t tileBytes = measure.used - tilesAt;
  char* memory = static_cast<char*>(scratch(call, tilesAt + tileBytes * threadCount()));
  Chunk* chunks = reinterpret_cast<Chunk*>(memory);
  const int64_t count = cutAll(p.segments, chunkRows, chunks);
  parallelFor(count * heads.key, 1, [&](int64_t begin, int64_t end, int worker) {
    Arena arena{memory + tilesAt + tileBytes * worker};
    ForwardTiles<C> tiles(arena, blocks, p.Dp);
    for (int64_t i = begin; i < end; i++) runChunk(p, chunks[i / heads.key], i % heads.key, tiles);
  });
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

}  // namespace kg::cpu::KG_ISA
