// The vocabulary head, backward (contract: kernels.def, vocabHeadBackward): recomputes the logits of a block by
// cuBLASLt, turns them into their gradient in place (rounded to bfloat16 for bfloat16 inputs) and multiplies that into
// dhidden and dweight. Chunks of the vocabulary are added in order, so are blocks of rows; [R, V] never exists.
//
// H100, 4096 x 151,936, H 896, bfloat16, both gradients: three products of 1.12 TFLOP, 3.4 ms at 989 TFLOP/s, 4.8 ms at
// the 700 within reach. Logits 2.5 GB written and read, gradients 1.2 GB written and read twice, largely within L2;
// float32 sums of dhidden 38 x 15 MB and of dweight 2 x 0.54 GB read and written. Targets are sorted by row in one
// launch, 4 us (sort.cu). Expected 6-7 ms in 32 MB + 15 MB.
// PyTorch's backward of log-softmax alone moves 2.5 + 2.5 + 2.5 GB (2.2 ms) beside two products, and holds 6.2 GB with
// the forward pass.
#include "cuda/head.h"
#include "cuda/sort.h"

namespace kg::cuda {

namespace {

// What the backward pass reads and writes, in cotangent rows: row r of hidden and lse is that of cotangent row r.
template <class T>
struct Backward {
  using C = compute_t<T>;
  const C *g, *lse;
  const T *hidden, *weight;
  const int32_t *targetRow, *targetId;
  int64_t targets, rows, width, vocabulary;
  C* logits;          // of a block; turned into dlogits in place, rows of T with the row stride of C
  SortedKeys sorted;  // [targets] rows, and which targets they are of
  int32_t* start;     // [rows + 1] of a row's targets among them
  C* total;           // [rows] sum of g over a row's targets
  FaultSink faults;
};

// ---- targets by row
// ---------------------------------------------------------------------------------------------------

// The first place of keys[count] that is not below row.
KG_DEVICE int32_t lowerBound(const uint32_t* keys, int64_t count, int64_t row) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return static_cast<int32_t>(low);
}

// start and total, a thread a row. A target outside of the vocabulary makes its row's gradient NaN.
template <class T>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kHeadThreads) sumTargets(Backward<T> p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kHeadThreads + threadIdx.x;
  if (row > p.rows) return;
  const int32_t first = lowerBound(p.sorted.keys, p.targets, row);
  p.start[row] = first;
  if (row == p.rows) return;
  compute_t<T> total = 0;
  for (int32_t t = first; t < p.targets && p.sorted.keys[t] == row; t++) {
    const int32_t n = p.sorted.order[t], id = p.targetId[n];
    const bool fault = id < 0 || id >= p.vocabulary;
    if (fault) reportFault(p.faults, FaultKind::IdOutOfRange, id, n, p.vocabulary);
    total += fault ? compute_t<T>(NAN) : p.g[n];
  }
  p.total[row] = total;
}

// hidden and lse in the order of the cotangent rows, a block a row. NaN where the map leaves the primal rows.
template <class T>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kHeadThreads)
    gatherPrimalRows(T* hiddenRows, compute_t<T>* lseRows, Backward<T> p, const int32_t* rowMap, int64_t primalRows) {
  const int64_t row = blockIdx.x, primal = rowMap[row];
  const bool fault = primal < 0 || primal >= primalRows;
  for (int64_t i = threadIdx.x; i < p.width; i += kHeadThreads) {
    hiddenRows[row * p.width + i] = fault ? T(float(NAN)) : p.hidden[primal * p.width + i];
  }
  if (threadIdx.x != 0) return;
  lseRows[row] = fault ? compute_t<T>(NAN) : p.lse[primal];
  if (fault) reportFault(p.faults, FaultKind::RowMapOutOfRange, primal, row, primalRows);
}

// ---- gradients of logits
// ----------------------------------------------------------------------------------------------

// dlogits = sum over the row's targets of g (onehot - softmax), a block a row. No target: zeros, whatever the logits.
template <class T>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kHeadThreads) dlogitsKernel(Backward<T> p, LogitsBlock block) {
  using C = compute_t<T>;
  const int64_t row = block.firstRow + blockIdx.x;
  C* logits = p.logits + static_cast<int64_t>(blockIdx.x) * kChunk;
  const int32_t first = p.start[row], last = p.start[row + 1];
  const C total = p.total[row], lse = p.lse[row];
  ChunkRow<C> l;
  l.read(logits, block.columns);
  l.forEach(block.columns, [&](C& v, int) { v = first == last ? C(0) : -total * std::exp(v - lse); });
  for (int32_t t = first; t < last; t++) {
    const int32_t n = p.sorted.order[t], id = p.targetId[n];
    const int column = id - block.firstColumn;
    if (!block.hasColumn(id) || !ChunkRow<C>::owns(column)) continue;
    l.forEach(block.columns, [&](C& v, int at) { v += at == column ? p.g[n] : C(0); });
  }
  syncThreads();  // all have read the row that is written over
  l.write(reinterpret_cast<T*>(logits), block.columns);
}

// out[n] (+)= values[n], rounding once.
template <class T, class C>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kHeadThreads) roundKernel(T* out, const C* values, int64_t count, bool accumulate) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kHeadThreads + threadIdx.x;
  if (i < count) out[i] = T(accumulate ? values[i] + C(out[i]) : values[i]);
}

template <class T, class C>
void writeRounded(const Call& call, T* out, const C* values, int64_t count, bool accumulate) {
  launch(call, {gridOf(ceilDiv(count, kHeadThreads)), kHeadThreads}, roundKernel<T, C>, out, values, count, accumulate);
}

// ---- host
// -------------------------------------------------------------------------------------------------------------

