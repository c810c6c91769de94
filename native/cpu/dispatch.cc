// Chooses the kernel table by CPUID features, never by model names.
#include <cstdlib>
#include <cstring>

#include "cpu/cpu.h"
#include "runtime/device.h"
#include "runtime/error.h"

namespace kg {
namespace {

#if defined(__x86_64__)
bool hasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool hasAvx512() {
  return hasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const KernelTable& choose() {
  const char* wanted = getenv("KEELGRAD_ISA");
  auto admits = [&](const char* isa) { return !wanted || !*wanted || strcmp(wanted, isa) == 0; };
#if defined(__x86_64__)
  if (hasAvx512() && admits("avx512")) return kTable_avx512;
  if (hasAvx2() && admits("avx2")) return kTable_avx2;
#endif
  if (admits("base")) return kTable_base;
  fail("KEELGRAD_ISA=%s is not an instruction set of this processor and build; expected avx512, avx2 or base", wanted);
}

}  // namespace

const KernelTable& cpuKernels() {
  static const KernelTable& table = choose();
  return table;
}

std::vector<std::string> cpuFeatures() {
  std::vector<std::string> names;
#if defined(__x86_64__)
#define KG_FEATURE(f) \
  if (__builtin_cpu_supports(f)) names.push_back(f)
  KG_FEATURE("avx2");
  KG_FEATURE("fma");
  KG_FEATURE("avx512f");
  KG_FEATURE("avx512bw");
  KG_FEATURE("avx512vl");
  KG_FEATURE("avx512bf16");
#undef KG_FEATURE
#elif defined(__aarch64__)
  names.push_back("neon");
#endif
  return names;
}

}  // namespace kg
