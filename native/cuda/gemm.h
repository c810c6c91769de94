// Matrix products on the device, through cuBLASLt (found at run time, see cublas.h). What cuBLAS cannot take goes
// through a kernel of our own (gemm_general.h): neither is ever an error, and neither reads anything on the host.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/backend.h"

namespace kg::cuda {

// C[i,j] = alpha * sum_k A(i,k) B(k,j) (+ bias[j]) (+ C[i,j] if accumulate), `batch` times.
// A(i,k) = a[i*aRow + k*aCol], B(k,j) = b[k*bRow + j*bCol], C(i,j) = c[i*cRow + j]; strides in elements.
// in: float32, float64, bfloat16; out: the same, or float32 for bfloat16 inputs. Full float32 products (no TF32).
//
// Two calls of equal shape, strides and alignment (of 16 bytes) give equal bits, in any process on the same kind of
// device with the same cuBLAS. cuBLAS would choose its algorithm by the whole shape, and a row's bits would depend on
// the rows around it. So products whose A has rows of unit stride (tokens, as a rule) are computed by the algorithm for
// `planRows` rows and no batch, without split-K, whatever M and `batch` are: equal rows have equal bits in all products
// that differ in M and batch alone, from M = 1 on. That costs a product of far fewer rows some of its rate, as the
// tiles are those of a large one. The exceptions are counted: unplannedProducts().
// Where A's columns have unit stride (weight gradients), and with planRows = 0, the shape decides, rounded up to five
// significant bits along tokens, and split-K is allowed.
constexpr int64_t kPlanRows = 4096;
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
  const void* bias = nullptr;  // [N], of the inputs' dtype
  int64_t batch = 1, aBatch = 0, bBatch = 0, cBatch = 0;
  int64_t planRows = kPlanRows;
};
// Enqueues on the call's stream. Uses a workspace of its own, not the call's scratch().
void gemm(const Call& call, const Gemm& product);

// Device bytes that products hold for a stream, once it has multiplied anything.
constexpr size_t kGemmWorkspaceBytes = size_t(32) << 20;
// Gives back a stream's workspace and everything that products remember of it. After the stream is drained, on its
// device, before it is destroyed.
void releaseGemm(cudaStream_t stream);

}  // namespace kg::cuda
