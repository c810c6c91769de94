// softmax, logSoftmax and logSumExp along contiguous rows, the maximum subtracted. A row of -inf alone gives NaN
// (softmax, logSoftmax) or -inf (logSumExp), as in torch.
//
// A row belongs to a warp (up to 1,024 elements) or to a thread block of 256 or 1,024, by its width alone; thread t
// takes elements t, t + threads, ...: a row's value depends on nothing but the row. One pass finds the maximum and the
// sum of exponentials together (the sum is rescaled when the maximum grows), a second writes.
//
// Roofline (H100, 3.35 TB/s): a read and a write an element, the second read of a row comes from the caches. [8192,
// 4096] in bfloat16 moves 134 MB: 40 us. Two exponentials an element, about 20 instructions: 8192 * 4096 * 40 / 32 /
// (132 * 4 * 1.7e9) = 47 us at the peak of issue, so that arithmetic and memory weigh alike.
#include "cuda/math.h"
#include "cuda/strided.h"

namespace kg::cuda {
namespace {

constexpr int kAhead = 4;  // elements that a thread reads before it uses the first

enum class Output { Softmax, LogSoftmax, LogSumExp };

struct Rows {
  int64_t count, width;
  bool whole;  // a thread block a row, not a warp
};

// Running maximum and sum of e^(x - maximum). x = maximum counts as 1, so that -inf before anything else does no harm:
// it is scaled by e^-inf later.
template <class C>
struct SumExp {
  C largest, sum;

  KG_DEVICE static C term(C x, C shift) { return x == shift ? C(1) : m::exp(x - shift); }
  KG_DEVICE void raise(C x) {
    if (!(x > largest)) return;
    sum *= m::exp(largest - x);
    largest = x;
  }
  KG_DEVICE void add(C x) { sum += term(x, largest); }
};

template <class C>
KG_DEVICE C groupMax(C v, C* shared, bool whole) {
  const auto larger = [](C a, C b) { return a > b ? a : b; };
  return whole ? blockReduce(v, -infinity<C>(), shared, larger) : warpMax(v);
}
template <class C>
KG_DEVICE C groupSum(C v, C* shared, bool whole) {
  return whole ? blockSum(v, shared) : warpSum(v);
}

// Of one row, the same in all its threads. The sum is NaN where the maximum is infinite.
template <class C, class T>
KG_DEVICE SumExp<C> sumExpOf(const T* x, int64_t width, int lane, int lanes, bool whole, C* shared) {
  SumExp<C> row{-infinity<C>(), C(0)};
  int64_t i = lane;
  KG_UNROLL_BY(1) for (; i + (kAhead - 1) * lanes < width; i += kAhead * lanes) {
    C v[kAhead];
    KG_UNROLL for (int j = 0; j < kAhead; j++) v[j] = static_cast<C>(x[i + j * lanes]);
    C most = v[0];
    KG_UNROLL for (int j = 1; j < kAhead; j++) most = v[j] > most ? v[j] : most;
    row.raise(most);
    KG_UNROLL for (int j = 0; j < kAhead; j++) row.add(v[j]);
  }
  KG_UNROLL_BY(1) for (; i < width; i += lanes) {
    const C v = static_cast<C>(x[i]);
    row.raise(v);
    row.add(v);
  }
  const C largest = groupMax(row.largest, shared, whole);
  const C sum = groupSum(row.sum * SumExp<C>::term(row.largest, largest), shared, whole);
  return {largest, sum};
}

template <class T, Output kOutput>
KG_GLOBAL KG_LAUNCH_BOUNDS(1024) void softmaxRows(const T* x, T* y, Rows rows) {
  using C = compute_t<T>;
  KG_SHARED(C, shared, kWarp);
  const int lanes = rows.whole ? static_cast<int>(blockDim.x) : kWarp, lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t perBlock = blockDim.x / lanes, step = gridDim.x * perBlock;
  KG_UNROLL_BY(1)
  for (int64_t r = blockIdx.x * perBlock + static_cast<int>(threadIdx.x) / lanes; r < rows.count; r += step) {
    const T* from = x + r * rows.width;
    const SumExp<C> row = sumExpOf<C>(from, rows.width, lane, lanes, rows.whole, shared);
    const bool infinite = row.largest == infinity<C>() || row.largest == -infinity<C>();
    if constexpr (kOutput == Output::LogSumExp) {
      const C value = !infinite ? m::log(row.sum) + row.largest : row.sum == row.sum ? row.largest : row.sum;
      if (lane == 0) y[r] = static_cast<T>(value);
    } else {
      const C sum = infinite ? row.largest - row.largest : row.sum;  // inf - inf
      const C scale = kOutput == Output::Softmax ? C(1) / sum : m::log(sum);
      T* to = y + r * rows.width;
      KG_UNROLL_BY(1) for (int64_t i = lane; i < rows.width; i += kAhead * lanes) {
        T v[kAhead] = {};
        KG_UNROLL for (int j = 0; j < kAhead; j++) {
          if (i + j * lanes < rows.width) v[j] = from[i + j * lanes];
        }
        KG_UNROLL for (int j = 0; j < kAhead; j++) {
          const C shifted = static_cast<C>(v[j]) - row.largest;
          const C value = kOutput == Output::Softmax ? m::exp(shifted) * scale : shifted - scale;
          if (i + j * lanes < rows.width) to[i + j * lanes] = static_cast<T>(value);
        }
      }
    }
  }
}

template <Output kOutput>
void softmaxKernel(const Call& call, Rows rows) {
  if (rows.count == 0) return;
  rows.whole = rows.width > 1024;
  const int threads = rows.width > 16384 ? 1024 : 256;
  const int64_t wanted = rows.whole ? rows.count : ceilDiv(rows.count, threads / kWarp), most = int64_t{1} << 30;
  dispatchFloat(call[1].dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(call, {gridOf(wanted < most ? wanted : most), threads}, softmaxRows<T, kOutput>, call[1].ptr<T>(),
           call[0].ptr<T>(), rows);
  });
}

Rows rowsOf(const TensorView& x) {
  const int64_t width = x.ndim > 0 ? x.size(-1) : 1;
  return {width > 0 ? x.numel() / width : 0, width, false};
}

void checkRows(const TensorView& out, const TensorView& x) {
  if (out.dtype != x.dtype) fail("expected one dtype, found %s from %s", dtypeName(out.dtype), dtypeName(x.dtype));
  if (!out.contiguous() || !x.contiguous()) fail("expected contiguous rows, found strides; try contiguous() first");
}

}  // namespace

void kernel_softmax(const Call& call) {
  checkRows(call[0], call[1]);
  softmaxKernel<Output::Softmax>(call, rowsOf(call[1]));
}

void kernel_logSoftmax(const Call& call) {
  checkRows(call[0], call[1]);
  softmaxKernel<Output::LogSoftmax>(call, rowsOf(call[1]));
}

void kernel_logSumExp(const Call& call) {
  softmaxKernel<Output::LogSumExp>(call, {call[0].numel(), rowsOf(call[1]).width, false});
}

}  // namespace kg::cuda
