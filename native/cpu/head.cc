// The vocabulary head: hidden @ weight^T, log-softmax and the gather of targets in one pass, forward and backward.
// Logits exist for one block of rows and one chunk of the vocabulary at a time, never as [R, V]. The vocabulary is cut
// in fixed chunks, visited in order, so a row's value does not depend on how many other rows there are.
#include "cpu/fused.h"
#include "cpu/gemm.h"

namespace kg::cpu::KG_ISA {

namespace {

constexpr int64_t kChunk = 2048;             // columns of logits; part of the order of summation
constexpr int64_t kChunkStride = 2048 + 32;  // off the power of two, which would fill few cache sets
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

template <class C>
KG_INLINE int64_t rowsPerBlock(int64_t rows) {
  return min64(rows, kBlockBytes / (kChunkStride * static_cast<int64_t>(sizeof(C))));
}

// logits[rows, columns] (row stride kChunkStride) = hidden[rows, width] @ weight[columns, width]^T.
template <class T>
KG_INLINE void computeLogits(compute_t<T>* logits, const T* hidden, const T* weight, int64_t rows, int64_t columns,
                             int64_t width) {
  gemm({dtypeOf<T>(), dtypeOf<compute_t<T>>(), rows, columns, width, hidden, width, 1, weight, 1, width, logits,
        kChunkStride});
}

// ---- forward -----------------------------------------------------------------------------------------------------

// What a row has seen of its logits l so far; sums are relative to the maximum.
struct RowState {
  double max;
  double sum;       // of e = exp(l - max)
  double weighted;  // of e * (l - max)
  double squares;   // of e^2
  double total;     // of l
  int64_t argmax;
};

template <class C>
KG_INLINE Vec<C> loadLogits(const C* l, int count) {
  return count == Vec<C>::N ? Vec<C>::load(l) : Vec<C>::loadPartial(l, count, -C(__builtin_inf()));
}

template <class C>
KG_INLINE C rowMax(const C* l, int64_t n) {
  Vec<C> best(-C(__builtin_inf()));
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE { best = max(best, loadLogits(l + i, count)); });
  return hmax(best);
}

template <class C>
KG_INLINE double sumExp(const C* l, int64_t n, C top) {
  const Vec<C> shift(top);
  Vec<C> sum(C(0));
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE { sum += vexp(loadLogits(l + i, count) - shift); });
  return hsum(sum);
}

// The sums of one chunk, relative to top.
template <class C>
KG_INLINE RowState chunkStatistics(const C* l, int64_t n, C top) {
  const Vec<C> shift(top);
  Vec<C> sum(C(0)), weighted(C(0)), squares(C(0)), total(C(0));
  int64_t i = 0;
  for (; i + Vec<C>::N <= n; i += Vec<C>::N) {
    const Vec<C> v = Vec<C>::load(l + i), d = v - shift, e = vexp(d);
    sum = sum + e;
    weighted = weighted + e * d;
    squares = squares + e * e;
    total = total + v;
  }
  RowState s = {double(top), double(hsum(sum)), double(hsum(weighted)), double(hsum(squares)), double(hsum(total)), 0};
  for (; i < n; i++) {
    const double d = double(l[i]) - double(top), e = m::exp(C(d));
    s.sum += e;
    s.weighted += e * d;
    s.squares += e * e;
    s.total += l[i];
  }
  return s;
}

template <class C>
KG_INLINE int64_t firstEqual(const C* l, int64_t n, C value) {
  int64_t i = 0;
  while (i < n && l[i] != value) i++;
  return i;
}

// Online log-sum-exp: takes in the next chunk of a row.
template <class C>
KG_INLINE void visitChunk(RowState& s, const C* l, int64_t n) {
  const C top = rowMax(l, n), newMax = top > C(s.max) ? top : C(s.max);
  s.sum = s.sum * m::exp(s.max - double(newMax)) + sumExp(l, n, newMax);
  s.max = newMax;
}

template <class C>
KG_INLINE void visitChunkWithStatistics(RowState& s, const C* l, int64_t n, int64_t firstColumn) {
  const C top = rowMax(l, n), newMax = top > C(s.max) ? top : C(s.max);
  if (double(top) > s.max) s.argmax = firstColumn + firstEqual(l, n, top);
  const RowState chunk = chunkStatistics(l, n, newMax);
  if (firstColumn > 0) {
    const double d = s.max - double(newMax), scale = m::exp(d);
    s.weighted = scale * (s.weighted + d * s.sum);
    s.sum *= scale;
    s.squares *= scale * scale;
  }
  s.max = newMax;
  s.sum += chunk.sum;
  s.weighted += chunk.weighted;
  s.squares += chunk.squares;
  s.total += chunk.total;
}

