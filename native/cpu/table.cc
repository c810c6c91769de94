// The kernel table of one instruction set: every row of the contract, or the library does not link.
#include "cpu/cpu.h"
#include "cpu/vec.h"

namespace kg {
namespace cpu::KG_ISA {
#define KG_KERNEL(name, ...) void kernel_##name(const Call& call);
#define KG_UNARY(name, ...) void kernel_##name(const Call& call);
#define KG_BINARY(name, ...) void kernel_##name(const Call& call);
#define KG_COMPARE(name, ...) void kernel_##name(const Call& call);
#define KG_REDUCE(name, ...) void kernel_##name(const Call& call);
#include "ops/all.def"
}  // namespace cpu::KG_ISA

#define KG_JOIN_(a, b) a##b
#define KG_JOIN(a, b) KG_JOIN_(a, b)
#define KG_TEXT_(a) #a
#define KG_TEXT(a) KG_TEXT_(a)

const KernelTable KG_JOIN(kTable_, KG_ISA) = {KG_TEXT(KG_ISA),
                                              {
#define KG_KERNEL(name, ...) cpu::KG_ISA::kernel_##name,
#define KG_UNARY(name, ...) cpu::KG_ISA::kernel_##name,
#define KG_BINARY(name, ...) cpu::KG_ISA::kernel_##name,
#define KG_COMPARE(name, ...) cpu::KG_ISA::kernel_##name,
#define KG_REDUCE(name, ...) cpu::KG_ISA::kernel_##name,
#include "ops/all.def"
                                              }};

}  // namespace kg
