// The matmul kernel: batches of products on top of gemm. Merges batch axes into rows where strides allow it and chooses
// whether threads share one product or take products of their own. Never touches elements itself.
#include "cpu/gemm.h"
#include "ops/backend.h"
#include "runtime/error.h"
#include "runtime/threads.h"

namespace kg::cpu::KG_ISA {
namespace {

constexpr int kMaxBatch = kMaxDims - 2;
constexpr int64_t kSharedWork = 1 << 21;  // M * N * K from which threads share one product
constexpr int64_t kCallWork = 1 << 12;    // what calling gemm costs, in the same unit

// Batch axes of the three tensors, those of length 1 left out.
struct Batch {
  int axes = 0;
  int64_t size[kMaxBatch], out[kMaxBatch], a[kMaxBatch], b[kMaxBatch];
  int64_t count = 1;
};

Batch batchOf(const TensorView& out, const TensorView& a, const TensorView& b) {
  Batch batch;
  for (int i = 0; i < out.ndim - 2; i++) {
    batch.count *= out.shape[i];
    if (out.shape[i] == 1) continue;
    const int n = batch.axes++;
    batch.size[n] = out.shape[i];
    batch.out[n] = out.strides[i];
    batch.a[n] = a.shape[i] == 1 ? 0 : a.strides[i];
    batch.b[n] = b.shape[i] == 1 ? 0 : b.strides[i];
  }
  return batch;
}

// Trailing batch axes that share one B and continue the rows of A and C are rows: [B, T, K] @ [K, N] is one product.
void mergeRows(Batch& batch, Gemm& g) {
  while (batch.axes > 0) {
    const int n = batch.axes - 1;
    const bool rows = g.M == 1 || (batch.out[n] == g.M * g.cRow && batch.a[n] == g.M * g.aRow);
    if (batch.b[n] != 0 || !rows) return;
    if (g.M == 1) {
      g.cRow = batch.out[n];
      g.aRow = batch.a[n];
    }
    g.M *= batch.size[n];
    batch.count /= batch.size[n];
    batch.axes = n;
  }
}

// The product number `index` of the batch, in row-major order.
Gemm member(const Gemm& g, const Batch& batch, int64_t index) {
  int64_t out = 0, a = 0, b = 0;
  for (int i = batch.axes - 1; i >= 0; i--) {
    const int64_t at = index % batch.size[i];
    index /= batch.size[i];
    out += at * batch.out[i];
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
  const bool gram = out.ndim == 2 && a.data == b.data && g.M == g.N && g.aRow == g.bCol && g.aCol == g.bRow;
  g.symmetric = gram && !g.accumulate && !g.bias && out.dtype != DType::BF16;
  Batch batch = batchOf(out, a, b);
  if (g.M == 0 || g.N == 0 || batch.count == 0) return;
  mergeRows(batch, g);
  if (batch.count == 1) return gemm(g);
  const int64_t work = g.M * g.N * (g.K > 0 ? g.K : 1);
  if (work >= kSharedWork && batch.count < 4 * threadCount()) {
    for (int64_t i = 0; i < batch.count; i++) gemm(member(g, batch, i));
    return;
  }
  parallelFor(batch.count, (1 << 17) / (work + kCallWork) + 1, [&](int64_t from, int64_t to, int) {
    for (int64_t i = from; i < to; i++) gemm(member(g, batch, i));
  });
}

}  // namespace kg::cpu::KG_ISA
