// The derivative of RMSNorm's backward pass: for phi = <dxDot, dx> + <weightDot, dweight> what phi sends to dy, x and
// weight. Rows are shared out as in the backward pass; a warp (or block) takes its rows one after the other.
//
// Contract: kernels.def, rmsNormTangent. Fixed orders as in rmsNormBackward.
//
// H100 (3.35 TB/s), bfloat16, 8192 x 896, without weightDot: dxDot, dy, x, gDot, dx 73 MB, 22 us at full rate, 26 us at
// 85 %; weightDot is a row a sequence, read from L2.
#include "cuda/norm.h"

namespace kg::cuda {

namespace {

template <class T>
struct Tangent {
  using C = compute_t<T>;
  T *gDot, *dx;
  C* partials;  // [blocks, width]; nullptr: dweight is not wanted
  const T *dxDot, *dy, *x, *weight;
  const C *weightDot, *rstd;  // weightDot [sequences, width] or nullptr
  const int32_t* rowSequence;
  RowMap rowMap;
  FaultSink faults;
  int64_t rows, rowsPerBlock, sequences;
};

// With r = rstd, xh = r x, a = dy weight, t = dxDot, b = weightDot dy, and means over the row:
//   gDot = weight r (t - xh mean(xh t)) + weightDot xh
//   dx = r^2 (xh (3 mean(xh a) mean(xh t) - mean(a t)) - a mean(xh t) - t mean(xh a)) + r (b - xh mean(xh b))
//   dweight = dy r (t - xh mean(xh t))
template <class C>
struct Means {
  C xa, xt, at, xb;
};

template <class T, bool kHeld, bool kAligned>
struct TangentRow {
  using C = compute_t<T>;
  using Values = Wide<C, kPack<T>>;
  Row<T, kHeld, kAligned> t, dy, x, weight;
  const C* weightDot;  // of the row's sequence, or nullptr
  C rstd;

  // False where the row map or the sequence is at fault.
  KG_DEVICE bool read(const Tangent<T>& b, const RowShape& shape, int lane, int64_t row) {
    const int64_t primal = b.rowMap(row, b.faults);
    if (primal < 0) return false;
    weightDot = b.weightDot;
    if (weightDot && b.rowSequence) {
      const int64_t sequence = b.rowSequence[row];
      if (sequence < 0 || sequence >= b.sequences) {
        reportFault(b.faults, FaultKind::IdOutOfRange, sequence, row, b.sequences);
        return false;
      }
      weightDot += sequence * shape.width;
    }
    t.read(b.dxDot + row * shape.width, shape, lane);
    dy.read(b.dy + row * shape.width, shape, lane);
    x.read(b.x + primal * shape.width, shape, lane);
    rstd = b.rstd[primal];
    return true;
  }

  KG_DEVICE Values weightDots(const RowShape& shape, int pack) const {
    Values w;
    KG_UNROLL for (int i = 0; i < kPack<T>; i++) {
      const int at = pack * kPack<T> + i;
      w.v[i] = weightDot && at < shape.width ? weightDot[at] : C(0);
    }
    return w;
  }

  KG_DEVICE Means<C> means(const RowShape& shape, int lane, C* shared) const {
    Means<C> m{};
    forPacks<kHeld>(shape, lane, [&](int s, int pack) {
      const Values d = t.get(shape, s, pack), g = dy.get(shape, s, pack), v = x.get(shape, s, pack);
      const Values w = weight.get(shape, s, pack), wd = weightDots(shape, pack);
      KG_UNROLL for (int i = 0; i < kPack<T>; i++) {
        const C xh = v.v[i] * rstd, a = g.v[i] * w.v[i];
        m.xa += xh * a;
        m.xt += xh * d.v[i];
        m.at += a * d.v[i];
        m.xb += xh * wd.v[i] * g.v[i];
      }
    });
    const C over = C(1) / C(shape.width);
    const C xa = rowSum(m.xa, shape, shared), xt = rowSum(m.xt, shape, shared);
    const C at = rowSum(m.at, shape, shared), xb = rowSum(m.xb, shape, shared);
    return {xa * over, xt * over, at * over, xb * over};
  }

  KG_DEVICE void write(const Tangent<T>& b, const RowShape& shape, int lane, int64_t row, const Means<C>& m) const {
    const C along = C(3) * m.xa * m.xt - m.at;
    forPacks<kHeld>(shape, lane, [&](int s, int pack) {
      const Values d = t.get(shape, s, pack), g = dy.get(shape, s, pack), v = x.get(shape, s, pack);
      const Values w = weight.get(shape, s, pack), wd = weightDots(shape, pack);
      Values forG, forX;
      KG_UNROLL for (int i = 0; i < kPack<T>; i++) {
        const C xh = v.v[i] * rstd, a = g.v[i] * w.v[i];
        forG.v[i] = w.v[i] * (rstd * (d.v[i] - xh * m.xt)) + wd.v[i] * xh;
        forX.v[i] = rstd * rstd * (xh * along - a * m.xt - d.v[i] * m.xa) + rstd * (wd.v[i] * g.v[i] - xh * m.xb);
      }
      storeTo<kAligned>(b.gDot + row * shape.width, pack, shape.width, narrow<T>(forG));
      storeTo<kAligned>(b.dx + row * shape.width, pack, shape.width, narrow<T>(forX));
    });
  }