template <class C>
KG_INLINE void writeStatistics(C* out, const RowState& s, int64_t vocabulary) {
  out[0] = static_cast<C>(m::log(s.sum) - s.weighted / s.sum);
  out[1] = static_cast<C>(s.argmax);
  out[2] = static_cast<C>(s.total / double(vocabulary));
  out[3] = static_cast<C>(m::log(s.squares) - 2 * m::log(s.sum));
}

// One block of logits: rows firstRow..., columns firstColumn....
struct Block {
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
      f(Block{r, min64(rowsPerBlock, rows - r), v, min64(kChunk, vocabulary - v)});
    }
  }
}

template <class C>
void visitRows(RowState* states, const C* logits, const Block& block, bool statistics) {
  parallelFor(block.rows, rowGrain(block.columns), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      RowState& s = states[block.firstRow + r];
      const C* l = logits + r * kChunkStride;
      if (statistics) {
        visitChunkWithStatistics(s, l, block.columns, block.firstColumn);
      } else {
        visitChunk(s, l, block.columns);
      }
    }
  });
}

// Keeps the logits of the targets (in logProbs) and of the probes (in probeLogProbs) that lie in the block.
template <class C>
void gatherLogits(const Call& call, const C* logits, const Block& block) {
  const int32_t *row = call[6].ptr<int32_t>(), *id = call[7].ptr<int32_t>();
  C* logProbs = call[0].ptr<C>();
  for (int64_t n = 0, count = call[6].numel(); n < count; n++) {
    if (block.hasColumn(id[n]) && block.hasRow(row[n])) logProbs[n] = logits[block.at(row[n], id[n])];
  }
  if (!call[3].present()) return;
  const int32_t* probes = call[8].ptr<int32_t>();
  const int64_t probeCount = call[8].numel();
  for (int64_t q = 0; q < probeCount; q++) {
    if (!block.hasColumn(probes[q])) continue;
    C* out = call[3].ptr<C>() + block.firstRow * probeCount + q;
    for (int64_t r = 0; r < block.rows; r++) out[r * probeCount] = logits[block.at(block.firstRow + r, probes[q])];
  }
}

// From kept logits and final states to the outputs.
template <class C>
void finishForward(const Call& call, RowState* states, int64_t rows, int64_t vocabulary) {
  const int32_t* row = call[6].ptr<int32_t>();
  C *logProbs = call[0].ptr<C>(), *lse = call[1].ptr<C>();
  const int64_t probeCount = call[3].present() ? call[8].numel() : 0;
  for (int64_t r = 0; r < rows; r++) {
    RowState& s = states[r];
    if (call[2].present()) writeStatistics(call[2].ptr<C>() + r * 4, s, vocabulary);
    s.max += m::log(s.sum);  // from here on the log-sum-exp, unrounded
    lse[r] = static_cast<C>(s.max);
    for (int64_t q = 0; q < probeCount; q++) {
      C& value = call[3].ptr<C>()[r * probeCount + q];
      value = static_cast<C>(double(value) - s.max);
    }
  }
  for (int64_t n = 0, count = call[6].numel(); n < count; n++) {
    logProbs[n] = static_cast<C>(double(logProbs[n]) - states[row[n]].max);
  }
}

template <class T>
void vocabHead(const Call& call) {
  using C = compute_t<T>;
  const TensorView &hidden = call[4], &weight = call[5];
  const int64_t rows = hidden.size(0), width = hidden.size(1), vocabulary = weight.size(0);
  checkIndices("targetRow", call[6].ptr<int32_t>(), call[6].numel(), rows);
  checkIndices("targetId", call[7].ptr<int32_t>(), call[7].numel(), vocabulary);
  if (call[3].present()) checkIndices("probes", call[8].ptr<int32_t>(), call[8].numel(), vocabulary);

  const int64_t blockRows = rowsPerBlock<C>(rows);
  Workspace workspace;
  const size_t logitsAt = workspace.reserve<C>(blockRows * kChunkStride), statesAt = workspace.reserve<RowState>(rows);
  workspace.allocate(call);
  C* logits = workspace.get<C>(logitsAt);
  RowState* states = workspace.get<RowState>(statesAt);
  for (int64_t r = 0; r < rows; r++) states[r] = {-__builtin_inf(), 0, 0, 0, 0, 0};

  forBlocks(rows, blockRows, vocabulary, [&](const Block& b) {
    computeLogits(logits, hidden.ptr<T>() + b.firstRow * width, weight.ptr<T>() + b.firstColumn * width, b.rows,
                  b.columns, width);
    visitRows(states, logits, b, call[2].present());
    gatherLogits(call, logits, b);
  });
  finishForward<C>(call, states, rows, vocabulary);
}

