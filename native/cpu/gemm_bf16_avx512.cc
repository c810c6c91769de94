// The bfloat16 matrix product by vdpbf16ps: compiled once, for AVX512_BF16, and called only where the processor has it.
// Elsewhere on x86-64 and on other architectures this file is empty or idle.
#ifdef __AVX512BF16__
#undef KG_ISA
#define KG_ISA avx512bf16

#include "cpu/gemm_kernel_driver.h"

namespace kg::cpu::avx512bf16 {

bool supported() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}

void gemmBf16(const Gemm& g) {
  if (g.out == DType::BF16) return GemmDriver<GemmBf16Dot, bf16>(g).run();
  GemmDriver<GemmBf16Dot, float>(g).run();
}

}  // namespace kg::cpu::avx512bf16
#endif
