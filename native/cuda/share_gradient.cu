// shareGradient: one sequence's gradient of a parameter, looked at once: its square, its product with another, and its
// shares in two accumulated gradients.
//
// Sums have one order: a thread block takes 8,192 elements, thread t its packs t, t + 256, ... in float64, threads are
// joined by trees, blocks likewise by a second kernel. Whether memory is aligned changes accesses alone.
//
// Roofline (H100, 3.35 TB/s), float32 with everything present: tile and other are read, first and second read and
// written: 24 bytes an element. 4864 x 896 (an MLP's matrix of Qwen2.5-0.5B): 105 MB: 31 us. Two float64 products an
// element: 8.7 M / 34e12: nothing.
#include "cuda/math.h"
#include "cuda/strided.h"

namespace kg::cuda {
namespace {

constexpr int kShareBlock = 8192;  // elements; part of the order of summation
constexpr int kPack = 4;

template <class C>
struct Shares {
  C *first, *second;      // or null
  const C *tile, *other;  // other may be null
  const C* coefficients;
  int64_t numel;
  bool aligned;
};

template <class C>
KG_DEVICE void loadShare(const C* from, int64_t at, int count, bool aligned, C (&v)[kPack]) {
  if (aligned && count == kPack) return loadItem<kPack>(from + at, false, kPack, v);
  KG_UNROLL for (int i = 0; i < kPack; i++) v[i] = i < count ? from[at + i] : C(0);
}

template <class C>
KG_DEVICE void addShare(C* to, C factor, const C (&x)[kPack], int64_t at, int count, bool aligned) {
  C sum[kPack];
  loadShare(to, at, count, aligned, sum);
  KG_UNROLL for (int i = 0; i < kPack; i++) sum[i] += factor * x[i];
  if (aligned && count == kPack) return storeItem<kPack>(to + at, kPack, sum);
  KG_UNROLL for (int i = 0; i < kPack; i++) {
    if (i < count) to[at + i] = sum[i];
  }
}

// partials[2][blocks]: squares, products.
template <class C>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void shareKernel(Shares<C> s, double* partials) {
  KG_SHARED(double, shared, kWarp);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kShareBlock;
  const int64_t end = first + kShareBlock < s.numel ? first + kShareBlock : s.numel;
  double square = 0, product = 0;
  KG_LOOP for (int64_t at = first + threadIdx.x * kPack; at < end; at += kItemThreads * kPack) {
    const int count = end - at < kPack ? static_cast<int>(end - at) : kPack;
    C x[kPack], y[kPack] = {};
    loadShare(s.tile, at, count, s.aligned, x);
    if (s.other) loadShare(s.other, at, count, s.aligned, y);
    if (s.first) addShare(s.first, s.coefficients[0], x, at, count, s.aligned);
    if (s.second) addShare(s.second, s.coefficients[1], x, at, count, s.aligned);
    KG_UNROLL for (int i = 0; i < kPack; i++) {
      const double wide = static_cast<double>(x[i]);
      square = ::fma(wide, wide, square);
      product = ::fma(wide, static_cast<double>(y[i]), product);
    }
  }
  square = blockSum(square, shared);
  product = blockSum(product, shared);
  if (threadIdx.x != 0) return;
  partials[blockIdx.x] = square;
  partials[gridDim.x + blockIdx.x] = product;
}

// Block 0 joins squares, block 1 products.
KG_GLOBAL KG_LAUNCH_BOUNDS(1024) void joinShares(double* sums, const double* partials, int64_t blocks) {
  KG_SHARED(double, shared, kWarp);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) sum += partials[blockIdx.x * blocks + i];
  sum = blockSum(sum, shared);
  if (threadIdx.x == 0) sums[blockIdx.x] += sum;
}

template <class C>
void shareGradient(const Call& call) {
  Shares<C> s{};
  C** const outputs[] = {&s.first, &s.second};
  const C** const inputs[] = {&s.tile, &s.other, &s.coefficients};
  s.aligned = true;
  for (int i = 1; i < 6; i++) {
    if (!call[i].present()) continue;
    if (i < 3) *outputs[i - 1] = call[i].ptr<C>();
    if (i >= 3) *inputs[i - 3] = call[i].ptr<C>();
    if (i < 5) s.aligned = s.aligned && reinterpret_cast<uintptr_t>(call[i].data) % 16 == 0;
  }
  s.numel = call[3].numel();
  const int64_t blocks = ceilDiv(s.numel, kShareBlock);
  if (blocks == 0) return;
  auto* partials = static_cast<double*>(scratch(call, static_cast<size_t>(2 * blocks) * sizeof(double)));
  launch(call, {gridOf(blocks), kItemThreads}, shareKernel<C>, s, partials);
  launch(call, {gridOf(2), 1024}, joinShares, call[0].ptr<double>(), partials, blocks);
}

}  // namespace

void kernel_shareGradient(const Call& call) {
  for (int i = 1; i < 6; i++)
    if (call[i].present() && call[i].dtype != call[3].dtype)
      fail("expected tensors of one dtype, found %s and %s", dtypeName(call[3].dtype), dtypeName(call[i].dtype));
  if (call[3].dtype == DType::F32) return shareGradient<float>(call);
  if (call[3].dtype == DType::F64) return shareGradient<double>(call);
  fail("expected float32 or float64, found %s", dtypeName(call[3].dtype));
}

}  // namespace kg::cuda
