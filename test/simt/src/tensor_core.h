// ldmatrix and mma.sync for the 32 lanes of a warp at once, by the lane layouts of the PTX ISA.
#pragma once

#include <cstdint>

namespace simt {

// mma: d[4], a[4], b[2]. Matrix load: a[4] is written, row[8] is what the lane points at.
struct LaneOperands {
  float* d = nullptr;
  uint32_t* a = nullptr;
  const uint32_t* b = nullptr;
  const uint16_t* row = nullptr;
  bool transposed = false;
};

void distributeMatrices(LaneOperands* const* lanes);  // ldmatrix.x4, .trans where the lanes say so
void multiplyTile(LaneOperands* const* lanes);        // mma.m16n8k16.row.col, bf16 operands, float32 accumulators

}  // namespace simt
