// Products that cuBLAS cannot take, by a tiled kernel of our own: any strides (0 included), any number of batch axes,
// K = 0. And the rows of a bias written before a product adds to them.
#pragma once

#include "cuda/gemm.h"

namespace kg::cuda {

struct BatchAxes {
  int axes = 0;
  int64_t count = 1;                                              // of all axes together
  int64_t size[kMaxDims], a[kMaxDims], b[kMaxDims], c[kMaxDims];  // c: strides of the output
};

// The product once for every index of `batch`; the Gemm's own batch is not looked at.
void gemmGeneral(const Call& call, const Gemm& product, const BatchAxes& batch);

// C[i,j] = bias[j] (+ C[i,j] if accumulate), for every product of the Gemm's batch.
void gemmBias(const Call& call, const Gemm& product);

}  // namespace kg::cuda
