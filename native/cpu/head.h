// What both directions of the vocabulary head share: how [R, V] is cut in blocks of logits, and their product.
// Nothing here stores more than one block. Forced inline: each instruction set has its own copy.
#pragma once

#include "cpu/fused.h"
#include "cpu/gemm.h"

namespace kg::cpu::KG_ISA {

// The vocabulary is cut in fixed chunks, visited in order, so a row's value does not depend on how many rows there are.
constexpr int64_t kChunk = 2048;
constexpr int64_t kChunkStride = 2048 + 32;  // off the power of two, whose columns would fall into few cache sets
constexpr int64_t kBlockBytes = int64_t(16) << 20;

// Pieces of the one scratch block of a call: reserve all, allocate, then get.
class Workspace {
 public:
  template <class T>
  KG_INLINE size_t reserve(int64_t count) {
    const size_t offset = bytes_;
    bytes_ += (count * sizeof(T) + 63) & ~size_t(63);
    return offset;
  }
  KG_INLINE void allocate(const Call& call) { base_ = static_cast<char*>(scratch(call, bytes_)); }
  template <class T>
  KG_INLINE T* get(size_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  size_t bytes_ = 0;
  char* base_ = nullptr;
};

// Rows of a block when every logit takes bytesPerLogit.
KG_INLINE int64_t rowsPerBlock(int64_t rows, int64_t bytesPerLogit) {
  return min64(rows, kBlockBytes / (kChunkStride * bytesPerLogit));
}

// Where a block of logits lies: rows firstRow..., columns firstColumn....
struct LogitsBlock {
  int64_t firstRow, rows, firstColumn, columns;

  KG_INLINE bool hasRow(int64_t row) const { return row >= firstRow && row < firstRow + rows; }
  KG_INLINE bool hasColumn(int64_t column) const { return column >= firstColumn && column < firstColumn + columns; }
  KG_INLINE int64_t at(int64_t row, int64_t column) const {
    return (row - firstRow) * kChunkStride + column - firstColumn;
  }
};

// f(block) over all blocks; the chunk of weights stays in cache while the blocks of rows pass.
template <class F>
KG_INLINE void forBlocks(int64_t rows, int64_t rowsPerBlock, int64_t vocabulary, F f) {
  for (int64_t v = 0; v < vocabulary; v += kChunk) {
    for (int64_t r = 0; r < rows; r += rowsPerBlock) {
      f(LogitsBlock{r, min64(rowsPerBlock, rows - r), v, min64(kChunk, vocabulary - v)});
    }
  }
}

// logits[rows, columns] (row stride kChunkStride) = hidden[rows, width] @ weight[columns, width]^T.
template <class T>
KG_INLINE void computeLogits(compute_t<T>* logits, const T* hidden, const T* weight, int64_t rows, int64_t columns,
                             int64_t width) {
  gemm({dtypeOf<T>(), dtypeOf<compute_t<T>>(), rows, columns, width, hidden, width, 1, weight, 1, width, logits,
        kChunkStride});
}

}  // namespace kg::cpu::KG_ISA
