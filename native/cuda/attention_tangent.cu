// The tangent of attention's backward: what phi = <qDot, dq> + <kDot, dk> + <vDot, dv> sends to dout, q, k and v.
//
// Contract: kernels.def, attentionTangent; any dtype, head dimensions up to 256. With c the scale, s = c q.k,
// p = exp(s - lse), dp = dout.v, delta = out.dout, and
//   t = c (qDot.k + q.kDot), e = dout.vDot, r = sum p t, m = sum p (dp t + e) - 2 delta r,
//   z = p (dp t - dp r - delta t + e - m), the derivative of phi for s; ds = p (dp - delta), that for t:
//   outDot = sum p (t - r) v + p vDot       dq = c sum z k + ds kDot
//   dv = sum p (t - r) dout                 dk = c sum z q + ds qDot
// Two kernels, as the general backward and with its tiles, so that nothing is added by atomics and every sum has one
// order: blocks that hold query rows walk over their keys twice (delta, r, m and outDot, then dq) and leave delta, r
// and m; blocks that hold keys walk over the query heads of their key head, in them over their own segment and then its
// children, in them over query tiles (dk, dv). Nothing of T x T exists.
//
// H100, 8 segments of 1024, 14 heads, D 64, float32, pairs = 4.2 M: 7 products for outDot, 7 for dq, 9 for dk and dv,
// of 2 * 64 * 14 * pairs each, 173 GFLOP; a multiply-add takes half a shared memory read (4 x 4 a thread), half of 67
// TFLOP/s: 5.2 ms at best, 7 to 12 ms expected. Bytes: 12 tensors, 0.25 GB read or written once, 0.1 ms.
// bfloat16 runs here too, widened to float32 on CUDA cores: half the bytes, the same time. Tensor cores at the 60 % of
// 989 TFLOP/s that mma.sync reaches would take 0.3 ms of products: bfloat16 pays 18 to 40 times that, in second
// derivatives alone; first-order training never comes here.
#include "cuda/attention_backward.h"
#include "cuda/attention_general.h"

namespace kg::cuda {
namespace attention {

namespace {

template <class T>
struct Tangent {
  Backward<T> b;
  HeadRows<T> outDot;
  HeadRows<const T> qDot, kDot, vDot;  // cotangent rows
  compute_t<T>* stats;                 // delta, r, m: each [Hq][cotangent rows]

  KG_DEVICE compute_t<T>* statsOf(int head, int64_t row) const {
    return stats + static_cast<int64_t>(head) * b.heads.rows + row;
  }
  KG_DEVICE int64_t statStride() const { return static_cast<int64_t>(b.heads.query) * b.heads.rows; }
};

// A block's shared memory: its own tiles, one for those that pass by, a square.
template <class C, int Tile, int Columns>
struct Tiles {
  static constexpr int kMostOwn = 4;
  // Whether all own tiles fit for the largest head dimension; otherwise they take turns in one place.
  static constexpr bool kKept =
      sizeof(C) * ((kMostOwn + 1) * Tile * (kSide * Columns | 1) + Tile * (Tile + 1)) <= 98 * 1024;
  C *own, *passing, *square;
  int elements;

  static size_t bytes(int D, int count) {
    return sizeof(C) * (((kKept ? count : 1) + 1) * Tile * rowStride(D) + Tile * (Tile + 1));
  }
  KG_DEVICE Tiles(int D, int count) : elements(Tile * rowStride(D)) {
    own = reinterpret_cast<C*>(dynamicShared());
    passing = own + (kKept ? count : 1) * elements;
    square = passing + elements;
  }
  // fill(tile, which) for all own tiles; a barrier must follow.
  template <class Fill>
  KG_DEVICE void keep(int count, const Fill& fill) const {
    if constexpr (kKept)
      for (int which = 0; which < count; which++) fill(own + which * elements, which);
  }
  template <class Fill>
  KG_DEVICE const C* get(int which, const Fill& fill) const {
    if constexpr (kKept) return own + which * elements;
    syncThreads();
    fill(own, which);
    syncThreads();
    return own;
  }
  // The next tile that passes by; the last one is gone.
  template <class T, class RowOf>
  KG_DEVICE const C* pass(const HeadRows<const T>& x, int head, int D, int valid, C factor, const RowOf& rowOf) const {
    syncThreads();
    fillTile<Tile, Columns>(passing, x, head, D, valid, factor, rowOf);
    syncThreads();
    return passing;
  }
};

// ---- outDot, dq ---------------------------------------------------------------------------------------------------

template <class T, int Tile, int Columns>
struct QueryBlock {
  using C = compute_t<T>;
  static constexpr int M = Tile / kSide;
  enum Own { kQueries, kQueryDots, kDouts, kOwn };
  const Tangent<T>& p;
  Tiles<C, Tile, Columns> at;
  KeyRows keyOf;
  int D, head, keyHead, firstRow, rows, firstKey;
  C lse[M], delta[M], r[M], m[M];  // of this thread's rows; r and m: of its columns alone until a pass ends

