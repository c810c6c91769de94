// sequenceGradient: one sequence's gradient of a linear's weight, and what is wanted of it: its square, its product
// with another, and its shares in two accumulated gradients. The gradient comes from gemm(), into the tile or scratch
// memory, and is looked at once more.
//
// Sums have one order: a thread block takes 8,192 elements, thread t its packs t, t + 256, ... in float64, threads are
// joined by trees, blocks likewise by a second kernel. Whether memory is aligned changes accesses alone.
//
// Roofline of the second look (H100, 3.35 TB/s), float32 with everything present: tile and other are read, first and
// second read and written: 24 bytes an element. 4864 x 896 (an MLP's matrix of Qwen2.5-0.5B): 105 MB: 31 us. Two
// float64 products an element: 8.7 M / 34e12: nothing. The product, 256 rows in bfloat16: 2.2 GFLOP, 17 MB written: 5
// us.
#include "cuda/gemm.h"
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

// partials[2][blocks]: squares, products; or null.
template <class C>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void shareKernel(Shares<C> s, double* partials) {
  KG_SHARED(double, shared, kWarp);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kShareBlock;
  const int64_t end = first + kShareBlock < s.numel ? first + kShareBlock : s.numel;
  double square = 0, product = 0;
  KG_UNROLL_BY(1) for (int64_t at = first + threadIdx.x * kPack; at < end; at += kItemThreads * kPack) {
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
  if (!partials) return;
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

bool isAligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class C>
void shareOut(const Call& call, const void* tile, int64_t numel, double* partials) {
  const Shares<C> s{static_cast<C*>(call[1].data),
                    static_cast<C*>(call[2].data),
                    static_cast<const C*>(tile),
                    static_cast<const C*>(call[6].data),
                    static_cast<const C*>(call[7].data),
                    numel,
                    isAligned(call[1].data) && isAligned(call[2].data) && isAligned(call[6].data) && isAligned(tile)};
  const int64_t blocks = ceilDiv(numel, kShareBlock);
  launch(call, {gridOf(blocks), kItemThreads}, shareKernel<C>, s, partials);
  if (partials) launch(call, {gridOf(2), 1024}, joinShares, call[0].ptr<double>(), partials, blocks);
}

void check(const Call& call, DType wide, int64_t numel) {
  const TensorView &g = call[4], &x = call[5];
  if (g.ndim != 2 || x.ndim != 2 || g.dtype != x.dtype || g.size(0) != x.size(0))
    fail("expected rows g [T, O] and x [T, I] of one dtype, found %s [%lld, %lld], %s [%lld, %lld]", dtypeName(g.dtype),
         static_cast<long long>(g.size(0)), static_cast<long long>(g.size(-1)), dtypeName(x.dtype),
         static_cast<long long>(x.size(0)), static_cast<long long>(x.size(-1)));
  for (int i : {1, 2, 3, 6, 7}) {
    const int64_t wanted = i == 7 ? 2 : numel;
    if (call[i].present() && (call[i].dtype != wide || call[i].numel() != wanted || !call[i].contiguous()))
      fail("expected contiguous %s of %lld numbers, found %s of %lld", dtypeName(wide), static_cast<long long>(wanted),
           dtypeName(call[i].dtype), static_cast<long long>(call[i].numel()));
  }
  if ((call[1].present() || call[2].present()) && !call[7].present())
    fail("expected coefficients where shares are wanted, found none");
}

}  // namespace

void kernel_sequenceGradient(const Call& call) {
  const TensorView &tile = call[3], &g = call[4], &x = call[5];
  const DType wide = g.dtype == DType::BF16 ? DType::F32 : g.dtype;
  const int64_t rows = g.size(0), out = g.size(-1), in = x.size(-1), numel = out * in;
  check(call, wide, numel);
  const bool summed = call[0].present(), shared = rows > 0 && (summed || call[1].present() || call[2].present());
  if (numel == 0 || (!shared && !tile.present())) return;
  // Scratch memory: the tile where it is wanted nowhere, then partial sums.
  const size_t tileBytes = tile.present() ? 0 : (static_cast<size_t>(numel) * dtypeSize(wide) + 63) / 64 * 64;
  const size_t sumBytes = summed ? static_cast<size_t>(2 * ceilDiv(numel, kShareBlock)) * sizeof(double) : 0;
  char* memory = tileBytes + sumBytes > 0 ? static_cast<char*>(scratch(call, tileBytes + sumBytes)) : nullptr;
  void* to = tile.present() ? tile.data : memory;
  gemm(call,
       {g.dtype, wide, out, in, rows, g.data, g.stride(1), g.stride(0), x.data, x.stride(0), x.stride(1), to, in});
  if (!shared) return;
  auto* partials = summed ? reinterpret_cast<double*>(memory + tileBytes) : nullptr;
  if (wide == DType::F32) return shareOut<float>(call, to, numel, partials);
  shareOut<double>(call, to, numel, partials);
}

}  // namespace kg::cuda
