// The CPU backend's kernel tables, one an instruction set.
#pragma once

#include "ops/backend.h"

namespace kg {
#if defined(__x86_64__)
extern const KernelTable kTable_avx512;
extern const KernelTable kTable_avx2;
#endif
extern const KernelTable kTable_base;
}  // namespace kg
