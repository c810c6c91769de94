// The process-wide pool of compute threads, shared by every stream and every Node worker thread.
//
// Work is split by index ranges that do not depend on the number of threads unless the caller makes them so; a kernel
// whose result must not depend on the thread count gives each task its own output.
#pragma once

#include <cstdint>

#include "runtime/dtype.h"

namespace kg {

// Number of threads that parallelFor uses, the calling one included (>= 1).
int threadCount();
// Sets it (1..256). Takes effect at the next parallel region. Default: hardware threads this process may use.
void setThreadCount(int n);

using RangeFn = void (*)(void* context, int64_t begin, int64_t end, int worker);
// Calls fn over disjoint ranges that cover [0, n), at least `grain` indices each (the last may be shorter), on up to
// threadCount() threads; returns when all are done. `worker` is in [0, threadCount()) and unique among ranges that
// run at the same time. Ranges are handed out dynamically. Nested calls run serially on the calling thread with the
// caller's worker number. An exception thrown by fn is rethrown here.
void parallelForRaw(int64_t n, int64_t grain, RangeFn fn, void* context);

// parallelFor(n, grain, [&](int64_t begin, int64_t end, int worker) { ... })
template <class F>
KG_INLINE void parallelFor(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  struct Trampoline {
    static void run(void* c, int64_t b, int64_t e, int w) { (*static_cast<const F*>(c))(b, e, w); }
  };
  parallelForRaw(n, grain, &Trampoline::run, const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace kg
