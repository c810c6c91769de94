// The vocabulary head, backward: recomputes the logits of a block, turns them into their gradient in place and
// multiplies that into dhidden and dweight. Chunks of the vocabulary are summed in order; never stores [R, V].
#include "cpu/head.h"

namespace kg::cpu::KG_ISA {

namespace {

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

// What the backward pass reads and writes, in cotangent rows: row r of hidden and lse is that of cotangent row r.
template <class T>
struct HeadBackward {
  using C = compute_t<T>;
  static constexpr bool kNarrow = sizeof(T) != sizeof(C);  // bfloat16: products take it, sums do not

  const Call& call;
  RowMap rowMap;
  int64_t rows, width, vocabulary, blockRows;
  const T *hidden, *weight;
  const C *g, *lse;
  const int32_t* id;
  TargetsByRow targets;
  C* logits;        // of a block, turned into dlogits in place
  T* dlogits;       // dlogits in the dtype of the products; the same memory as logits unless that is bfloat16
  C* dhidden;       // accumulator [rows, width], or null
  C* dweight;       // accumulator [V, width], or null
  C* dweightChunk;  // accumulator [kChunk, width] for a bfloat16 dweight, or null

  explicit HeadBackward(const Call& c);
  void allocate();
  void gatherPrimalRows(T* hiddenRows, C* lseRows);
};

template <class T>
HeadBackward<T>::HeadBackward(const Call& c) : call(c), rowMap(RowMap::checked(c[8], c[3].size(0))) {
  rows = call[8].present() ? call[8].numel() : call[3].size(0);
  width = call[3].size(1);
  vocabulary = call[4].size(0);
  blockRows = rowsPerBlock(rows, sizeof(C) + (kNarrow ? sizeof(T) : 0));
  hidden = call[3].ptr<T>();
  weight = call[4].ptr<T>();
  g = call[2].ptr<C>();
  lse = call[5].ptr<C>();
  id = call[7].ptr<int32_t>();
  checkIndices("targetRow", call[6].ptr<int32_t>(), call[6].numel(), rows);
  checkIndices("targetId", id, call[7].numel(), vocabulary);
  allocate();
  targets.build(call[6].ptr<int32_t>(), call[6].numel(), rows);
}

template <class T>
void HeadBackward<T>::allocate() {
  const bool wantHidden = call[0].present(), wantWeight = call[1].present();
  const bool roundWeight = wantWeight && call[1].dtype != dtypeOf<C>();
  const int64_t gatheredRows = rowMap.map ? rows : 0;
  Workspace workspace;
  const size_t logitsAt = workspace.reserve<C>(blockRows * kChunkStride);
  const size_t dlogitsAt = workspace.reserve<T>(kNarrow ? blockRows * kChunkStride : 0);
  const size_t dhiddenAt = workspace.reserve<C>(kNarrow && wantHidden ? rows * width : 0);
  const size_t chunkAt = workspace.reserve<C>(roundWeight ? kChunk * width : 0);
  const size_t startAt = workspace.reserve<int32_t>(rows + 1);
  const size_t orderAt = workspace.reserve<int32_t>(call[6].numel());
  const size_t lseAt = workspace.reserve<C>(gatheredRows);
  const size_t hiddenAt = workspace.reserve<T>(gatheredRows * width);
  workspace.allocate(call);

  logits = workspace.get<C>(logitsAt);
  dlogits = workspace.get<T>(kNarrow ? dlogitsAt : logitsAt);
  dhidden = !wantHidden ? nullptr : kNarrow ? workspace.get<C>(dhiddenAt) : call[0].ptr<C>();
  dweight = wantWeight && !roundWeight ? call[1].ptr<C>() : nullptr;
  dweightChunk = roundWeight ? workspace.get<C>(chunkAt) : nullptr;
  targets = {workspace.get<int32_t>(startAt), workspace.get<int32_t>(orderAt)};
  if (rowMap.map) gatherPrimalRows(workspace.get<T>(hiddenAt), workspace.get<C>(lseAt));
}

// hidden and lse in the order of the cotangent rows.
template <class T>
void HeadBackward<T>::gatherPrimalRows(T* hiddenRows, C* lseRows) {
  parallelFor(rows, rowGrain(width), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      lseRows[r] = lse[rowMap(r)];
      memcpy(hiddenRows + r * width, hidden + rowMap(r) * width, width * sizeof(T));
    }
  });
  hidden = hiddenRows;
  lse = lseRows;
}

// dlogits of one row of a block: sum over its targets of g (onehot - softmax). No target: zeros, whatever the logits.
template <class T, class C>
KG_INLINE void dlogitsRow(const HeadBackward<T>& p, const LogitsBlock& b, int64_t row, C* l, T* out) {
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
void backwardBlock(const HeadBackward<T>& p, const LogitsBlock& b) {
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

template <class T>
void vocabHeadBackward(const Call& call) {
  const HeadBackward<T> p(call);
  forBlocks(p.rows, p.blockRows, p.vocabulary, [&](const LogitsBlock& b) {
    backwardBlock(p, b);
    if (p.dweightChunk && b.firstRow + b.rows == p.rows) {
      writeRounded(call[1].ptr<T>() + b.firstColumn * p.width, p.dweightChunk, b.columns * p.width, true);
    }
  });
  if (p.kNarrow && p.dhidden) writeRounded(call[0].ptr<T>(), p.dhidden, p.rows * p.width, false);
}

}  // namespace

void kernel_vocabHeadBackward(const Call& call) {
  if (!call[0].present() && !call[1].present()) return;
  dispatchFloating(call[3].dtype, [&](auto t) { vocabHeadBackward<decltype(t)>(call); });
}

}  // namespace kg::cpu::KG_ISA
