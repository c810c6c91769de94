// Matrix product of strided matrices: what matmul, attention and the vocabulary head are built on.
// Never looks at tensors or batches; never lets a row's value depend on M, on its neighbours or on the threads.
#pragma once

#include <cstdint>

#include "runtime/dtype.h"

namespace kg::cpu {

// What a finished product goes into besides C. Matrices are [M, N], contiguous, of the type of C.
struct GemmShares {
  double* sums;       // [2] += (sum of C^2, sum of C * other), in an order that M and N alone decide; or null
  const void* other;  // or null: a product of 0
  void* first;        // += coefficients[0] * C; or null
  void* second;       // += coefficients[1] * C; or null
  const void* coefficients;
};

// C[i,j] = alpha * sum_k A(i,k) B(k,j) (+ bias[j]) (+ C[i,j]). Strides are in elements and may be anything, 0 and
// negative included; C has unit column stride and overlaps no input. M = 0 or N = 0 does nothing; K = 0 sums to zero.
struct Gemm {
  DType in;   // of A, B and bias: F32, F64 or BF16
  DType out;  // of C: the same, or F32 for BF16 inputs
  int64_t M, N, K;
  const void* a;  // A(i,k) = a[i * aRow + k * aCol]
  int64_t aRow, aCol;
  const void* b;  // B(k,j) = b[k * bRow + j * bCol]
  int64_t bRow, bCol;
  void* c;  // C(i,j) = c[i * cRow + j]; not read unless `accumulate`
  int64_t cRow;
  double alpha = 1;
  bool accumulate = false;
  const void* bias = nullptr;  // [N], or null
  // B(k,j) = A(j,k), M = N, no bias, and C is symmetric where it is read: half of C may be a copy of the other. Not for
  // a C narrower than the sums.
  bool symmetric = false;
  // Neither bias nor `accumulate` beside it; C is of the type of the accumulators (F32 for BF16), contiguous, or null
  // where only the shares are wanted.
  const GemmShares* shares = nullptr;
};

namespace KG_ISA {

// Multi-threaded; serial when called inside parallelFor. bfloat16 accumulates in float32 and is rounded once; with
// AVX512_BF16 its subnormal numbers count as zero.
void gemm(const Gemm& g);

}  // namespace KG_ISA
}  // namespace kg::cpu