  KG_DEVICE QueryBlock(const Tangent<T>& call, const Chunk& chunk, int queryHead)
      : p(call),
        at(call.b.heads.D, kOwn),
        keyOf(keyRows(call.b.segments, call.b.segments[chunk.segment])),
        D(call.b.heads.D),
        head(queryHead),
        keyHead(queryHead / call.b.heads.group),
        firstRow(keyOf.ownStart + chunk.row),
        rows(chunk.rows),
        firstKey(keyOf.parentLength + chunk.row) {}

  KG_DEVICE int keys() const { return firstKey + rows; }
  KG_DEVICE int64_t primal(int row) const { return p.b.rowMap(firstRow + row, p.b.faults); }
  KG_DEVICE void fill(C* tile, int which) const {
    const C c = static_cast<C>(p.b.scale);
    if (which == kQueries)
      return fillTile<Tile, Columns>(tile, p.b.q, head, D, rows, c, [&](int i) { return primal(i); });
    const bool dots = which == kQueryDots;
    fillTile<Tile, Columns>(tile, dots ? p.qDot : p.b.dout, head, D, rows, dots ? c : C(1),
                            [&](int i) { return firstRow + i; });
  }
  KG_DEVICE const C* own(Own which) const {
    return at.get(which, [&](C* tile, int other) { fill(tile, other); });
  }
  KG_DEVICE const C* passKeys(const HeadRows<const T>& x, int first) const {
    return at.pass(x, keyHead, D, keys() - first, C(1),
                   [&](int i) { return p.b.rowMap(keyOf(first + i), p.b.faults); });
  }
  KG_DEVICE const C* passDots(const HeadRows<const T>& x, int first) const {
    return at.pass(x, keyHead, D, keys() - first, C(1), [&](int i) { return keyOf(first + i); });
  }
  KG_DEVICE const C* passOuts() const {
    return at.pass(p.b.out, head, D, rows, C(1), [&](int i) { return primal(i); });
  }

  KG_DEVICE void begin() {
    at.keep(kOwn, [&](C* tile, int which) { fill(tile, which); });
    const C* outs = passOuts();
    rowProducts<C, Tile>(delta, own(kDouts), outs, D);
    KG_UNROLL for (int i = 0; i < M; i++) {
      const int row = threadRow() + kSide * i;
      r[i] = m[i] = 0;
      lse[i] = INFINITY;
      if (row >= rows) continue;
      const int64_t from = primal(row);
      lse[i] = from < 0 ? static_cast<C>(NAN) : p.b.lse[from * p.b.heads.query + head];
    }
  }

  // p and t of a tile of keys; the keys' tangents stay.
  KG_DEVICE const C* scores(int first, Square<C, Tile>& s, Square<C, Tile>& t) const {
    const C* keyTile = passKeys(p.b.k, first);
    product(s, own(kQueries), keyTile, D);
    product(t, own(kQueryDots), keyTile, D);
    const C* dots = passDots(p.kDot, first);
    addProduct(t, own(kQueries), dots, D);
    KG_UNROLL for (int i = 0; i < M; i++) KG_UNROLL for (int j = 0; j < M; j++) {
      const bool seen = threadColumn() + kSide * j <= firstKey - first + threadRow() + kSide * i;
      s.v[i][j] = seen ? std::exp(s.v[i][j] - lse[i]) : C(0);
    }
    return dots;
  }

