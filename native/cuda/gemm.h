// Matrix products on the device, through cuBLASLt (cuBLAS is found at run time, see cublas.h).
#pragma once

#include "ops/backend.h"

namespace kg::cuda {

// C[i,j] = alpha * sum_k A(i,k) B(k,j) (+ bias[j]) (+ C[i,j] if accumulate), `batch` times.
// A(i,k) = a[i*aRow + k*aCol], B(k,j) = b[k*bRow + j*bCol], C(i,j) = c[i*cRow + j]; strides in elements.
// in: float32, float64, bfloat16; out: the same, or float32 for bfloat16 inputs. Full float32 products (no TF32).
struct Gemm {
  DType in, out;
  int64_t M, N, K;
  const void* a;
  int64_t aRow, aCol;
  const void* b;
  int64_t bRow, bCol;
  void* c;
  int64_t cRow;
  double alpha = 1;
  bool accumulate = false;
  const void* bias = nullptr;
  int64_t batch = 1, aBatch = 0, bBatch = 0, cBatch = 0;
};
// Enqueues on the call's stream. Uses a workspace of its own, not the call's scratch().
void gemm(const Call& call, const Gemm& product);

}  // namespace kg::cuda
