// Causal grouped-query attention over packed segments, backward: probabilities are recomputed from lse tile by tile.
// Everything is indexed by rows of the cotangent layout; primal rows are reached through rowMap. No two jobs write the
// same memory, and every sum has an order fixed by its family's shape.
#include "cpu/attention.h"
#include "runtime/threads.h"

namespace kg::cpu::KG_ISA {
namespace attention {
namespace {

template <class T>
struct Backward {
  using C = compute_t<T>;
  Heads heads;  // heads.T: cotangent rows
  int64_t Dp;
  C scale;
  HeadRows<T> dq, dk, dv;
  HeadRows<const T> dout, q, k, v, out;
  const C* lse;
  const int32_t* rowMap;
  SegmentTable segments;  // of the cotangent layout
  C* partial;             // [split][key head][cotangent row][dk, dv][Dp]

  KG_INLINE int64_t primal(int64_t row) const { return rowMap ? rowMap[row] : row; }
  KG_INLINE C* keyGradients(int64_t split, int64_t keyHead, int64_t row) const {
    return partial + ((split * heads.key + keyHead) * heads.T + row) * 2 * Dp;
  }
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

template <class C>
KG_INLINE void addRow(const C* src, C* dst, int64_t Dp) {
  for (int64_t d = 0; d < Dp; d += Vec<C>::N) (Vec<C>::load(dst + d) + Vec<C>::load(src + d)).store(dst + d);
}

template <class T, class C>
void storeQueries(const Backward<T>& p, const Lanes& lanes, BackwardTiles<C>& t) {
  constexpr int W = kLanes<C>;
  for (int64_t first = 0; first < lanes.count; first += W) {
    transpose(t.dQueries + first * p.Dp, p.Dp, W, t.queryRows + first * p.Dp);
    for (int64_t lane = first; lane < first + W && lane < lanes.count; lane++)
      storeRow(t.queryRows + lane * p.Dp, p.scale, p.dq.at(lanes.row(lane), lanes.head(lane)), p.heads.D);
  }
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
  storeQueries(p, lanes, t);
}

template <class T>
void runJob(const Backward<T>& p, const FamilyPlan& plan, const Job& job, int64_t keyHead,
            BackwardTiles<compute_t<T>>& tiles) {
  const Family& family = plan.families[job.family];
  const Chunk* chunks = plan.chunks + family.firstChunk;
  for (int32_t i = 0; i < family.chunkCount; i++)
    memset(static_cast<void*>(p.keyGradients(job.split, keyHead, p.segments[chunks[i].segment].start + chunks[i].row)),
           0, chunks[i].rows * 2 * p.Dp * sizeof(compute_t<T>));
  for (int32_t i = job.split; i < family.chunkCount; i += family.splits)
    runChunk(p, chunks[i], job.split, keyHead, tiles);
}

// dk and dv of a chunk's rows: the sum over the family's splits, rounded once.
template <class T>
void gatherKeyGradients(const Backward<T>& p, const Chunk& chunk, int64_t keyHead) {
  using C = compute_t<T>;
  const int64_t first = p.segments[chunk.segment].start + chunk.row;
  for (int64_t row = first; row < first + chunk.rows; row++) {
    C* total = p.keyGradients(0, keyHead, row);
    for (int32_t split = 1; split < chunk.splits; split++) addRow(p.keyGradients(split, keyHead, row), total, 2 * p.Dp);
    storeRow(total, C(1), p.dk.at(row, keyHead), p.heads.D);
    storeRow(total + p.Dp, C(1), p.dv.at(row, keyHead), p.heads.D);
  }
}

void checkRowMap(const TensorView& map, int64_t rows, int64_t primalRows) {
  const int32_t* to = map.ptr<const int32_t>();
  if (map.dtype != DType::I32 || map.numel() != rows)
    fail("[attentionBackward] expected rowMap int32 [%lld], found %s with %lld entries", (long long)rows,
         dtypeName(map.dtype), (long long)map.numel());
  for (int64_t i = 0; i < rows; i++)
    if (to[i] < 0 || to[i] >= primalRows)
      fail("[attentionBackward] expected rowMap entries in [0, %lld), found %d at %lld", (long long)primalRows, to[i],
           (long long)i);
}

template <class T>
Backward<T> readCall(const Call& call) {
  using C = compute_t<T>;
  Heads heads = checkedHeads("attentionBackward", call[4], call[5], call[6]);
  const int64_t primalRows = heads.T;
  heads.T = call[3].size(0);
  const TensorView& layout = call[10].present() ? call[10] : call[9];
  if (call[11].present())
    checkRowMap(call[11], heads.T, primalRows);
  else if (heads.T != primalRows)
    fail("[attentionBackward] expected dout with %lld rows, found %lld; give a rowMap", (long long)primalRows,
         (long long)heads.T);
  return {heads,
          paddedDim<C>(heads.D),
          static_cast<C>(call.attr(0)),
          HeadRows<T>(call[0]),
          HeadRows<T>(call[1]),
          HeadRows<T>(call[2]),
          HeadRows<const T>(call[3]),
          HeadRows<const T>(call[4]),
          HeadRows<const T>(call[5]),
          HeadRows<const T>(call[6]),
          HeadRows<const T>(call[7]),
          call[8].ptr<const C>(),
          call[11].present() ? call[11].ptr<const int32_t>() : nullptr,
          checkedSegments("attentionBackward", layout, heads.T),
          nullptr};
}

template <class T>
void run(Backward<T>& p, const FamilyPlan& plan, char* tileMemory, size_t tileBytes, int64_t blocks) {
  using C = compute_t<T>;
  const int64_t heads = p.heads.key;
  parallelFor(plan.jobCount * heads, 1, [&](int64_t begin, int64_t end, int worker) {
    Arena arena{tileMemory + tileBytes * worker};
    BackwardTiles<C> tiles(arena, blocks, p.Dp);
    for (int64_t i = begin; i < end; i++) runJob(p, plan, plan.jobs[i / heads], i % heads, tiles);
  });
  parallelFor(plan.chunkCount * heads, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) gatherKeyGradients(p, plan.chunks[i / heads], i % heads);
  });
}

template <class T>
void backward(const Call& call) {
  using C = compute_t<T>;
  Backward<T> p = readCall<T>(call);
  if (p.heads.T == 0) return;
  const int64_t chunkRows = chunkRowsFor<C>(p.heads.group), blocks = chunkBlocksFor<C>(p.heads.group);
  const int64_t S = p.segments.count, chunks = maxChunks(p.segments, p.heads.T, chunkRows);
  const int64_t partials = splitsFor(p.heads.T, p.heads.key) * p.heads.key * p.heads.T * 2 * p.Dp;
  Arena measure{nullptr};
  BackwardTiles<C>(measure, blocks, p.Dp);
  const size_t tileBytes = measure.used, tilesBytes = tileBytes * threadCount();
  const size_t planBytes = chunks * sizeof(Chunk) + S * (sizeof(Family) + kMaxSplits * sizeof(Job) + 8) + 5 * 64;
  char* memory = static_cast<char*>(scratch(call, tilesBytes + partials * sizeof(C) + planBytes));
  Arena rest{memory + tilesBytes};
  p.partial = rest.take<C>(partials);
  FamilyPlan plan{
      rest.take<Chunk>(chunks), rest.take<Family>(S), rest.take<Job>(S * kMaxSplits), rest.take<int32_t>(2 * S), 0, 0};
  planFamilies(p.segments, chunkRows, p.heads.key, plan);
  run(p, plan, memory, tileBytes, blocks);
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