  KG_DEVICE void addTo(WeightSums<T, kHeld>& sums, const RowShape& shape, int lane, const Means<C>& m) const {
    sums.add(shape, lane, [&](int s, int pack) {
      const Values d = t.get(shape, s, pack), v = x.get(shape, s, pack);
      Values g = dy.get(shape, s, pack);
      KG_UNROLL for (int i = 0; i < kPack<T>; i++) g.v[i] *= rstd * (d.v[i] - v.v[i] * rstd * m.xt);
      return g;
    });
  }
};

template <class T, bool kHeld, bool kAligned, bool kWeight>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kMostThreads) rmsNormTangentKernel(Tangent<T> b, RowShape shape) {
  using C = compute_t<T>;
  KG_SHARED(C, shared, kWarp);
  const int step = static_cast<int>(blockDim.x) / shape.lanes;
  const int lane = static_cast<int>(threadIdx.x) % shape.lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * b.rowsPerBlock;
  const int64_t end = first + b.rowsPerBlock < b.rows ? first + b.rowsPerBlock : b.rows;
  WeightSums<T, kHeld> sums;
  if constexpr (kWeight) sums.begin(b.partials + static_cast<int64_t>(blockIdx.x) * shape.width, shape, lane);
  TangentRow<T, kHeld, kAligned> values;
  values.weight.read(b.weight, shape, lane);
  for (int64_t row = first + threadIdx.x / shape.lanes; row < end; row += step) {
    if (!values.read(b, shape, lane, row)) continue;
    const Means<C> m = values.means(shape, lane, shared);
    values.write(b, shape, lane, row, m);
    if constexpr (kWeight) values.addTo(sums, shape, lane, m);
  }
  if constexpr (kWeight) sums.end(shape, lane, reinterpret_cast<C*>(dynamicShared()));
}

template <class T, bool kWeight>
void enqueue(const Call& call, Tangent<T>& b, const RowShape& shape) {
  using C = compute_t<T>;
  b.rowsPerBlock = kWeight ? rowsPerPartial(b.rows) : shape.rowsAtOnce();
  const int64_t blocks = ceilDiv(b.rows, b.rowsPerBlock);
  if (kWeight) b.partials = static_cast<C*>(scratch(call, blocks * shape.width * sizeof(C)));
  const size_t shared = kWeight && shape.oneWarp() ? shape.rowsAtOnce() * shape.width * sizeof(C) : 0;
  bool aligned = onPacks(call[7], 0);
  for (int i : {0, 1, 3, 5, 6}) aligned = aligned && onPacks(call[i], shape.width);
  dispatchLayout(shape, aligned, [&](auto held, auto a) {
    launch(call, {gridOf(blocks), shape.threads(), shared},
           rmsNormTangentKernel<T, decltype(held)::value, decltype(a)::value, kWeight>, b, shape);
  });
  if (kWeight && blocks > 0)
    launch(call, {gridOf(ceilDiv(shape.width, kWarp)), 1024}, addPartials<C>, call[2].ptr<C>(), b.partials, blocks,
           shape.width);
}

template <class T>
void rmsNormTangent(const Call& call) {
  using C = compute_t<T>;
  Tangent<T> b{};
  b.gDot = call[0].ptr<T>();
  b.dx = call[1].ptr<T>();
  b.dxDot = call[3].ptr<T>();
  b.weightDot = call[4].present() ? call[4].ptr<C>() : nullptr;
  b.dy = call[5].ptr<T>();
  b.x = call[6].ptr<T>();
  b.weight = call[7].ptr<T>();
  b.rstd = call[8].ptr<C>();
  b.rowMap = RowMap::of(call[9], call[8].numel());
  b.rowSequence = call[10].present() ? call[10].ptr<int32_t>() : nullptr;
  b.sequences = call[4].present() ? call[4].size(0) : 0;
  b.faults = context(call).faults;
  b.rows = call[3].size(0);
  const RowShape shape = rowShape<T>(call[3].size(1));
  call[2].present() ? enqueue<T, true>(call, b, shape) : enqueue<T, false>(call, b, shape);
}

}  // namespace

void kernel_rmsNormTangent(const Call& call) {
  dispatchFloat(call[3].dtype, [&](auto tag) { rmsNormTangent<typename decltype(tag)::type>(call); });
}

}  // namespace kg::cuda
