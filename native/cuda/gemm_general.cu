// Products that cuBLAS cannot take (contract: gemm_general.h). Blocks of 64 x 64 outputs by 256 threads, 4 x 4 each;
// operands pass through shared memory in the compute type, 16 values of k at a time. k ascends: a row has one order of
// summation, whatever M and the batch.
//
// Not meant for large products: on an H100 it is bound by shared memory, 8 loads of 4 bytes for 16 multiply-adds, some
// 20 of the 67 TFLOP/s of float32. What comes here is small or oddly strided: 512^3, 0.27 GFLOP, about 15 us.
// The bias of [4096, 4864] bfloat16 rows before a product (gemmBias): 40 MB written, or 80 read and written with an
// addition each where it is added to what is there: 12 or 24 us at 3.35 TB/s, 15 or 28 expected.
#include "cuda/block.h"
#include "cuda/gemm_general.h"

namespace kg::cuda {

namespace {

constexpr int kTile = 64, kDepth = 16, kThreads = 256, kPerThread = 4;
constexpr int kPadded = kTile + 4;      // of a row in shared memory: 16-byte aligned, off the power of two
constexpr int64_t kMostBlocks = 65535;  // of a grid in y and in z

template <class T, class O>
struct Arguments {
  const T *a, *b, *bias;
  O* c;
  int64_t M, N, K, aRow, aCol, bRow, bCol, cRow;
  compute_t<T> alpha;
  bool accumulate;
  BatchAxes batch;
};

// Where the operands of product number `index` of the batch (in row-major order) begin.
struct Offsets {
  int64_t a = 0, b = 0, c = 0;
};
KG_DEVICE Offsets offsetsOf(const BatchAxes& batch, int64_t index) {
  Offsets o;
  for (int i = batch.axes - 1; i >= 0; i--) {
    const int64_t at = index % batch.size[i];
    index /= batch.size[i];
    o.a += at * batch.a[i];
    o.b += at * batch.b[i];
    o.c += at * batch.c[i];
  }
  return o;
}

// tile[k][i] = x(first + i, k0 + k) with zeros beyond the end; neighbouring threads take neighbouring elements of
// memory.
template <class C, class T>
KG_DEVICE void loadTile(C* tile, const T* x, int64_t first, int64_t count, int64_t stride, int64_t k0, int64_t depth,
                        int64_t kStride) {
  const bool alongDepth = kStride == 1;
  for (int n = static_cast<int>(threadIdx.x); n < kTile * kDepth; n += kThreads) {
    const int i = alongDepth ? n / kDepth : n % kTile, k = alongDepth ? n % kDepth : n / kTile;
    const bool inside = first + i < count && k0 + k < depth;
    tile[k * kPadded + i] = inside ? C(x[(first + i) * stride + (k0 + k) * kStride]) : C(0);
  }
}

// Sums of a product's 64 x 64 outputs from C(firstRow, firstColumn) on: rows 4 (thread / 16).., every 16th column.
template <class T, class O>
KG_DEVICE void sumTile(compute_t<T> (&sum)[kPerThread][kPerThread], const Arguments<T, O>& g, const Offsets& at,
                       int64_t firstRow, int64_t firstColumn) {
  using C = compute_t<T>;
  KG_SHARED(C, a, kDepth * kPadded);
  KG_SHARED(C, b, kDepth * kPadded);
  const int row = static_cast<int>(threadIdx.x) / 16 * kPerThread, column = static_cast<int>(threadIdx.x) % 16;
  for (int64_t k0 = 0; k0 < g.K; k0 += kDepth) {
    loadTile(a, g.a + at.a, firstRow, g.M, g.aRow, k0, g.K, g.aCol);
    loadTile(b, g.b + at.b, firstColumn, g.N, g.bCol, k0, g.K, g.bRow);
    syncThreads();
    KG_UNROLL for (int k = 0; k < kDepth; k++) {
      C x[kPerThread], y[kPerThread];
      KG_UNROLL for (int i = 0; i < kPerThread; i++) x[i] = a[k * kPadded + row + i];
      KG_UNROLL for (int j = 0; j < kPerThread; j++) y[j] = b[k * kPadded + column + 16 * j];
      KG_UNROLL for (int i = 0; i < kPerThread; i++) {
        KG_UNROLL for (int j = 0; j < kPerThread; j++) sum[i][j] += x[i] * y[j];
      }
    }
    syncThreads();
  }
}

template <class T, class O>
KG_DEVICE void storeTile(const compute_t<T> (&sum)[kPerThread][kPerThread], const Arguments<T, O>& g, O* c,
                         int64_t firstRow, int64_t firstColumn) {
  using C = compute_t<T>;
  const int row = static_cast<int>(threadIdx.x) / 16 * kPerThread, column = static_cast<int>(threadIdx.x) % 16;
  KG_UNROLL for (int i = 0; i < kPerThread; i++) {
    const int64_t r = firstRow + row + i;
    if (r >= g.M) break;
    KG_UNROLL for (int j = 0; j < kPerThread; j++) {
      const int64_t n = firstColumn + column + 16 * j;
      if (n >= g.N) break;
      C value = g.alpha * sum[i][j];
      if (g.bias) value += C(g.bias[n]);
      O& out = c[r * g.cRow + n];
      if (g.accumulate) value += C(out);
      out = O(value);
    }
  }
}

// A grid has so many blocks in y and z and no more; beyond, a block has several tiles.
template <class T, class O>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kThreads) generalKernel(Arguments<T, O> g) {
  const int64_t firstColumn = static_cast<int64_t>(blockIdx.x) * kTile, step = static_cast<int64_t>(gridDim.y) * kTile;
  for (int64_t index = blockIdx.z; index < g.batch.count; index += gridDim.z) {
    const Offsets at = offsetsOf(g.batch, index);
    for (int64_t firstRow = static_cast<int64_t>(blockIdx.y) * kTile; firstRow < g.M; firstRow += step) {
      compute_t<T> sum[kPerThread][kPerThread] = {};
      sumTile(sum, g, at, firstRow, firstColumn);
      storeTile(sum, g, g.c + at.c, firstRow, firstColumn);
    }
  }
}

template <class T, class O>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kThreads) biasKernel(O* c, const T* bias, int64_t rows, int64_t columns, int64_t cRow,
                                                     int64_t cBatch, int64_t total, bool accumulate) {
  using C = compute_t<T>;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= total) return;
  const int64_t column = n % columns, row = n / columns;
  O& out = c[row / rows * cBatch + row % rows * cRow + column];
  out = O(accumulate ? C(out) + C(bias[column]) : C(bias[column]));
}

