// What the sanitizers must be told about memory that is not there and about stacks that are switched by hand. Nothing
// where none is on.
#pragma once

#include <cstddef>
#include <cstring>

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {

#if defined(SIMT_ASAN)
inline void poison(void* at, size_t bytes) { __asan_poison_memory_region(at, bytes); }
inline void unpoison(void* at, size_t bytes) { __asan_unpoison_memory_region(at, bytes); }
#else
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
#endif

#if defined(SIMT_TSAN)
constexpr bool kRaceDetector = true;
inline void happensBefore(void* key) { __tsan_release(key); }
inline void happensAfter(void* key) { __tsan_acquire(key); }
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
// Fills by the layer are nobody's writes.
inline void fill(void* at, int value, size_t bytes) {
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  memset(at, value, bytes);
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
}
#else
constexpr bool kRaceDetector = false;
inline void happensBefore(void*) {}
inline void happensAfter(void*) {}
inline void fill(void* at, int value, size_t bytes) { memset(at, value, bytes); }
#endif

}  // namespace simt