// Where sums go: the outputs themselves, or float32 beside a bfloat16 output; nullptr where none is wanted.
template <class C>
struct Sums {
  C *dhidden, *dweight;
  C* dweightChunk;  // [kChunk, width] of a bfloat16 dweight
};

template <class T>
Sums<compute_t<T>> prepare(const Call& call, Backward<T>& p, int64_t blockRows) {
  using C = compute_t<T>;
  constexpr bool kNarrow = sizeof(T) != sizeof(C);
  const bool wantHidden = call[0].present(), wantWeight = call[1].present();
  const bool roundWeight = wantWeight && call[1].dtype != dtypeOf<C>();
  const int64_t gathered = call[8].present() ? p.rows : 0;
  Workspace workspace;
  const size_t logits = workspace.reserve<C>(blockRows * kChunk);
  const size_t dhidden = workspace.reserve<C>(kNarrow && wantHidden ? p.rows * p.width : 0);
  const size_t chunk = workspace.reserve<C>(roundWeight ? kChunk * p.width : 0);
  const KeySort sort(workspace, p.targets, p.rows);
  const size_t start = workspace.reserve<int32_t>(p.rows + 1), total = workspace.reserve<C>(p.rows);
  const size_t lse = workspace.reserve<C>(gathered), hidden = workspace.reserve<T>(gathered * p.width);
  workspace.allocate(call);
  p.logits = workspace.get<C>(logits);
  p.start = workspace.get<int32_t>(start);
  p.total = workspace.get<C>(total);
  if (gathered > 0) {
    T* hiddenRows = workspace.get<T>(hidden);
    C* lseRows = workspace.get<C>(lse);
    launch(call, {gridOf(p.rows), kHeadThreads}, gatherPrimalRows<T>, hiddenRows, lseRows, p, call[8].ptr<int32_t>(),
           call[3].size(0));
    p.hidden = hiddenRows;
    p.lse = lseRows;
  }
  p.sorted = sort.run(call, workspace, p.targetRow, FaultKind::RowOutOfRange);
  return {!wantHidden ? nullptr
          : kNarrow   ? workspace.get<C>(dhidden)
                      : call[0].ptr<C>(),
          wantWeight && !roundWeight ? call[1].ptr<C>() : nullptr, roundWeight ? workspace.get<C>(chunk) : nullptr};
}

// dhidden += dlogits @ weight; dweight += dlogits^T @ hidden.
template <class T>
void multiplyGradients(const Call& call, const Backward<T>& p, const Sums<compute_t<T>>& sums,
                       const LogitsBlock& block) {
  using C = compute_t<T>;
  const int64_t stride = kChunk * static_cast<int64_t>(sizeof(C) / sizeof(T));
  const DType in = dtypeOf<T>(), out = dtypeOf<C>();
  const T* hidden = p.hidden + block.firstRow * p.width;
  const T* weight = p.weight + block.firstColumn * p.width;
  if (sums.dhidden) {
    Gemm g{in,
           out,
           block.rows,
           p.width,
           block.columns,
           p.logits,
           stride,
           1,
           weight,
           p.width,
           1,
           sums.dhidden + block.firstRow * p.width,
           p.width,
           1.0,
           block.firstColumn > 0};
    g.planRows = kBlockRows;
    gemm(call, g);
  }
  C* dweight = sums.dweight ? sums.dweight + block.firstColumn * p.width : sums.dweightChunk;
  if (!dweight) return;
  const bool accumulate = sums.dweight || block.firstRow > 0;
  gemm(call, {in, out, block.columns, p.width, block.rows, p.logits, 1, stride, hidden, p.width, 1, dweight, p.width,
              1.0, accumulate});
  if (sums.dweightChunk && block.firstRow + block.rows == p.rows) {
    writeRounded(call, call[1].ptr<bf16>() + block.firstColumn * p.width, dweight, block.columns * p.width, true);
  }
}

template <class T>
void vocabHeadBackward(const Call& call) {
  using C = compute_t<T>;
  const TensorView &hidden = call[3], &rowMap = call[8];
  Backward<T> p{};
  p.g = call[2].ptr<C>();
  p.hidden = hidden.ptr<T>();
  p.weight = call[4].ptr<T>();
  p.lse = call[5].ptr<C>();
  p.targetRow = call[6].ptr<int32_t>();
  p.targetId = call[7].ptr<int32_t>();
  p.targets = call[6].numel();
  p.rows = rowMap.present() ? rowMap.numel() : hidden.size(0);
  p.width = hidden.size(1);
  p.vocabulary = call[4].size(0);
  p.faults = context(call).faults;
  const int64_t blockRows = rowsPerBlock<C>(p.rows);
  const Sums<C> sums = prepare(call, p, blockRows);

  launch(call, {gridOf(ceilDiv(p.rows + 1, kHeadThreads)), kHeadThreads}, sumTargets<T>, p);
  forBlocks(p.rows, blockRows, p.vocabulary, [&](const LogitsBlock& block) {
    computeLogits(call, p.logits, p.hidden, p.weight, block, p.width);
    launch(call, {gridOf(block.rows), kHeadThreads}, dlogitsKernel<T>, p, block);
    multiplyGradients(call, p, sums, block);
  });
  if constexpr (sizeof(T) != sizeof(C)) {
    if (sums.dhidden) writeRounded(call, call[0].ptr<T>(), sums.dhidden, p.rows * p.width, false);
  }
}

}  // namespace

void kernel_vocabHeadBackward(const Call& call) {
  if (!call[0].present() && !call[1].present()) return;
  dispatchFloat(call[3].dtype, [&](auto tag) { vocabHeadBackward<typename decltype(tag)::type>(call); });
}

}  // namespace kg::cuda
