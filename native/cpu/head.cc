// The vocabulary head, forward: hidden @ weight^T, log-softmax and the gather of targets in one pass over the
// vocabulary. Logits exist for one block of rows and one chunk of columns at a time, never as [R, V].
#include "cpu/head.h"

namespace kg::cpu::KG_ISA {

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

// The sums of one chunk, relative to top. That of e takes the steps of sumExp: asking for statistics changes no bit of
// it.
template <class C>
KG_INLINE RowState chunkStatistics(const C* l, int64_t n, C top) {
  const Vec<C> shift(top);
  Vec<C> sum(C(0)), weighted(C(0)), squares(C(0)), total(C(0));
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const Vec<C> v = loadLogits(l + i, count), e = vexp(v - shift);
    const bool whole = count == Vec<C>::N;
    const Vec<C> d = (whole ? v : Vec<C>::loadPartial(l + i, count, top)) - shift;  // 0 beyond the end
    sum += e;
    weighted += e * d;
    squares += e * e;
    total += whole ? v : Vec<C>::loadPartial(l + i, count);
  });
  return {double(top), double(hsum(sum)), double(hsum(weighted)), double(hsum(squares)), double(hsum(total)), 0};
}

template <class C>
KG_INLINE int64_t firstEqual(const C* l, int64_t n, C value) {
  int64_t i = 0;
  while (i < n && l[i] != value) i++;
  return i;
}

KG_INLINE void addChunk(RowState& s, double newMax, double chunkSum) {
  s.sum = s.sum * m::exp(s.max - newMax) + chunkSum;
  s.max = newMax;
}

// Online log-sum-exp: takes in the next chunk of a row.
template <class C>
KG_INLINE void visitChunk(RowState& s, const C* l, int64_t n) {
  const C top = rowMax(l, n), newMax = top > C(s.max) ? top : C(s.max);
  addChunk(s, newMax, sumExp(l, n, newMax));
}

template <class C>
KG_INLINE void visitChunkWithStatistics(RowState& s, const C* l, int64_t n, int64_t firstColumn) {
  const C top = rowMax(l, n), newMax = top > C(s.max) ? top : C(s.max);
  if (double(top) > s.max) s.argmax = firstColumn + firstEqual(l, n, top);
  const RowState chunk = chunkStatistics(l, n, newMax);
  if (firstColumn > 0) {
    const double d = s.max - double(newMax), scale = m::exp(d);
    s.weighted = scale * (s.weighted + d * s.sum);
    s.squares *= scale * scale;
  }
  addChunk(s, newMax, chunk.sum);
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

template <class C>
void visitRows(RowState* states, const C* logits, const LogitsBlock& block, bool statistics) {
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
void gatherLogits(const Call& call, const C* logits, const LogitsBlock& block) {
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

  const int64_t blockRows = rowsPerBlock(rows, sizeof(C));
  Workspace workspace;
  const size_t logitsAt = workspace.reserve<C>(blockRows * kChunkStride), statesAt = workspace.reserve<RowState>(rows);
  workspace.allocate(call);
  C* logits = workspace.get<C>(logitsAt);
  RowState* states = workspace.get<RowState>(statesAt);
  for (int64_t r = 0; r < rows; r++) states[r] = {-__builtin_inf(), 0, 0, 0, 0, 0};

  forBlocks(rows, blockRows, vocabulary, [&](const LogitsBlock& b) {
    computeLogits(logits, hidden.ptr<T>() + b.firstRow * width, weight.ptr<T>() + b.firstColumn * width, b.rows,
                  b.columns, width);
    visitRows(states, logits, b, call[2].present());
    gatherLogits(call, logits, b);
  });
  finishForward<C>(call, states, rows, vocabulary);
}

}  // namespace

void kernel_vocabHead(const Call& call) {
  dispatchFloating(call[4].dtype, [&](auto t) { vocabHead<decltype(t)>(call); });
}

}  // namespace kg::cpu::KG_ISA