  // r, m, outDot.
  KG_DEVICE void visitForMoments(int first, Sums<C, Tile, Columns>& outDot) {
    Square<C, Tile> s, t, dp, e;
    scores(first, s, t);
    const C* values = passKeys(p.b.v, first);
    product(dp, own(kDouts), values, D);
    KG_UNROLL for (int i = 0; i < M; i++) KG_UNROLL for (int j = 0; j < M; j++) t.v[i][j] *= s.v[i][j];
    share(t, at.square);
    accumulate(outDot, at.square, values, D);
    const C* dots = passDots(p.vDot, first);
    product(e, own(kDouts), dots, D);
    share(s, at.square);
    accumulate(outDot, at.square, dots, D);
    KG_UNROLL for (int i = 0; i < M; i++) KG_UNROLL for (int j = 0; j < M; j++) {
      r[i] += t.v[i][j];
      m[i] += std::fma(dp.v[i][j], t.v[i][j], s.v[i][j] * e.v[i][j]);
    }
  }

  // Whole rows of r and m, left for the blocks of keys; outDot.
  KG_DEVICE void finishMoments(Sums<C, Tile, Columns>& outDot) {
    const C* outs = passOuts();
    C one[M];
    KG_UNROLL for (int i = 0; i < M; i++) {
      for (int mask = kSide / 2; mask > 0; mask >>= 1) {
        r[i] += shuffleXor(r[i], mask);
        m[i] += shuffleXor(m[i], mask);
      }
      m[i] -= 2 * delta[i] * r[i];
      one[i] = 1;
      const int row = threadRow() + kSide * i;
      KG_UNROLL for (int c = 0; c < Columns; c++) {
        const int d = threadColumn() + kSide * c;
        if (d < D) outDot.v[i][c] -= r[i] * outs[row * rowStride(D) + d];
      }
      if (row >= rows || threadColumn() != 0) continue;
      C* to = p.statsOf(head, firstRow + row);
      to[0] = delta[i];
      to[p.statStride()] = r[i];
      to[2 * p.statStride()] = m[i];
    }
    storeSums(outDot, one, p.outDot, firstRow, head, D, rows);
  }

  KG_DEVICE void visitForQueries(int first, Sums<C, Tile, Columns>& dq) const {
    Square<C, Tile> s, t, dp, e;
    product(dp, own(kDouts), passKeys(p.b.v, first), D);
    product(e, own(kDouts), passDots(p.vDot, first), D);
    const C* dots = scores(first, s, t);
    KG_UNROLL for (int i = 0; i < M; i++) KG_UNROLL for (int j = 0; j < M; j++) {
      const C weight = s.v[i][j], rest = dp.v[i][j] - delta[i];
      t.v[i][j] = weight * (std::fma(rest, t.v[i][j], e.v[i][j]) - dp.v[i][j] * r[i] - m[i]);
      s.v[i][j] = weight * rest;
    }
    share(s, at.square);
    accumulate(dq, at.square, dots, D);
    share(t, at.square);
    accumulate(dq, at.square, passKeys(p.b.k, first), D);
  }
};

template <class T, int Tile, int Columns>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kGeneralThreads, 1) queriesTangentKernel(Tangent<T> p) {
  using C = compute_t<T>;
  const int head = static_cast<int>(blockIdx.x % p.b.heads.query);
  const uint32_t slot = blockIdx.x / p.b.heads.query;
  Chunk chunk;
  const Found found = findChunk(p.b.segments, slot, Tile, Deal::LastFirst, p.b.faults, chunk);
  if (found == Found::BadTable) {
    fillNaN(p.outDot, head, p.b.heads.D, slot, Tile, p.b.heads.rows);
    return fillNaN(p.b.dq, head, p.b.heads.D, slot, Tile, p.b.heads.rows);
  }
  if (found == Found::Nothing) return;
  QueryBlock<T, Tile, Columns> block(p, chunk, head);
  block.begin();
  Sums<C, Tile, Columns> sums;
  sums.clear();
  for (int first = 0; first < block.keys(); first += Tile) block.visitForMoments(first, sums);
  block.finishMoments(sums);
  sums.clear();
  for (int first = 0; first < block.keys(); first += Tile) block.visitForQueries(first, sums);
  C factor[Tile / kSide];
  KG_UNROLL for (C& f : factor) f = static_cast<C>(p.b.scale);
  storeSums(sums, factor, p.b.dq, block.firstRow, head, block.D, block.rows);
}

// ---- dk, dv -------------------------------------------------------------------------------------------------------

template <class T, int Tile, int Columns>
struct KeyBlock {
  using C = compute_t<T>;
  static constexpr int M = Tile / kSide;
  enum Own { kKeys, kKeyDots, kValues, kValueDots, kOwn };
  const Tangent<T>& p;
  Tiles<C, Tile, Columns> at;
  int D, keyHead, firstRow, rows;
  Sums<C, Tile, Columns> dk, dv;

