// The vocabulary head, forward (contract: kernels.def, vocabHead): hidden @ weight^T by cuBLASLt for one block of
// logits at a time, then one pass of our own over the block: online log-sum-exp, statistics, and the logits of targets
// and probes. Logits never exist as [R, V].
//
// A row's chunks of the vocabulary are visited in order, each summed in one fixed order: neither the other rows nor the
// statistics asked for change a bit of it. Logits and sums are float32 for bfloat16 inputs, row states float64.
//
// H100, 4096 x 151,936, H 896, bfloat16: products 1.12 TFLOP, 1.13 ms at 989 TFLOP/s, 1.6 ms at the 700 within reach.
// Logits 2.5 GB written (beside the product) and read once, from L2 for the most part: 0.5 ms at 5 TB/s, 0.75 ms
// at 3.35. 38 chunks x 2 blocks x 2 launches. Expected 2.2-2.5 ms in 32 MB + 0.2 MB; PyTorch's bfloat16 logits, float32
// log-softmax and gather move 1.2 + 1.2 + 2.5 + 5 + 2.5 GB, 3.7 ms beside the product, and hold 3.7 GB.
#include "cuda/head.h"

namespace kg::cuda {

namespace {

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
struct Forward {
  C *logProbs, *lse, *stats, *probeLogProbs;  // the last two: nullptr where they are not wanted
  const int32_t *targetRow, *targetId, *probes;
  int64_t targets, probeCount, rows, vocabulary;
  const C* logits;
  RowState* states;
  FaultSink faults;
};

// The sums of one chunk, relative to the row's new maximum.
template <class C>
struct ChunkSums {
  C sum = 0, weighted = 0, squares = 0, total = 0;

  template <bool kStatistics>
  KG_DEVICE void add(C logit, C newMax) {
    const C d = logit - newMax, e = std::exp(d);
    sum += e;
    if constexpr (kStatistics) {
      weighted += e * d;
      squares += e * e;
      total += logit;
    }
  }
};

template <class C>
KG_DEVICE C blockMax(C v, C* shared) {
  return blockReduce(v, C(-INFINITY), shared, [](C a, C b) { return a > b ? a : b; });
}

// Takes a chunk's sums into a row's state; columns are visited from 0.
template <bool kStatistics, class C>
KG_DEVICE void addChunk(RowState& s, const ChunkSums<C>& chunk, C newMax, bool first, int64_t argmax) {
  const double d = first ? 0.0 : s.max - double(newMax), scale = first ? 0.0 : std::exp(d);
  if constexpr (kStatistics) {
    if (first || double(newMax) > s.max) s.argmax = argmax;
    s.weighted = (first ? 0.0 : scale * (s.weighted + d * s.sum)) + double(chunk.weighted);
    s.squares = (first ? 0.0 : scale * scale * s.squares) + double(chunk.squares);
    s.total = (first ? 0.0 : s.total) + double(chunk.total);
  }
  s.sum = (first ? 0.0 : scale * s.sum) + double(chunk.sum);
  s.max = newMax;
}

// One row of the block, by all threads of a block.
template <bool kStatistics, class C>
KG_DEVICE void visitRow(const Forward<C>& f, const LogitsBlock& block, int64_t row, C* shared, int32_t* sharedIndex) {
  RowState& state = f.states[block.firstRow + row];
  const bool first = block.firstColumn == 0;
  const C oldMax = first ? C(-INFINITY) : C(state.max);
  ChunkRow<C> l;
  l.read(f.logits + row * kChunk, block.columns);
  C top = -INFINITY;
  l.forEach(block.columns, [&](C v, int) { top = v > top ? v : top; });
  top = blockMax(top, shared);
  const C newMax = top > oldMax ? top : oldMax;

  ChunkSums<C> sums;
  int32_t at = kChunk;
  l.forEach(block.columns, [&](C v, int column) {
    sums.template add<kStatistics>(v, newMax);
    if (kStatistics && v == top && column < at) at = column;
  });
  sums.sum = blockSum(sums.sum, shared);
  if constexpr (kStatistics) {
    sums.weighted = blockSum(sums.weighted, shared);
    sums.squares = blockSum(sums.squares, shared);
    sums.total = blockSum(sums.total, shared);
    at = blockReduce(at, int32_t(kChunk), sharedIndex, [](int32_t a, int32_t b) { return a < b ? a : b; });
  }
  if (threadIdx.x == 0) addChunk<kStatistics>(state, sums, newMax, first, block.firstColumn + at);
}

// Keeps the logits of the probes that lie in the block.
template <class C>
KG_DEVICE void keepProbes(const Forward<C>& f, const LogitsBlock& block, int64_t row) {
  if (!f.probeLogProbs) return;
  for (int64_t q = threadIdx.x; q < f.probeCount; q += kHeadThreads) {
    const int32_t id = f.probes[q];
    if (block.hasColumn(id)) {
      f.probeLogProbs[(block.firstRow + row) * f.probeCount + q] = f.logits[row * kChunk + id - block.firstColumn];
    }
  }
}

// The first block.rows blocks of threads have a row each, the others look for targets in the block of logits.
template <class C, bool kStatistics>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kHeadThreads) visitKernel(Forward<C> f, LogitsBlock block) {
  KG_SHARED(C, shared, kWarp);
  KG_SHARED(int32_t, sharedIndex, kWarp);
  const int64_t row = blockIdx.x;
  if (row < block.rows) {
    visitRow<kStatistics>(f, block, row, shared, sharedIndex);
    keepProbes(f, block, row);
    return;
  }
  const int64_t n = (row - block.rows) * kHeadThreads + threadIdx.x;
  if (n >= f.targets) return;
  const int32_t target = f.targetRow[n], id = f.targetId[n];
  if (block.hasColumn(id) && block.hasRow(target)) f.logProbs[n] = f.logits[block.at(target, id)];
}

KG_DEVICE double logSumExp(const RowState& s) { return s.max + std::log(s.sum); }

template <class C>
KG_DEVICE void finishRow(const Forward<C>& f, int64_t r) {
  const RowState& s = f.states[r];
  f.lse[r] = static_cast<C>(logSumExp(s));
  if (!f.stats) return;
  C* out = f.stats + r * 4;
  out[0] = static_cast<C>(std::log(s.sum) - s.weighted / s.sum);
  out[1] = static_cast<C>(s.argmax);
  out[2] = static_cast<C>(s.total / double(f.vocabulary));
  out[3] = static_cast<C>(std::log(s.squares) - 2 * std::log(s.sum));
}

template <class C>
KG_DEVICE void finishTarget(const Forward<C>& f, int64_t n) {
  const int32_t row = f.targetRow[n], id = f.targetId[n];
  const bool rowFault = row < 0 || row >= f.rows, idFault = id < 0 || id >= f.vocabulary;
  if (rowFault) reportFault(f.faults, FaultKind::RowOutOfRange, row, n, f.rows);
  if (idFault) reportFault(f.faults, FaultKind::IdOutOfRange, id, n, f.vocabulary);
  f.logProbs[n] = rowFault || idFault ? C(NAN) : static_cast<C>(double(f.logProbs[n]) - logSumExp(f.states[row]));
}

template <class C>
KG_DEVICE void finishProbe(const Forward<C>& f, int64_t at) {
  const int64_t row = at / f.probeCount, q = at % f.probeCount;
  const int32_t id = f.probes[q];
  const bool fault = id < 0 || id >= f.vocabulary;
  if (fault) reportFault(f.faults, FaultKind::ProbeOutOfRange, id, q, f.vocabulary);
  f.probeLogProbs[at] = fault ? C(NAN) : static_cast<C>(double(f.probeLogProbs[at]) - logSumExp(f.states[row]));
}

// From kept logits and final states to the outputs: a thread for every row, target and probe.
template <class C>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kHeadThreads) finishKernel(Forward<C> f) {
  int64_t at = static_cast<int64_t>(blockIdx.x) * kHeadThreads + threadIdx.x;
  if (at < f.rows) return finishRow(f, at);
  at -= f.rows;
  if (at < f.targets) return finishTarget(f, at);
  at -= f.targets;
  if (f.probeLogProbs && at < f.rows * f.probeCount) finishProbe(f, at);
}

