// RMSNorm along the last axis, alone and of a residual sum, forward and backward. A row belongs to one warp, or to one
// block where it is wider than 128 packs of 16 bytes; each lane holds up to 4 packs of it in registers, so a row is
// read once. Wider rows than a block holds are read twice.
//
// Contract: kernels.def, rmsNorm, addRmsNorm and rmsNormBackward. Rows are independent. The sum over a row is taken
// lane by lane and then by butterflies, in an order that depends on its width and dtype alone. dweight is summed over
// fixed blocks of rows (rowsPerPartial), these in a fixed tree: nothing depends on the schedule or on the device.
//
// H100 (3.35 TB/s; a copy reaches about 90 % of it), bfloat16, 8192 x 896:
//   forward   x, y                 29.4 MB   8.8 us at full rate, 10.3 us at 85 %   (5 flops an element: 0.04 GFLOP)
//   of a sum  x, delta, sum, y     58.7 MB  17.5 us at full rate, 20.6 us at 85 %   (an add before it: 73.4 MB, 25.8
//   us) backward  dy, x, dx            44.0 MB  13.1 us at full rate, 15.5 us at 85 % with dsum dy, x, dsum,
//   dx      58.7 MB  17.5 us at full rate, 20.6 us at 85 %   (an add behind it: 88.1 MB, 30.9 us) dweight   beside dx:
//   3 flops an element more (22 MFLOP), partial sums [512, 896] of float32, 1.8 MB, written and
//             read: 47.7 MB, 14.2 us at full rate; the second launch, 28 blocks that read them out of L2, is latency,
//             2-3 us: 19 us expected. Without dx: dy, x 29.4 MB and the same sums, 10 us at full rate, 13 us expected
#include "cuda/norm.h"

namespace kg::cuda {

namespace {

template <class T>
struct Forward {
  T* y;
  compute_t<T>* rstd;
  const T *x, *weight;
  const T* delta;  // of a sum alone
  T* sum;
  int64_t rows;
  compute_t<T> eps;
};

// The lane's packs of x + delta: stored, and what the row `in` is from here on. A row too wide for registers is read
// back from where this same lane stored it.
template <class T, bool kHeld, bool kAligned>
KG_DEVICE void addDelta(Row<T, kHeld, kAligned>& in, const Forward<T>& f, const RowShape& shape, int lane,
                        int64_t row) {
  Row<T, kHeld, kAligned> delta;
  delta.read(f.delta + row * shape.width, shape, lane);
  T* sum = f.sum + row * shape.width;
  forPacks<kHeld>(shape, lane, [&](int s, int pack) {
    auto v = in.get(shape, s, pack);
    const auto d = delta.get(shape, s, pack);
    KG_UNROLL for (int i = 0; i < kPack<T>; i++) v.v[i] += d.v[i];
    const auto rounded = narrow<T>(v);
    if constexpr (kHeld) in.held[s] = rounded;
    storeTo<kAligned>(sum, pack, shape.width, rounded);
  });
  in.data = sum;
}

template <class T, bool kHeld, bool kAligned, bool kSum>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kMostThreads) rmsNormKernel(Forward<T> f, RowShape shape) {
  using C = compute_t<T>;
  KG_SHARED(C, shared, kWarp);
  const int rowsAtOnce = static_cast<int>(blockDim.x) / shape.lanes;
  const int lane = static_cast<int>(threadIdx.x) % shape.lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * rowsAtOnce + threadIdx.x / shape.lanes;
  if (row >= f.rows) return;  // a whole warp; a block that has one row always has it
  Row<T, kHeld, kAligned> in, scales;
  in.read(f.x + row * shape.width, shape, lane);
  scales.read(f.weight, shape, lane);
  if constexpr (kSum) addDelta(in, f, shape, lane, row);
  C sum = 0;
  forPacks<kHeld>(shape, lane, [&](int s, int pack) {
    const auto v = in.get(shape, s, pack);
    KG_UNROLL for (int i = 0; i < kPack<T>; i++) sum += v.v[i] * v.v[i];
  });
  const C rstd = C(1) / std::sqrt(rowSum(sum, shape, shared) / C(shape.width) + f.eps);
  if (lane == 0) f.rstd[row] = rstd;
  forPacks<kHeld>(shape, lane, [&](int s, int pack) {
    auto v = in.get(shape, s, pack);
    const auto w = scales.get(shape, s, pack);
    KG_UNROLL for (int i = 0; i < kPack<T>; i++) v.v[i] *= rstd;
    v = widen(narrow<T>(v));  // the rounding before the product with weight
    KG_UNROLL for (int i = 0; i < kPack<T>; i++) v.v[i] *= w.v[i];
    storeTo<kAligned>(f.y + row * shape.width, pack, shape.width, narrow<T>(v));
  });
}

template <class T>
struct Backward {
  T* dx;                   // nullptr: not wanted
  compute_t<T>* partials;  // [blocks, width]; nullptr: dweight is not wanted
  const T *dy, *x, *weight;
  const T* dsum;  // nullptr: dx has nothing else
  const compute_t<T>* rstd;
  RowMap rowMap;
  FaultSink faults;
  int64_t rows, rowsPerBlock;
};

// What a lane holds of one cotangent row and its primal row; not valid past the end and where the row map is at fault.
template <class T, bool kHeld, bool kAligned>
struct RowPair {
  Row<T, kHeld, kAligned> dy, x;
  compute_t<T> scale;  // rstd
  bool valid;

