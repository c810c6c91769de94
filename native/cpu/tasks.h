// When a loop of independent tasks is worth several threads. Owns no kernel.
#pragma once

#include "cpu/fused.h"

namespace kg::cpu::KG_ISA {

// fn(begin, end) over [0, tasks), each task working on `elements` elements; on this thread alone where there is little.
template <class F>
KG_INLINE void forTasks(int64_t tasks, int64_t elements, const F& fn) {
  const int64_t grain = rowGrain(elements);
  if (tasks <= grain) {
    if (tasks > 0) fn(0, tasks);
    return;
  }
  parallelFor(tasks, grain, [&fn](int64_t begin, int64_t end, int) { fn(begin, end); });
}

}  // namespace kg::cpu::KG_ISA