template <class T, bool kStatistics>
void vocabHead(const Call& call) {
  using C = compute_t<T>;
  const TensorView &hidden = call[4], &weight = call[5];
  const int64_t rows = hidden.size(0), width = hidden.size(1), vocabulary = weight.size(0);
  const int64_t blockRows = rowsPerBlock<C>(rows);
  Workspace workspace;
  const size_t logitsAt = workspace.reserve<C>(blockRows * kChunk), statesAt = workspace.reserve<RowState>(rows);
  workspace.allocate(call);
  C* logits = workspace.get<C>(logitsAt);
  const bool probes = call[3].present();
  const Forward<C> f{call[0].ptr<C>(),
                     call[1].ptr<C>(),
                     kStatistics ? call[2].ptr<C>() : nullptr,
                     probes ? call[3].ptr<C>() : nullptr,
                     call[6].ptr<int32_t>(),
                     call[7].ptr<int32_t>(),
                     probes ? call[8].ptr<int32_t>() : nullptr,
                     call[6].numel(),
                     probes ? call[8].numel() : 0,
                     rows,
                     vocabulary,
                     logits,
                     workspace.get<RowState>(statesAt),
                     context(call).faults};
  forBlocks(rows, blockRows, vocabulary, [&](const LogitsBlock& block) {
    computeLogits(call, logits, hidden.ptr<T>(), weight.ptr<T>(), block, width);
    launch(call, {gridOf(block.rows + ceilDiv(f.targets, kHeadThreads)), kHeadThreads}, visitKernel<C, kStatistics>, f,
           block);
  });
  const int64_t items = rows + f.targets + rows * f.probeCount;
  launch(call, {gridOf(ceilDiv(items, kHeadThreads)), kHeadThreads}, finishKernel<C>, f);
}

}  // namespace

void kernel_vocabHead(const Call& call) {
  dispatchFloat(call[4].dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatchFlag(call[2].present(), [&](auto statistics) { vocabHead<T, decltype(statistics)::value>(call); });
  });
}

}  // namespace kg::cuda
