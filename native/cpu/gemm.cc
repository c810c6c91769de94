// Entry of the matrix product for one instruction set: chooses by dtype, no more.
#include "cpu/gemm.h"

#include "cpu/gemm_kernel_driver.h"
#include "runtime/error.h"

#ifdef __AVX512F__
namespace kg::cpu::avx512bf16 {
bool supported();
void gemmBf16(const Gemm& g);
}  // namespace kg::cpu::avx512bf16
#endif

namespace kg::cpu::KG_ISA {

void gemm(const Gemm& g) {
  if (g.M <= 0 || g.N <= 0) return;
  if (g.in == DType::F32 && g.out == DType::F32) return GemmDriver<GemmPlain<float>, float>(g).run();
  if (g.in == DType::F64 && g.out == DType::F64) return GemmDriver<GemmPlain<double>, double>(g).run();
  if (g.in != DType::BF16 || (g.out != DType::BF16 && g.out != DType::F32))
    fail("[matmul] expected float32, float64 or bfloat16 (to bfloat16 or float32), found %s to %s; try a cast",
         dtypeName(g.in), dtypeName(g.out));
#ifdef __AVX512F__
  if (avx512bf16::supported()) return avx512bf16::gemmBf16(g);
#endif
  if (g.out == DType::BF16) return GemmDriver<GemmBf16, bf16>(g).run();
  return GemmDriver<GemmBf16, float>(g).run();
}

}  // namespace kg::cpu::KG_ISA