  KG_DEVICE KeyBlock(const Tangent<T>& call, const Chunk& chunk, int head)
      : p(call),
        at(call.b.heads.D, kOwn),
        D(call.b.heads.D),
        keyHead(head),
        firstRow(call.b.segments[chunk.segment].start + chunk.row),
        rows(chunk.rows) {
    dk.clear();
    dv.clear();
    at.keep(kOwn, [&](C* tile, int which) { fill(tile, which); });
  }

  KG_DEVICE void fill(C* tile, int which) const {
    const bool keys = which == kKeys || which == kKeyDots, dots = which == kKeyDots || which == kValueDots;
    const HeadRows<const T>& x = keys ? (dots ? p.kDot : p.b.k) : (dots ? p.vDot : p.b.v);
    fillTile<Tile, Columns>(tile, x, keyHead, D, rows, C(1), [&](int i) {
      return dots ? static_cast<int64_t>(firstRow + i) : p.b.rowMap(firstRow + i, p.b.faults);
    });
  }
  KG_DEVICE const C* own(Own which) const {
    return at.get(which, [&](C* tile, int other) { fill(tile, other); });
  }

  // Adds what query rows row..row+count of the layout give (forQueryTiles).
  KG_DEVICE void visit(int head, int row, int count, int behind) {
    const C c = static_cast<C>(p.b.scale);
    const auto primalRow = [&](int i) { return p.b.rowMap(row + i, p.b.faults); };
    const auto sameRow = [&](int i) { return row + i; };
    const auto passQueries = [&] { return at.pass(p.b.q, head, D, count, c, primalRow); };
    const auto passQueryDots = [&] { return at.pass(p.qDot, head, D, count, c, sameRow); };
    C lse[M], delta[M], r[M], m[M];
    KG_UNROLL for (int j = 0; j < M; j++) {
      const int column = threadColumn() + kSide * j;
      lse[j] = INFINITY;
      delta[j] = r[j] = m[j] = 0;
      if (column >= count) continue;
      const int64_t primal = primalRow(column);
      lse[j] = primal < 0 ? static_cast<C>(NAN) : p.b.lse[primal * p.b.heads.query + head];
      const C* stats = p.statsOf(head, row + column);
      delta[j] = stats[0];
      r[j] = stats[p.statStride()];
      m[j] = stats[2 * p.statStride()];
    }
    Square<C, Tile> s, t, dp, e;  // t in the very order of the query rows' t: t - r cancels where one key has all
    product(t, own(kKeys), passQueryDots(), D);
    const C* queries = passQueries();
    addProduct(t, own(kKeyDots), queries, D);
    product(s, own(kKeys), queries, D);
    KG_UNROLL for (int i = 0; i < M; i++) KG_UNROLL for (int j = 0; j < M; j++) {
      const bool seen = behind + threadRow() + kSide * i <= threadColumn() + kSide * j;
      s.v[i][j] = seen ? std::exp(s.v[i][j] - lse[j]) : C(0);
    }
    const C* douts = at.pass(p.b.dout, head, D, count, C(1), sameRow);
    product(dp, own(kValues), douts, D);
    product(e, own(kValueDots), douts, D);
    KG_UNROLL for (int i = 0; i < M; i++) KG_UNROLL for (int j = 0; j < M; j++) {
      const C weight = s.v[i][j], dot = t.v[i][j], rest = dp.v[i][j] - delta[j];
      t.v[i][j] = weight * (dot - r[j]);
      e.v[i][j] = weight * (std::fma(rest, dot, e.v[i][j]) - dp.v[i][j] * r[j] - m[j]);
      s.v[i][j] = weight * rest;
    }
    share(t, at.square);
    accumulate(dv, at.square, douts, D);
    share(e, at.square);
    accumulate(dk, at.square, passQueries(), D);
    share(s, at.square);
    accumulate(dk, at.square, passQueryDots(), D);
  }
};

template <class T, int Tile, int Columns>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kGeneralThreads, 1) keysTangentKernel(Tangent<T> p) {
  using C = compute_t<T>;
  const int keyHead = static_cast<int>(blockIdx.x % p.b.heads.key);
  const uint32_t slot = blockIdx.x / p.b.heads.key;
  Chunk chunk;
  const Found found = findChunk(p.b.segments, slot, Tile, Deal::FirstFirst, p.b.faults, chunk);
  if (found == Found::BadTable) {
    fillNaN(p.b.dk, keyHead, p.b.heads.D, slot, Tile, p.b.heads.rows);
    return fillNaN(p.b.dv, keyHead, p.b.heads.D, slot, Tile, p.b.heads.rows);
  }
  if (found == Found::Nothing) return;
  KeyBlock<T, Tile, Columns> block(p, chunk, keyHead);
  const int firstHead = keyHead * p.b.heads.group;
  for (int head = firstHead; head < firstHead + p.b.heads.group; head++)
    forQueryTiles<Tile>(p.b.segments, chunk,
                        [&](int row, int count, int behind) { block.visit(head, row, count, behind); });
  C one[Tile / kSide];
  KG_UNROLL for (C& f : one) f = 1;
  storeSums(block.dk, one, p.b.dk, block.firstRow, keyHead, block.D, block.rows);  // the scale came with the queries
  storeSums(block.dv, one, p.b.dv, block.firstRow, keyHead, block.D, block.rows);
}

// ---- host half ----------------------------------------------------------------------------------------------------

template <class T, int Tile, int Columns>
void enqueue(const Call& call, Tangent<T> p) {
  using C = compute_t<T>;
  using Shared = Tiles<C, Tile, Columns>;
  const Heads& heads = p.b.heads;
  p.stats = static_cast<C*>(scratch(call, 3 * static_cast<size_t>(heads.rows) * heads.query * sizeof(C)));
  const int64_t slots = slotsFor(p.b.segments, Tile);
  launch(call,
         {gridOf(slots * heads.query), kGeneralThreads, Shared::bytes(heads.D, QueryBlock<T, Tile, Columns>::kOwn)},
         queriesTangentKernel<T, Tile, Columns>, p);
  launch(call, {gridOf(slots * heads.key), kGeneralThreads, Shared::bytes(heads.D, KeyBlock<T, Tile, Columns>::kOwn)},
         keysTangentKernel<T, Tile, Columns>, p);
}

// Five tiles of rows and a square within 99 KiB, but for float64, which has one kernel for all D
// (attention_general.cu).
template <class T>
void tangentFor(const Call& call, const Tangent<T>& p) {
  if constexpr (sizeof(compute_t<T>) == 4) {
    if (p.b.heads.D <= 64) return enqueue<T, 64, 64 / kSide>(call, p);
    if (p.b.heads.D <= 128) return enqueue<T, 32, 128 / kSide>(call, p);
  }
  enqueue<T, 16, 256 / kSide>(call, p);
}

template <class T>
void tangent(const Call& call) {
  Tangent<T> p{};
  readSide("attentionTangent", call, {1, 7, 8, 13}, p.b);
  p.b.dout = HeadRows<const T>::of(call[7]);
  p.b.q = HeadRows<const T>::of(call[8]);
  p.b.k = HeadRows<const T>::of(call[9]);
  p.b.v = HeadRows<const T>::of(call[10]);
  p.b.out = HeadRows<const T>::of(call[11]);
  p.b.lse = call[12].ptr<const compute_t<T>>();
  p.outDot = HeadRows<T>::of(call[0]);
  p.qDot = HeadRows<const T>::of(call[4]);
  p.kDot = HeadRows<const T>::of(call[5]);
  p.vDot = HeadRows<const T>::of(call[6]);
  if (p.b.heads.rows == 0 || p.b.heads.query == 0) return;
  tangentFor(call, p);
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

}  // namespace kg::cuda