// ---- backward ----------------------------------------------------------------------------------------------------

// Targets sorted by row (stable): those of row r are order[start[r]] ... order[start[r + 1] - 1].
struct TargetsByRow {
  int32_t *start, *order;

  KG_INLINE void build(const int32_t* row, int64_t count, int64_t rows) {
    for (int64_t r = 0; r <= rows; r++) start[r] = 0;
    for (int64_t n = 0; n < count; n++) start[row[n] + 1]++;
    for (int64_t r = 0; r < rows; r++) start[r + 1] += start[r];
    for (int64_t n = 0; n < count; n++) order[start[row[n]]++] = static_cast<int32_t>(n);
    for (int64_t r = rows; r > 0; r--) start[r] = start[r - 1];
    start[0] = 0;
  }
};

// Everything the backward pass over cotangent rows reads and writes. Row r of hidden and lse belongs to cotangent row
// r.
template <class T>
struct HeadBackward {
  using C = compute_t<T>;
  int64_t rows, width, vocabulary;
  const T *hidden, *weight;
  const C *g, *lse;
  const int32_t* id;
  TargetsByRow targets;
  C* logits;        // of a block, turned into dlogits in place
  T* dlogits;       // dlogits in the dtype of the products; the same memory as logits unless that is bfloat16
  C* dhidden;       // accumulator [rows, width], or null
  C* dweight;       // accumulator [V, width], or null
  C* dweightChunk;  // accumulator [kChunk, width] for a bfloat16 dweight, or null
};

// dlogits of one row of a block: sum over its targets of g (onehot - softmax). No target: zeros, whatever the logits.
template <class T, class C>
KG_INLINE void dlogitsRow(const HeadBackward<T>& p, const Block& b, int64_t row, C* l, T* out) {
  const int32_t first = p.targets.start[row], last = p.targets.start[row + 1];
  C total = 0;
  for (int32_t t = first; t < last; t++) total += p.g[p.targets.order[t]];
  const Vec<C> factor(-total), lse(p.lse[row]), zero(C(0));
  forVectors<C>(b.columns, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    storeLanes(l + i, first == last ? zero : factor * vexp(loadLanes<C>(l + i, count) - lse), count);
  });
  for (int32_t t = first; t < last; t++) {
    const int32_t n = p.targets.order[t];
    if (b.hasColumn(p.id[n])) l[p.id[n] - b.firstColumn] += p.g[n];
  }
  if constexpr (sizeof(T) != sizeof(C)) {
    forVectors<C>(b.columns, [&](int64_t i, int count)
                                 KG_LAMBDA_INLINE { storeLanes(out + i, loadLanes<C>(l + i, count), count); });
  }
}

template <class T>
void backwardBlock(const HeadBackward<T>& p, const Block& b) {
  using C = compute_t<T>;
  const T* hidden = p.hidden + b.firstRow * p.width;
  const T* weight = p.weight + b.firstColumn * p.width;
  computeLogits(p.logits, hidden, weight, b.rows, b.columns, p.width);
  parallelFor(b.rows, rowGrain(b.columns), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      dlogitsRow(p, b, b.firstRow + r, p.logits + r * kChunkStride, p.dlogits + r * kChunkStride);
    }
  });
  if (p.dhidden) {
    gemm({dtypeOf<T>(), dtypeOf<C>(), b.rows, p.width, b.columns, p.dlogits, kChunkStride, 1, weight, p.width, 1,
          p.dhidden + b.firstRow * p.width, p.width, 1.0, b.firstColumn > 0});
  }
  if (p.dweight || p.dweightChunk) {
    C* out = p.dweight ? p.dweight + b.firstColumn * p.width : p.dweightChunk;
    gemm({dtypeOf<T>(), dtypeOf<C>(), b.columns, p.width, b.rows, p.dlogits, 1, kChunkStride, hidden, p.width, 1, out,
          p.width, 1.0, p.dweight || b.firstRow > 0});
  }
}

