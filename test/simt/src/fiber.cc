#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace simt {

#if defined(__x86_64__)
// Only what the ABI asks a callee to keep; 12 instructions, about 2 ns.
asm(R"(
  .text
  .globl simtSwitchStacks
  .hidden simtSwitchStacks
  .type simtSwitchStacks, @function
simtSwitchStacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simtSwitchStacks, .-simtSwitchStacks
)");

void prepareContext(Context& context, char* bottom, size_t size, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>(bottom + size);
  *--top = 0;  // where a caller's return address would be: ends backtraces
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; i++) *--top = 0;
  context.stackPointer = top;
}
#else
void prepareContext(Context& context, char* bottom, size_t size, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = bottom;
  context.registers.uc_stack.ss_size = size;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}
#endif

namespace {

constexpr size_t kGuardBytes = 4096 * 4;
constexpr size_t kStride = kStackBytes + kGuardBytes;
constexpr size_t kLead = 16 << 20;  // without rights, for large steps below the first stack
constexpr size_t kReserved = kLead + kStride * kStacks;

char* reserveStacks() {
  void* memory = mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    fprintf(stderr, "simt: no address space for the stacks of fibers\n");
    abort();
  }
  return static_cast<char*>(memory);
}

char* stacks = nullptr;
bool opened[kStacks];

}  // namespace

char* stackBottom(int index) {
  if (!stacks) stacks = reserveStacks();
  char* bottom = stacks + kLead + index * kStride + kGuardBytes;
  if (!opened[index]) {
    mprotect(bottom, kStackBytes, PROT_READ | PROT_WRITE);
    opened[index] = true;
  }
  return bottom;
}

bool inStacks(const void* address) {
  const char* at = static_cast<const char*>(address);
  return stacks && at >= stacks && at < stacks + kReserved;
}

}  // namespace simt
