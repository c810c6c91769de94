// The CUDA kernel table: every row of the contract, or the library does not link.
#include "cuda/backend.h"

namespace kg::cuda {

#define KG_KERNEL(name, ...) void kernel_##name(const Call& call);
#define KG_UNARY(name, ...) void kernel_##name(const Call& call);
#define KG_BINARY(name, ...) void kernel_##name(const Call& call);
#define KG_COMPARE(name, ...) void kernel_##name(const Call& call);
#define KG_REDUCE(name, ...) void kernel_##name(const Call& call);
#include "ops/all.def"

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
