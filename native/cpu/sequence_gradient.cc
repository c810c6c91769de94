// One sequence's gradient of a linear's weight, looked at where it is formed: its square, its product with another, and
// its shares in two accumulated gradients. The product's own loops do it (cpu/gemm_kernel_shares.h); here are checks.
#include "cpu/gemm.h"
#include "ops/backend.h"
#include "runtime/error.h"

namespace kg::cpu::KG_ISA {
namespace {

void check(const Call& call, DType sums, int64_t rows, int64_t columns) {
  const TensorView &g = call[4], &x = call[5];
  if (g.ndim != 2 || x.ndim != 2 || g.dtype != x.dtype || g.size(0) != x.size(0))
    fail("[sequenceGradient] expected rows g [T, O] and x [T, I] of one dtype, found %s [%lld, %lld], %s [%lld, %lld]",
         dtypeName(g.dtype), static_cast<long long>(g.size(0)), static_cast<long long>(g.size(-1)), dtypeName(x.dtype),
         static_cast<long long>(x.size(0)), static_cast<long long>(x.size(-1)));
  for (int i : {1, 2, 3, 6, 7}) {
    const int64_t numel = i == 7 ? 2 : rows * columns;
    if (call[i].present() && (call[i].dtype != sums || call[i].numel() != numel || !call[i].contiguous()))
      fail("[sequenceGradient] expected contiguous %s of %lld numbers, found %s of %lld", dtypeName(sums),
           static_cast<long long>(numel), dtypeName(call[i].dtype), static_cast<long long>(call[i].numel()));
  }
  if ((call[1].present() || call[2].present()) && !call[7].present())
    fail("[sequenceGradient] expected coefficients where shares are wanted, found none");
}

}  // namespace

void kernel_sequenceGradient(const Call& call) {
  const TensorView &g = call[4], &x = call[5];
  const DType wide = g.dtype == DType::BF16 ? DType::F32 : g.dtype;
  const int64_t out = g.size(-1), in = x.size(-1), rows = g.size(0);
  check(call, wide, out, in);
  const GemmShares shares{call[0].present() ? call[0].ptr<double>() : nullptr, call[6].data, call[1].data, call[2].data,
                          call[7].data};
  Gemm product{g.dtype,     wide,   out,         in,          rows,         g.data, g.stride(1),
               g.stride(0), x.data, x.stride(0), x.stride(1), call[3].data, in};
  const bool shared = shares.sums || shares.first || shares.second;
  if (rows > 0 && shared) product.shares = &shares;
  if (product.shares || product.c) gemm(product);
}

}  // namespace kg::cpu::KG_ISA
