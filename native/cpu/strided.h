// Walking several strided views of one shape together: equal and mergeable axes are folded first, then the flat index
// space is cut into runs along the innermost axis. Knows no arithmetic: kernels supply a function for one run.
#pragma once

#include "ops/backend.h"

namespace kg::cpu::KG_ISA {

constexpr int kMaxOperands = 4;

// Views of one shape, the output first, after folding: ndim >= 1 and no axis of length 1 unless it is the only one.
struct Walk {
  int ndim;
  int operands;
  int64_t numel;
  int64_t shape[kMaxDims];
  int64_t strides[kMaxOperands][kMaxDims];
  char* data[kMaxOperands];
  int32_t elementSize[kMaxOperands];

  KG_INLINE int64_t inner() const { return shape[ndim - 1]; }
  KG_INLINE int64_t innerStride(int operand) const { return strides[operand][ndim - 1]; }
};

// Axes are ordered by falling stride of the output, so that it is written in memory order. Fails on unequal shapes.
Walk makeWalk(const TensorView* const* views, int count);

// Works on n elements that lie one after another, but for inputs whose bit is set in `broadcast`: those are one
// element.
using BlockFn = void (*)(void* out, const void* const* in, int64_t n, int broadcast);

// Runs `block` over the whole walk, on several threads where there is more than `grain` to do. Inputs named by
// `mayBroadcast` reach the block as single elements where their innermost stride is 0; any other stride than 1 goes
// through a small buffer.
void runBlocks(const Walk& walk, BlockFn block, int64_t grain, int mayBroadcast);

// n elements between strided memory and a buffer. Strides in elements; sizes 1, 2, 4 and 8.
void gatherStrided(void* buffer, const char* from, int64_t stride, int64_t n, int elementSize);
void scatterStrided(char* to, int64_t stride, const void* buffer, int64_t n, int elementSize);

}  // namespace kg::cpu::KG_ISA