  KG_DEVICE void read(const Backward<T>& b, const RowShape& shape, int lane, int64_t row, int64_t end) {
    valid = false;
    if (row >= end) return;
    const int64_t primal = b.rowMap(row, b.faults);
    if (primal < 0) return;
    dy.read(b.dy + row * shape.width, shape, lane);
    x.read(b.x + primal * shape.width, shape, lane);
    scale = b.rstd[primal];
    valid = true;
  }
};

// dx = rstd * (dy * weight - x * rstd * mean(dy * weight * x * rstd)) (+ dsum).
template <class T, bool kHeld, bool kAligned>
KG_DEVICE void writeInputGradient(const Backward<T>& b, const RowShape& shape, int lane, int64_t row,
                                  const RowPair<T, kHeld, kAligned>& pair, const Row<T, kHeld, kAligned>& weight,
                                  compute_t<T>* shared) {
  using C = compute_t<T>;
  C sum = 0;
  forPacks<kHeld>(shape, lane, [&](int s, int pack) {
    const auto g = pair.dy.get(shape, s, pack), v = pair.x.get(shape, s, pack);
    const auto w = weight.get(shape, s, pack);
    KG_UNROLL for (int i = 0; i < kPack<T>; i++) sum += g.v[i] * w.v[i] * v.v[i];
  });
  const C slope = pair.scale * (rowSum(sum, shape, shared) * pair.scale / C(shape.width));
  forPacks<kHeld>(shape, lane, [&](int s, int pack) {
    const auto v = pair.x.get(shape, s, pack);
    const auto w = weight.get(shape, s, pack);
    auto g = pair.dy.get(shape, s, pack);
    KG_UNROLL for (int i = 0; i < kPack<T>; i++) g.v[i] = pair.scale * (g.v[i] * w.v[i] - v.v[i] * slope);
    if (b.dsum) {
      const auto more = widen(loadFrom<kAligned>(b.dsum + row * shape.width, pack, shape.width));
      KG_UNROLL for (int i = 0; i < kPack<T>; i++) g.v[i] += more.v[i];
    }
    storeTo<kAligned>(b.dx + row * shape.width, pack, shape.width, narrow<T>(g));
  });
}

// What a row adds to dweight: dy * x * rstd.
template <class T, bool kHeld, bool kAligned>
KG_DEVICE void addWeightGradient(WeightSums<T, kHeld>& sums, const RowShape& shape, int lane,
                                 const RowPair<T, kHeld, kAligned>& pair) {
  sums.add(shape, lane, [&](int s, int pack) {
    auto g = pair.dy.get(shape, s, pack);
    const auto v = pair.x.get(shape, s, pack);
    KG_UNROLL for (int i = 0; i < kPack<T>; i++) g.v[i] *= v.v[i] * pair.scale;
    return g;
  });
}

// Without kWeight a row each; with it rows [block * rowsPerBlock, ...) in ascending order a warp (or a block), the next
// row on its way while one is worked on.
template <class T, bool kHeld, bool kAligned, bool kWeight>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kMostThreads) rmsNormBackwardKernel(Backward<T> b, RowShape shape) {
  using C = compute_t<T>;
  KG_SHARED(C, shared, kWarp);
  const int step = static_cast<int>(blockDim.x) / shape.lanes;
  const int lane = static_cast<int>(threadIdx.x) % shape.lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * b.rowsPerBlock;
  const int64_t end = first + b.rowsPerBlock < b.rows ? first + b.rowsPerBlock : b.rows;
  int64_t row = first + threadIdx.x / shape.lanes;
  WeightSums<T, kHeld> sums;
  if constexpr (kWeight) sums.begin(b.partials + static_cast<int64_t>(blockIdx.x) * shape.width, shape, lane);
  Row<T, kHeld, kAligned> weight;
  if (b.dx) weight.read(b.weight, shape, lane);
  RowPair<T, kHeld, kAligned> pair, next;
  next.read(b, shape, lane, row, end);
  for (; row < end; row += step) {
    pair = next;
    if constexpr (kWeight) next.read(b, shape, lane, row + step, end);
    if (pair.valid && b.dx) writeInputGradient(b, shape, lane, row, pair, weight, shared);
    if constexpr (!kWeight) return;
    if (pair.valid) addWeightGradient(sums, shape, lane, pair);
  }
  if constexpr (kWeight) sums.end(shape, lane, reinterpret_cast<C*>(dynamicShared()));
}

