// Switching between stacks of one OS thread. Knows no CUDA.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

// A suspended flow of control.
struct Context {
#if defined(__x86_64__)
  void* stackPointer = nullptr;
#else
  ucontext_t registers;
#endif
};

// Makes `context` start `entry` (which never returns) on the stack that ends at `top`.
void prepareContext(Context& context, char* bottom, size_t size, void (*entry)());

#if defined(__x86_64__)
extern "C" void simtSwitchStacks(void** save, void* load);
inline void switchContext(Context& from, Context& to) { simtSwitchStacks(&from.stackPointer, to.stackPointer); }
#else
inline void switchContext(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }
#endif

// Stacks of kStackBytes with a guard page below, made once and kept.
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kStacks = 2048;
char* stackBottom(int index);
// Is the address in the range of the stacks? A fault there means that one is used up.
bool inStacks(const void* address);

}  // namespace simt
