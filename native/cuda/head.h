// What both directions of the vocabulary head share: how [R, V] is cut in blocks of logits, their product, and a row of
// a block in the registers of a block of threads. Nothing here stores more than one block of logits.
#pragma once

#include "cuda/gemm.h"
#include "cuda/packs.h"

namespace kg::cuda {

// The vocabulary is cut in fixed chunks, visited in order, so a row's value does not depend on how many rows there are.
constexpr int kChunk = 4096;
// Of logits in memory: 2048 rows of float32. With the rows of hidden and the chunk of weights (Qwen2.5-0.5B: 4 + 7 MB)
// they are within an L2 of 50 MB when the next kernel reads them, and the products are large enough for 132
// multiprocessors: 256 tiles of 128 x 256 for logits, 112 of 128 x 128 for dhidden, which half the rows would leave 56.
constexpr int64_t kBlockBytes = int64_t(32) << 20;
// Algorithms are chosen for blocks of this many rows: one for every row, whatever the number of rows in the call.
constexpr int64_t kBlockRows = 2048;

constexpr int kHeadThreads = 256;
constexpr int kPerThread = kChunk / kHeadThreads;

// Rows of a block: as few blocks as the budget allows, of about equal size.
template <class C>
int64_t rowsPerBlock(int64_t rows) {
  const int64_t most = kBlockBytes / (kChunk * static_cast<int64_t>(sizeof(C)));
  return rows <= most ? rows : roundUp(ceilDiv(rows, ceilDiv(rows, most)), 128);
}

// Where a block of logits lies: rows firstRow..., columns firstColumn....
struct LogitsBlock {
  int64_t firstRow, rows;
  int32_t firstColumn, columns;

  KG_INLINE bool hasRow(int64_t row) const { return row >= firstRow && row < firstRow + rows; }
  KG_INLINE bool hasColumn(int32_t column) const { return column >= firstColumn && column - firstColumn < columns; }
  KG_INLINE int64_t at(int64_t row, int32_t column) const { return (row - firstRow) * kChunk + column - firstColumn; }
};

// f(block) over all blocks; the chunk of weights stays in L2 while the blocks of rows pass.
template <class F>
void forBlocks(int64_t rows, int64_t rowsPerBlock, int64_t vocabulary, F f) {
  for (int64_t v = 0; v < vocabulary; v += kChunk) {
    const int32_t columns = static_cast<int32_t>(vocabulary - v < kChunk ? vocabulary - v : kChunk);
    for (int64_t r = 0; r < rows; r += rowsPerBlock) {
      f(LogitsBlock{r, rows - r < rowsPerBlock ? rows - r : rowsPerBlock, static_cast<int32_t>(v), columns});
    }
  }
}

template <class T>
constexpr DType dtypeOf() {
  return sizeof(T) == 8 ? DType::F64 : sizeof(T) == 4 ? DType::F32 : DType::BF16;
}

// logits[block.rows, block.columns] (row stride kChunk) = hidden @ weight^T, both at the block's beginning.
template <class T>
void computeLogits(const Call& call, compute_t<T>* logits, const T* hidden, const T* weight, const LogitsBlock& block,
                   int64_t width) {
  Gemm g{dtypeOf<T>(),
         dtypeOf<compute_t<T>>(),
         block.rows,
         block.columns,
         width,
         hidden + block.firstRow * width,
         width,
         1,
         weight + block.firstColumn * width,
         1,
         width,
         logits,
         kChunk};
  g.planRows = kBlockRows;
  gemm(call, g);
}

// A row of a block of logits in the registers of kHeadThreads threads, packs of 16 bytes in turn.
template <class C>
struct ChunkRow {
  C v[kPerThread];

  // The column (within the block) of this thread's element `i`.
  static KG_DEVICE int column(int i) {
    return (i / kPack<C> * kHeadThreads + static_cast<int>(threadIdx.x)) * kPack<C> + i % kPack<C>;
  }
  static KG_DEVICE bool owns(int column) { return column / kPack<C> % kHeadThreads == static_cast<int>(threadIdx.x); }
  // Elements beyond `columns` are not touched by f, and unknown.
  KG_DEVICE void read(const C* row, int columns) {
    KG_UNROLL for (int i = 0; i < kPerThread; i += kPack<C>) {
      if (column(i) >= columns) break;
      const Pack<C, kPack<C>> p = loadPack<C, kPack<C>>(row + column(i));
      KG_UNROLL for (int k = 0; k < kPack<C>; k++) v[i + k] = p.v[k];
    }
  }
  // Rounded to T; the last pack is filled up with zeros.
  template <class T>
  KG_DEVICE void write(T* row, int columns) const {
    KG_UNROLL for (int i = 0; i < kPerThread; i += kPack<C>) {
      if (column(i) >= columns) break;
      Wide<C, kPack<C>> wide;
      KG_UNROLL for (int k = 0; k < kPack<C>; k++) wide.v[k] = column(i) + k < columns ? v[i + k] : C(0);
      storePack<T, kPack<C>>(row + column(i), narrow<T>(wide));
    }
  }
  // f(element, column within the block)
  template <class F>
  KG_DEVICE void forEach(int columns, F f) {
    KG_UNROLL for (int i = 0; i < kPerThread; i++) {
      if (column(i) < columns) f(v[i], column(i));
    }
  }
};

}  // namespace kg::cuda