template <bool kSum, class T>
void enqueueForward(const Call& call, const Forward<T>& f, const RowShape& shape, bool aligned) {
  dispatchLayout(shape, aligned, [&](auto held, auto a) {
    launch(call, {gridOf(ceilDiv(f.rows, shape.rowsAtOnce())), shape.threads()},
           rmsNormKernel<T, decltype(held)::value, decltype(a)::value, kSum>, f, shape);
  });
}

template <class T>
void rmsNorm(const Call& call) {
  using C = compute_t<T>;
  Forward<T> f{};
  f.y = call[0].ptr<T>();
  f.rstd = call[1].ptr<C>();
  f.x = call[2].ptr<T>();
  f.weight = call[3].ptr<T>();
  f.rows = call[1].numel();
  f.eps = static_cast<C>(call.attr(0));
  const RowShape shape = rowShape<T>(call[2].size(-1));
  const bool aligned = onPacks(call[0], shape.width) && onPacks(call[2], shape.width) && onPacks(call[3], 0);
  enqueueForward<false>(call, f, shape, aligned);
}

template <class T>
void addRmsNorm(const Call& call) {
  using C = compute_t<T>;
  Forward<T> f{};
  f.sum = call[0].ptr<T>();
  f.y = call[1].ptr<T>();
  f.rstd = call[2].ptr<C>();
  f.x = call[3].ptr<T>();
  f.delta = call[4].ptr<T>();
  f.weight = call[5].ptr<T>();
  f.rows = call[2].numel();
  f.eps = static_cast<C>(call.attr(0));
  const RowShape shape = rowShape<T>(call[3].size(-1));
  bool aligned = onPacks(call[5], 0);
  for (int i : {0, 1, 3, 4}) aligned = aligned && onPacks(call[i], shape.width);
  enqueueForward<true>(call, f, shape, aligned);
}

template <class T, bool kWeight>
void enqueueBackward(const Call& call, Backward<T>& b, const RowShape& shape) {
  using C = compute_t<T>;
  b.rowsPerBlock = kWeight ? rowsPerPartial(b.rows) : shape.rowsAtOnce();
  const int64_t blocks = ceilDiv(b.rows, b.rowsPerBlock);
  if (kWeight) b.partials = static_cast<C*>(scratch(call, blocks * shape.width * sizeof(C)));
  const size_t shared = kWeight && shape.oneWarp() ? shape.rowsAtOnce() * shape.width * sizeof(C) : 0;
  bool aligned = onPacks(call[4], 0);
  for (int i : {0, 2, 3, 7}) aligned = aligned && onPacks(call[i], shape.width);
  dispatchLayout(shape, aligned, [&](auto held, auto a) {
    launch(call, {gridOf(blocks), shape.threads(), shared},
           rmsNormBackwardKernel<T, decltype(held)::value, decltype(a)::value, kWeight>, b, shape);
  });
  if (kWeight && blocks > 0)
    launch(call, {gridOf(ceilDiv(shape.width, kWarp)), 1024}, addPartials<C>, call[1].ptr<C>(), b.partials, blocks,
           shape.width);
}

template <class T>
void rmsNormBackward(const Call& call) {
  using C = compute_t<T>;
  const int64_t primalRows = call[5].numel();
  Backward<T> b{};
  b.dx = call[0].present() ? call[0].ptr<T>() : nullptr;
  b.dy = call[2].ptr<T>();
  b.x = call[3].ptr<T>();
  b.weight = call[4].ptr<T>();
  b.rstd = call[5].ptr<C>();
  b.dsum = call[7].present() ? call[7].ptr<T>() : nullptr;
  b.rowMap = RowMap::of(call[6], primalRows);
  b.faults = context(call).faults;
  b.rows = call[6].present() ? call[6].numel() : primalRows;
  const RowShape shape = rowShape<T>(call[2].size(-1));
  if (call[1].present()) return enqueueBackward<T, true>(call, b, shape);
  if (b.dx) enqueueBackward<T, false>(call, b, shape);
}

}  // namespace

void kernel_rmsNorm(const Call& call) {
  dispatchFloat(call[0].dtype, [&](auto tag) { rmsNorm<typename decltype(tag)::type>(call); });
}

void kernel_addRmsNorm(const Call& call) {
  dispatchFloat(call[0].dtype, [&](auto tag) { addRmsNorm<typename decltype(tag)::type>(call); });
}

void kernel_rmsNormBackward(const Call& call) {
  dispatchFloat(call[2].dtype, [&](auto tag) { rmsNormBackward<typename decltype(tag)::type>(call); });
}

}  // namespace kg::cuda
