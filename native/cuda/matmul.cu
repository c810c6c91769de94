// The matmul kernel: batches of products on top of gemm(). Merges batch axes into rows and into each other where
// strides allow it, gives one batch axis to cuBLAS, and repeats it over the others. Never touches elements itself.
//
// H100 (989 TFLOP/s bfloat16, some 700 of them within reach of a matrix product), Qwen2.5-0.5B, 4096 tokens:
//   [4096, 896] x [4864, 896]^T    35.7 GFLOP   36 us at full rate, 51 us at 700     (55 MB: 16 us)
//   [4096, 896] x [896, 896]^T      6.6 GFLOP    7 us                9 us            (16 MB:  5 us)
// A call spends some 4 us on the host, most of it in cuBLASLt; building its key and finding its plan takes 0.2 us.
#include "cuda/block.h"
#include "cuda/gemm_general.h"

namespace kg::cuda {

namespace {

// Products are repeated on the host up to this many times; beyond, small ones go through one launch of our own kernel.
constexpr int64_t kMostLaunches = 64;
constexpr int64_t kLargeProduct = int64_t(1) << 22;  // M * N * K of what cuBLAS does in one launch

// Batch axes of the three tensors, those of length 1 left out; an axis that continues the one before it in all three
// is merged into that one.
BatchAxes batchOf(const TensorView& out, const TensorView& a, const TensorView& b) {
  BatchAxes batch;
  for (int i = 0; i < out.ndim - 2; i++) {
    batch.count *= out.shape[i];
    if (out.shape[i] == 1) continue;
    const int64_t size = out.shape[i], c = out.strides[i];
    const int64_t x = a.shape[i] == 1 ? 0 : a.strides[i], y = b.shape[i] == 1 ? 0 : b.strides[i];
    int n = batch.axes - 1;
    const bool merges = n >= 0 && batch.c[n] == size * c && batch.a[n] == size * x && batch.b[n] == size * y;
    if (!merges) {
      n = batch.axes++;
      batch.size[n] = 1;
    }
    batch.size[n] *= size;
    batch.a[n] = x;
    batch.b[n] = y;
    batch.c[n] = c;
  }
  return batch;
}

void removeAxis(BatchAxes& batch, int axis) {
  batch.count /= batch.size[axis];
  batch.axes--;
  for (int i = axis; i < batch.axes; i++) {
    batch.size[i] = batch.size[i + 1];
    batch.a[i] = batch.a[i + 1];
    batch.b[i] = batch.b[i + 1];
    batch.c[i] = batch.c[i + 1];
  }
}

// Trailing batch axes that share one B and continue the rows of A and C are rows: [B, T, K] @ [K, N] is one product.
void mergeRows(BatchAxes& batch, Gemm& g) {
  while (batch.axes > 0) {
    const int n = batch.axes - 1;
    const bool rows = g.M == 1 || (batch.c[n] == g.M * g.cRow && batch.a[n] == g.M * g.aRow);
    if (batch.b[n] != 0 || !rows) return;
    if (g.M == 1) {
      g.cRow = batch.c[n];
      g.aRow = batch.a[n];
    }
    g.M *= batch.size[n];
    removeAxis(batch, n);
  }
}

// The longest axis becomes the Gemm's own batch.
void takeAxis(BatchAxes& batch, Gemm& g) {
  if (batch.axes == 0) return;
  int longest = 0;
  for (int i = 1; i < batch.axes; i++)
    if (batch.size[i] > batch.size[longest]) longest = i;
  g.batch = batch.size[longest];
  g.aBatch = batch.a[longest];
  g.bBatch = batch.b[longest];
  g.cBatch = batch.c[longest];
  removeAxis(batch, longest);
}

// The product number `index` over the axes that are left, in row-major order.
Gemm member(const Gemm& g, const BatchAxes& batch, int64_t index) {
  int64_t out = 0, a = 0, b = 0;
  for (int i = batch.axes - 1; i >= 0; i--) {
    const int64_t at = index % batch.size[i];
    index /= batch.size[i];
    out += at * batch.c[i];
    a += at * batch.a[i];
    b += at * batch.b[i];
  }
  const int64_t in = static_cast<int64_t>(dtypeSize(g.in));
  Gemm one = g;
  one.c = static_cast<char*>(g.c) + out * static_cast<int64_t>(dtypeSize(g.out));
  one.a = static_cast<const char*>(g.a) + a * in;
  one.b = static_cast<const char*>(g.b) + b * in;
  return one;
}

void check(const TensorView& out, const TensorView& a, const TensorView& b, const TensorView& bias) {
  if (out.ndim < 2 || out.ndim > kMaxDims || a.ndim != out.ndim || b.ndim != out.ndim)
    fail("[matmul] expected 2 to %d axes, as many in every tensor, found %d @ %d -> %d; try a reshape", kMaxDims,
         a.ndim, b.ndim, out.ndim);
  if (a.dtype != b.dtype || (bias.present() && bias.dtype != a.dtype))
    fail("[matmul] expected one dtype, found %s and %s (bias: %s); try a cast", dtypeName(a.dtype), dtypeName(b.dtype),
         dtypeName(bias.dtype));
  if (out.dtype != a.dtype && !(a.dtype == DType::BF16 && out.dtype == DType::F32))
    fail("[matmul] expected an output of the inputs' dtype %s, found %s; try a cast", dtypeName(a.dtype),
         dtypeName(out.dtype));
  if (a.size(-2) != out.size(-2) || b.size(-1) != out.size(-1) || a.size(-1) != b.size(-2))
    fail(
        "[matmul] expected [M, K] @ [K, N] -> [M, N], found [%lld, %lld] @ [%lld, %lld] -> [%lld, %lld]; try a "
        "transpose",
        static_cast<long long>(a.size(-2)), static_cast<long long>(a.size(-1)), static_cast<long long>(b.size(-2)),
        static_cast<long long>(b.size(-1)), static_cast<long long>(out.size(-2)), static_cast<long long>(out.size(-1)));
  if (out.size(-1) > 1 && out.stride(-1) != 1)
    fail("[matmul] expected an output with contiguous rows, found a last stride of %lld; try a contiguous output",
         static_cast<long long>(out.stride(-1)));
}

}  // namespace

void kernel_matmul(const Call& call) {
  const TensorView &out = call[0], &a = call[1], &b = call[2], &bias = call[3];
  check(out, a, b, bias);
  Gemm g{a.dtype,        out.dtype,    out.size(-2),         out.size(-1),
         a.size(-1),     a.data,       a.stride(-2),         a.stride(-1),
         b.data,         b.stride(-2), b.stride(-1),         out.data,
         out.stride(-2), call.attr(0), call.intAttr(1) != 0, bias.present() ? bias.data : nullptr};
  BatchAxes batch = batchOf(out, a, b);
  if (g.M == 0 || g.N == 0 || batch.count == 0) return;
  mergeRows(batch, g);
  const BatchAxes all = batch;
  takeAxis(batch, g);
  if (batch.count > kMostLaunches && g.batch * g.M * g.N * g.K < kLargeProduct) return gemmGeneral(call, g, all);
  for (int64_t i = 0; i < batch.count; i++) gemm(call, member(g, batch, i));
}

}  // namespace kg::cuda
