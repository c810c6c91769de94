// Scratch memory of the matrix product: a few buffers a thread, kept and grown on demand. Private to the including
// file.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "runtime/dtype.h"
#include "runtime/error.h"

namespace kg::cpu::KG_ISA {
namespace {

enum class GemmSlot { a, panel, shared, partial, wide, rest, sums, count };

class GemmArena {
 public:
  ~GemmArena() {
    for (auto& s : slots_) free(s.memory);
  }

  void* get(GemmSlot slot, size_t bytes) {
    Slot& s = slots_[static_cast<int>(slot)];
    if (s.bytes < bytes) grow(s, bytes);
    return s.memory;
  }

 private:
  struct Slot {
    void* memory = nullptr;
    size_t bytes = 0;
  };

  static void grow(Slot& s, size_t bytes) {
    constexpr size_t huge = 2u << 20;
    const size_t unit = bytes >= huge / 2 ? huge : 4096;
    const size_t rounded = (bytes + bytes / 4 + unit - 1) / unit * unit;
    free(s.memory);
    s.memory = aligned_alloc(unit, rounded);
    s.bytes = s.memory ? rounded : 0;
    if (!s.memory) fail("[matmul] expected %zu bytes of scratch memory, found none free; try smaller batches", rounded);
#ifdef MADV_HUGEPAGE
    if (unit == huge) madvise(s.memory, rounded, MADV_HUGEPAGE);
#endif
  }

  Slot slots_[static_cast<int>(GemmSlot::count)];
};

thread_local GemmArena gemmArena;

// At least `count` elements, 64-byte aligned; valid until this thread asks for the slot again.
template <class T>
KG_INLINE T* workspace(GemmSlot slot, int64_t count) {
  return static_cast<T*>(gemmArena.get(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace
}  // namespace kg::cpu::KG_ISA