// out[n] (+)= values[n], rounding once.
template <class T, class C>
void writeRounded(T* out, const C* values, int64_t n, bool accumulate) {
  parallelFor(n, kElementsPerTask, [&](int64_t begin, int64_t end, int) {
    forVectors<C>(end - begin, [&](int64_t i, int count) KG_LAMBDA_INLINE {
      const Vec<C> v = loadLanes<C>(values + begin + i, count);
      storeLanes(out + begin + i, accumulate ? v + loadLanes<C>(out + begin + i, count) : v, count);
    });
  });
}

// hidden and lse in the order of the cotangent rows.
template <class T, class C>
void gatherPrimalRows(T* hidden, C* lse, const Call& call, const RowMap& rowMap, int64_t rows, int64_t width) {
  parallelFor(rows, rowGrain(width), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      lse[r] = call[5].ptr<C>()[rowMap(r)];
      memcpy(hidden + r * width, call[3].ptr<T>() + rowMap(r) * width, width * sizeof(T));
    }
  });
}

template <class T>
void vocabHeadBackward(const Call& call) {
  using C = compute_t<T>;
  constexpr bool kNarrow = sizeof(T) != sizeof(C);
  const TensorView &dhidden = call[0], &dweight = call[1], &targetRow = call[6];
  const int64_t primalRows = call[3].size(0), targetCount = targetRow.numel();
  HeadBackward<T> p = {};
  p.rows = call[8].present() ? call[8].numel() : primalRows;
  p.width = call[3].size(1);
  p.vocabulary = call[4].size(0);
  p.weight = call[4].ptr<T>();
  p.g = call[2].ptr<C>();
  p.id = call[7].ptr<int32_t>();
  checkIndices("targetRow", targetRow.ptr<int32_t>(), targetCount, p.rows);
  checkIndices("targetId", p.id, targetCount, p.vocabulary);
  const RowMap rowMap = RowMap::checked(call[8], primalRows);
  const bool roundWeight = dweight.present() && dweight.dtype != dtypeOf<C>();

  const int64_t blockRows = rowsPerBlock<C>(p.rows);
  Workspace workspace;
  const size_t logits = workspace.reserve<C>(blockRows * kChunkStride);
  const size_t dlogits = workspace.reserve<T>(kNarrow ? blockRows * kChunkStride : 0);
  const size_t rounded = workspace.reserve<C>(kNarrow && dhidden.present() ? p.rows * p.width : 0);
  const size_t chunk = workspace.reserve<C>(roundWeight ? kChunk * p.width : 0);
  const size_t start = workspace.reserve<int32_t>(p.rows + 1), order = workspace.reserve<int32_t>(targetCount);
  const size_t lse = workspace.reserve<C>(rowMap.map ? p.rows : 0);
  const size_t hidden = workspace.reserve<T>(rowMap.map ? p.rows * p.width : 0);
  workspace.allocate(call);

  p.logits = workspace.get<C>(logits);
  p.dlogits = workspace.get<T>(kNarrow ? dlogits : logits);
  p.targets = {workspace.get<int32_t>(start), workspace.get<int32_t>(order)};
  p.targets.build(targetRow.ptr<int32_t>(), targetCount, p.rows);
  p.hidden = call[3].ptr<T>();
  p.lse = call[5].ptr<C>();
  if (rowMap.map) {
    gatherPrimalRows(workspace.get<T>(hidden), workspace.get<C>(lse), call, rowMap, p.rows, p.width);
    p.hidden = workspace.get<T>(hidden);
    p.lse = workspace.get<C>(lse);
  }
  if (dhidden.present()) p.dhidden = kNarrow ? workspace.get<C>(rounded) : dhidden.ptr<C>();
  if (dweight.present() && !roundWeight) p.dweight = dweight.ptr<C>();
  if (roundWeight) p.dweightChunk = workspace.get<C>(chunk);

  forBlocks(p.rows, blockRows, p.vocabulary, [&](const Block& b) {
    backwardBlock(p, b);
    if (roundWeight && b.firstRow + b.rows == p.rows) {
      writeRounded(dweight.ptr<T>() + b.firstColumn * p.width, p.dweightChunk, b.columns * p.width, true);
    }
  });
  if (kNarrow && dhidden.present()) writeRounded(dhidden.ptr<T>(), p.dhidden, p.rows * p.width, false);
}

}  // namespace

void kernel_vocabHead(const Call& call) {
  dispatchFloating(call[4].dtype, [&](auto t) { vocabHead<decltype(t)>(call); });
}

void kernel_vocabHeadBackward(const Call& call) {
  if (!call[0].present() && !call[1].present()) return;
  dispatchFloating(call[3].dtype, [&](auto t) { vocabHeadBackward<decltype(t)>(call); });
}

}  // namespace kg::cpu::KG_ISA
