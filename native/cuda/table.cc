// The CUDA kernel table: every row of the contract, or the library does not link. With KG_PARTIAL a row without a
// kernel is null, and calling it is an error that names the op: for builds of a part.
#include "cuda/backend.h"

#ifdef KG_PARTIAL
#define KG_ROW __attribute__((weak))
#else
#define KG_ROW
#endif

namespace kg::cuda {

#define KG_KERNEL(name, ...) KG_ROW void kernel_##name(const Call& call);
#define KG_UNARY(name, ...) KG_ROW void kernel_##name(const Call& call);
#define KG_BINARY(name, ...) KG_ROW void kernel_##name(const Call& call);
#define KG_COMPARE(name, ...) KG_ROW void kernel_##name(const Call& call);
#define KG_REDUCE(name, ...) KG_ROW void kernel_##name(const Call& call);
#include "ops/all.def"

// The one row without a kernel yet: second derivatives of attention (SPO's regularizer) are an error here that names
// it.
__attribute__((weak)) void kernel_attentionTangent(const Call& call);

const KernelTable& kernels() {
  static const KernelTable table = {"CUDA",
                                    {
#define KG_KERNEL(name, ...) kernel_##name,
#define KG_UNARY(name, ...) kernel_##name,
#define KG_BINARY(name, ...) kernel_##name,
#define KG_COMPARE(name, ...) kernel_##name,
#define KG_REDUCE(name, ...) kernel_##name,
#include "ops/all.def"
                                    }};
  return table;
}

}  // namespace kg::cuda