// f(TypeTag of in, TypeTag of out).
template <class F>
void dispatch(const Gemm& g, F f) {
  dispatchFloat(g.in, [&](auto in) {
    using T = typename decltype(in)::type;
    if (g.out == g.in) return f(in, TypeTag<T>{});
    if constexpr (sizeof(T) == sizeof(bf16)) {
      if (g.out == DType::F32) return f(in, TypeTag<float>{});
    }
    fail("[matmul] expected an output of %s%s, found %s; try a cast", dtypeName(g.in),
         g.in == DType::BF16 ? " or float32" : "", dtypeName(g.out));
  });
}

}  // namespace

void gemmGeneral(const Call& call, const Gemm& g, const BatchAxes& batch) {
  const int64_t rows = ceilDiv(g.M, kTile);
  const int64_t y = rows < kMostBlocks ? rows : kMostBlocks, z = batch.count < kMostBlocks ? batch.count : kMostBlocks;
  dispatch(g, [&](auto in, auto out) {
    using T = typename decltype(in)::type;
    using O = typename decltype(out)::type;
    const Arguments<T, O> arguments{static_cast<const T*>(g.a),
                                    static_cast<const T*>(g.b),
                                    static_cast<const T*>(g.bias),
                                    static_cast<O*>(g.c),
                                    g.M,
                                    g.N,
                                    g.K,
                                    g.aRow,
                                    g.aCol,
                                    g.bRow,
                                    g.bCol,
                                    g.cRow,
                                    static_cast<compute_t<T>>(g.alpha),
                                    g.accumulate,
                                    batch};
    launch(call, {gridOf(ceilDiv(g.N, kTile), y, z), kThreads}, generalKernel<T, O>, arguments);
  });
}

void gemmBias(const Call& call, const Gemm& g) {
  const int64_t total = g.batch * g.M * g.N;
  dispatch(g, [&](auto in, auto out) {
    using T = typename decltype(in)::type;
    using O = typename decltype(out)::type;
    launch(call, {gridOf(ceilDiv(total, kThreads)), kThreads}, biasKernel<T, O>, static_cast<O*>(g.c),
           static_cast<const T*>(g.bias), g.M, g.N, g.cRow, g.cBatch, total, g.accumulate);
  });
}

}  // namespace kg::cuda
