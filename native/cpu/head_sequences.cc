// The vocabulary head's backward by sequence, and its tangent. Row n has one target; D = onehot - softmax exists for
// one chunk of the vocabulary at a time, for all rows. Chunks are visited in order and summed in order.
#include "cpu/head.h"

namespace kg::cpu::KG_ISA {

namespace {

struct HeadSequence {
  int64_t row, rows, probe, probes;
};

// Rows, sequences and probes of a call: what both kernels read. D is a [N, kChunkStride] chunk.
template <class T>
struct HeadRows {
  using C = compute_t<T>;
  static constexpr bool kNarrow = sizeof(T) != sizeof(C);  // bfloat16: products take it, sums do not
  int64_t rows, width, vocabulary, sequences;
  const T *hidden, *weight;
  const C* lse;
  const int32_t *target, *table, *probeIds;

  // `at`: the tensor `hidden`; then weight, lse, targetId, sequences, probeIds.
  HeadRows(const Call& call, int at) {
    rows = call[at].size(0);
    width = call[at].size(1);
    vocabulary = call[at + 1].size(0);
    sequences = call[at + 4].size(0);
    hidden = call[at].ptr<T>();
    weight = call[at + 1].ptr<T>();
    lse = call[at + 2].ptr<C>();
    target = call[at + 3].ptr<int32_t>();
    table = call[at + 4].ptr<int32_t>();
    probeIds = call[at + 5].ptr<int32_t>();
    checkIndices("targetId", target, rows, vocabulary);
    checkIndices("probeIds", probeIds, call[at + 5].numel(), vocabulary);
    check(call[at + 5].numel());
  }
  HeadSequence operator[](int64_t s) const {
    return {table[4 * s], table[4 * s + 1], table[4 * s + 2], table[4 * s + 3]};
  }
  void check(int64_t probeCount) const {
    int64_t next = 0;
    for (int64_t s = 0; s < sequences; s++) {
      const HeadSequence q = (*this)[s];
      if (q.row != next || q.rows < 0 || q.probe < 0 || q.probes < 0 || q.probe + q.probes > probeCount)
        fail(
            "expected sequence %lld to start at row %lld with its probes in [0, %lld), found rows %lld + %lld, probes "
            "%lld + %lld",
            (long long)s, (long long)next, (long long)probeCount, (long long)q.row, (long long)q.rows,
            (long long)q.probe, (long long)q.probes);
      next += q.rows;
    }
    if (next != rows) fail("expected sequences to cover %lld rows, found %lld", (long long)rows, (long long)next);
  }
};

// d = onehot - softmax of one row's logits l in the chunk [first, first + columns); d may be l.
template <class C>
KG_INLINE void differenceRow(C* d, const C* l, C lse, int64_t target, int64_t first, int64_t columns) {
  const Vec<C> shift(lse), zero(C(0));
  forVectors<C>(columns, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    storeLanes(d + i, zero - vexp(loadLanes<C>(l + i, count) - shift), count);
  });
  if (target >= first && target < first + columns) d[target - first] += C(1);
}

// out = x in another dtype.
template <class T, class C>
KG_INLINE void writeRow(T* out, const C* x, int64_t n) {
  forVectors<C>(n,
                [&](int64_t i, int count) KG_LAMBDA_INLINE { storeLanes(out + i, loadLanes<C>(x + i, count), count); });
}

template <class T, class C>
void writeNarrow(T* out, const C* values, int64_t n) {
  parallelFor(n, kElementsPerTask,
              [&](int64_t begin, int64_t end, int) { writeRow(out + begin, values + begin, end - begin); });
}

// ---- backward by sequence ----------------------------------------------------------------------------------------

template <class T>
struct SequencesCall {
  using C = compute_t<T>;
  explicit SequencesCall(const Call& call) : head(call, 5) {}
  HeadRows<T> head;
  C *dhidden, *gram, *probes, *first, *second, *differences;
  T *narrow, *scaled;  // D as products take it; hidden times the coefficients of each of the two gradients, [2, N, H]
  int64_t side, probeSide, secondRows;
};

template <class T, class C>
void spreadRow(const SequencesCall<T>& p, int64_t s, int64_t row, const LogitsBlock& b) {
  const HeadSequence q = p.head[s];
  C* d = p.differences + row * kChunkStride;
  differenceRow(d, d, p.head.lse[row], p.head.target[row], b.firstColumn, b.columns);
  for (int64_t j = 0; p.probes && j < q.probes; j++) {
    const int64_t id = p.head.probeIds[q.probe + j];
    if (b.hasColumn(id)) p.probes[row * p.probeSide + j] = d[id - b.firstColumn];
  }
  if constexpr (sizeof(T) != sizeof(C)) writeRow(p.narrow + row * kChunkStride, d, b.columns);
}

// out += sum over the first `rows` of D[r]^T scaled[r], the coefficients already in `scaled`.
template <class T, class C>
void addShare(const SequencesCall<T>& p, C* out, const T* scaled, int64_t rows, const LogitsBlock& b) {
  if (!out || rows == 0) return;
  gemm({dtypeOf<T>(), dtypeOf<C>(), b.columns, p.head.width, rows, p.narrow, 1, kChunkStride, scaled, p.head.width, 1,
        out + b.firstColumn * p.head.width, p.head.width, 1.0, true});
}

// scaled[r] = coefficients[r] * hidden[r]: a row of hidden is much shorter than one of D.
template <class T, class C>
void scaleHidden(const HeadRows<T>& h, T* scaled, const C* coefficients, int64_t rows) {
  parallelFor(rows, rowGrain(h.width), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      const T* hidden = h.hidden + r * h.width;
      T* out = scaled + r * h.width;
      const Vec<C> factor(coefficients[r]);
      forVectors<C>(h.width, [&](int64_t i, int count) KG_LAMBDA_INLINE {
        storeLanes(out + i, factor * loadLanes<C>(hidden + i, count), count);
      });
    }
  });
}

template <class T>
void sequencesChunk(const SequencesCall<T>& p, const LogitsBlock& b) {
  using C = compute_t<T>;
  const HeadRows<T>& h = p.head;
  const T* weight = h.weight + b.firstColumn * h.width;
  computeLogits(p.differences, h.hidden, weight, h.rows, b.columns, h.width);
  for (int64_t s = 0; s < h.sequences; s++) {
    const HeadSequence q = h[s];
    parallelFor(q.rows, rowGrain(b.columns), [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; r++) spreadRow<T, C>(p, s, q.row + r, b);
    });
    const T* d = p.narrow + q.row * kChunkStride;
    if (!p.gram) continue;
    gemm({dtypeOf<T>(), dtypeOf<C>(), q.rows, q.rows, b.columns, d, kChunkStride, 1, d, 1, kChunkStride,
          p.gram + s * p.side * p.side, p.side, 1.0, true, nullptr, true});
  }
  gemm({dtypeOf<T>(), dtypeOf<C>(), h.rows, h.width, b.columns, p.narrow, kChunkStride, 1, weight, h.width, 1,
        p.dhidden, h.width, 1.0, b.firstColumn > 0});
  addShare(p, p.first, p.scaled, h.rows, b);
  addShare(p, p.second, p.scaled + h.rows * h.width, p.secondRows, b);
}

template <class T>
void vocabHeadSequences(const Call& call) {
  using C = compute_t<T>;
  SequencesCall<T> p(call);
  const int64_t rows = p.head.rows, chunk = rows * kChunkStride;
  const bool shares = call[3].present() || call[4].present();
  if (shares && !call[11].present()) fail("expected coefficients where gradients are accumulated");
  Workspace workspace;
  const size_t differencesAt = workspace.reserve<C>(chunk);
  const size_t narrowAt = workspace.reserve<T>(p.head.kNarrow ? chunk : 0);
  const size_t scaledAt = workspace.reserve<T>(shares ? 2 * rows * p.head.width : 0);
  const size_t hiddenAt = workspace.reserve<C>(p.head.kNarrow ? rows * p.head.width : 0);
  workspace.allocate(call);
  p.differences = workspace.get<C>(differencesAt);
  p.narrow = workspace.get<T>(p.head.kNarrow ? narrowAt : differencesAt);
  p.scaled = workspace.get<T>(scaledAt);
  p.dhidden = p.head.kNarrow ? workspace.get<C>(hiddenAt) : call[0].ptr<C>();
  p.gram = call[1].present() ? call[1].ptr<C>() : nullptr;
  p.side = p.gram ? call[1].size(1) : 0;
  p.probes = call[2].present() ? call[2].ptr<C>() : nullptr;
  p.probeSide = p.probes ? call[2].size(1) : 0;
  p.first = call[3].present() ? call[3].ptr<C>() : nullptr;
  p.second = call[4].present() ? call[4].ptr<C>() : nullptr;
  p.secondRows = call.intAttr(0);
  if (p.first) scaleHidden(p.head, p.scaled, call[11].ptr<C>(), rows);
  if (p.second) scaleHidden(p.head, p.scaled + rows * p.head.width, call[11].ptr<C>() + rows, p.secondRows);
  if (p.gram) memset(static_cast<void*>(p.gram), 0, call[1].numel() * sizeof(C));
  if (p.probes) memset(static_cast<void*>(p.probes), 0, call[2].numel() * sizeof(C));
  forBlocks(rows, rows, p.head.vocabulary, [&](const LogitsBlock& b) { sequencesChunk(p, b); });
  if (p.head.kNarrow) writeNarrow(call[0].ptr<T>(), p.dhidden, rows * p.head.width);
}

// ---- tangent -----------------------------------------------------------------------------------------------------

// Rows are stacked in pairs of blocks, so that two products are one: [hidden; hiddenDot] weight^T gives the logits and
// their tangent, [dl; D]^T [hidden; hiddenDot] the weight's gradient.
template <class T>
struct TangentCall {
  using C = compute_t<T>;
  explicit TangentCall(const Call& call) : head(call, 6) {}
  HeadRows<T> head;
  int64_t side, probeSide;
  const C *gramDot, *probesDot;
  const T* weightDot;
  T *stacked, *gramNarrow, *products;    // [2N, H]; gramDot doubled [S, side, side]; [dl; D] as the products take them
  C *chunk, *shift, *dhidden, *dweight;  // chunk: [2N, kChunkStride], logits and l, then D and dl
};

// chunk: rows of logits -> D (second half of `products`), rows of l complete but for gramDot, which needs all D.
template <class T>
void tangentLogits(const TangentCall<T>& p, const LogitsBlock& b) {
  using C = compute_t<T>;
  const HeadRows<T>& h = p.head;
  C *d = p.chunk, *l = p.chunk + h.rows * kChunkStride;
  T* narrow = p.products + h.rows * kChunkStride;
  computeLogits(p.chunk, p.stacked, h.weight + b.firstColumn * h.width, 2 * h.rows, b.columns, h.width);
  if (p.weightDot)
    gemm({dtypeOf<T>(), dtypeOf<C>(), h.rows, b.columns, h.width, h.hidden, h.width, 1,
          p.weightDot + b.firstColumn * h.width, 1, h.width, l, kChunkStride, 1.0, true});
  for (int64_t s = 0; s < h.sequences; s++) {
    const HeadSequence q = h[s];
    parallelFor(q.rows, rowGrain(b.columns), [&](int64_t begin, int64_t end, int) {
      for (int64_t r = q.row + begin; r < q.row + end; r++) {
        C* row = d + r * kChunkStride;
        differenceRow(row, row, h.lse[r], h.target[r], b.firstColumn, b.columns);
        writeRow(narrow + r * kChunkStride, row, b.columns);
        for (int64_t j = 0; p.probesDot && j < q.probes; j++) {
          const int64_t id = h.probeIds[q.probe + j];
          if (b.hasColumn(id)) l[r * kChunkStride + id - b.firstColumn] += p.probesDot[r * p.probeSide + j];
        }
      }
    });
    if (p.gramDot)
      gemm({dtypeOf<T>(), dtypeOf<C>(), q.rows, b.columns, q.rows, p.gramNarrow + s * p.side * p.side, p.side, 1,
            narrow + q.row * kChunkStride, kChunkStride, 1, l + q.row * kChunkStride, kChunkStride, 1.0, true});
  }
}

template <class T>
void addShift(const TangentCall<T>& p, const LogitsBlock& b) {
  using C = compute_t<T>;
  const int64_t rows = p.head.rows;
  parallelFor(rows, rowGrain(b.columns), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      const C *d = p.chunk + r * kChunkStride, *l = p.chunk + (rows + r) * kChunkStride;
      Vec<C> sum(C(0));
      forVectors<C>(b.columns, [&](int64_t i, int count) KG_LAMBDA_INLINE {
        sum = sum - loadLanes<C>(d + i, count) * loadLanes<C>(l + i, count);
      });
      const int64_t target = p.head.target[r];
      p.shift[r] += hsum(sum) + (b.hasColumn(target) ? l[target - b.firstColumn] : C(0));
    }
  });
}

// products: first half dl = -softmax (l - shift).
template <class T>
void tangentDifferences(const TangentCall<T>& p, const LogitsBlock& b) {
  using C = compute_t<T>;
  const int64_t rows = p.head.rows;
  parallelFor(rows, rowGrain(b.columns), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      const C *d = p.chunk + r * kChunkStride, shift = p.shift[r];
      C* l = p.chunk + (rows + r) * kChunkStride;
      const int64_t target = p.head.target[r] - b.firstColumn;
      const bool has = b.hasColumn(p.head.target[r]);
      const C there = has ? (d[target] - C(1)) * (l[target] - shift) : C(0);
      forVectors<C>(b.columns, [&](int64_t i, int count) KG_LAMBDA_INLINE {
        storeLanes(l + i, loadLanes<C>(d + i, count) * (loadLanes<C>(l + i, count) - Vec<C>(shift)), count);
      });
      if (has) l[target] = there;
      writeRow(p.products + r * kChunkStride, l, b.columns);
    }
  });
}

template <class T>
void tangentChunk(const TangentCall<T>& p, const LogitsBlock& b) {
  using C = compute_t<T>;
  const HeadRows<T>& h = p.head;
  tangentLogits(p, b);
  tangentDifferences(p, b);
  const T* weight = h.weight + b.firstColumn * h.width;
  gemm({dtypeOf<T>(), dtypeOf<C>(), h.rows, h.width, b.columns, p.products, kChunkStride, 1, weight, h.width, 1,
        p.dhidden, h.width, 1.0, b.firstColumn > 0});
  if (p.weightDot)
    gemm({dtypeOf<T>(), dtypeOf<C>(), h.rows, h.width, b.columns, p.products + h.rows * kChunkStride, kChunkStride, 1,
          p.weightDot + b.firstColumn * h.width, h.width, 1, p.dhidden, h.width, 1.0, true});
  if (p.dweight)
    gemm({dtypeOf<T>(), dtypeOf<C>(), b.columns, h.width, 2 * h.rows, p.products, 1, kChunkStride, p.stacked, h.width,
          1, p.dweight + b.firstColumn * h.width, h.width, 1.0, true});
}

template <class T>
void fillStacks(const Call& call, const TangentCall<T>& p) {
  using C = compute_t<T>;
  const int64_t block = p.head.rows * p.head.width;
  memcpy(static_cast<void*>(p.stacked), p.head.hidden, block * sizeof(T));
  memcpy(static_cast<void*>(p.stacked + block), call[2].ptr<T>(), block * sizeof(T));
  if (!p.gramDot) return;
  const int64_t n = call[3].numel();
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    storeLanes(p.gramNarrow + i, Vec<C>(C(2)) * loadLanes<C>(p.gramDot + i, count), count);
  });
}

template <class T>
void vocabHeadTangent(const Call& call) {
  using C = compute_t<T>;
  TangentCall<T> p(call);
  const int64_t rows = p.head.rows, width = p.head.width;
  p.gramDot = call[3].present() ? call[3].ptr<C>() : nullptr;
  p.side = p.gramDot ? call[3].size(1) : 0;
  p.probesDot = call[4].present() ? call[4].ptr<C>() : nullptr;
  p.probeSide = p.probesDot ? call[4].size(1) : 0;
  p.weightDot = call[5].present() ? call[5].ptr<T>() : nullptr;
  Workspace workspace;
  const size_t chunkAt = workspace.reserve<C>(2 * rows * kChunkStride);
  const size_t productsAt = workspace.reserve<T>(2 * rows * kChunkStride);
  const size_t stackedAt = workspace.reserve<T>(2 * rows * width);
  const size_t gramAt = workspace.reserve<T>(p.gramDot ? call[3].numel() : 0);
  const size_t shiftAt = workspace.reserve<C>(rows);
  const size_t hiddenAt = workspace.reserve<C>(p.head.kNarrow ? rows * width : 0);
  workspace.allocate(call);
  p.chunk = workspace.get<C>(chunkAt);
  p.products = workspace.get<T>(productsAt);
  p.stacked = workspace.get<T>(stackedAt);
  p.gramNarrow = workspace.get<T>(gramAt);
  p.shift = workspace.get<C>(shiftAt);
  p.dhidden = p.head.kNarrow ? workspace.get<C>(hiddenAt) : call[0].ptr<C>();
  p.dweight = call[1].present() ? call[1].ptr<C>() : nullptr;
  fillStacks(call, p);
  if (call[12].present()) {
    memcpy(static_cast<void*>(p.shift), call[12].ptr<C>(), rows * sizeof(C));
  } else {
    memset(static_cast<void*>(p.shift), 0, rows * sizeof(C));
    forBlocks(rows, rows, p.head.vocabulary, [&](const LogitsBlock& b) {
      tangentLogits(p, b);
      addShift(p, b);
    });
  }
  forBlocks(rows, rows, p.head.vocabulary, [&](const LogitsBlock& b) { tangentChunk(p, b); });
  if (p.head.kNarrow) writeNarrow(call[0].ptr<T>(), p.dhidden, rows * width);
}

}  // namespace

void kernel_vocabHeadSequences(const Call& call) {
  dispatchFloating(call[5].dtype, [&](auto t) { vocabHeadSequences<decltype(t)>(call); });
}

void kernel_vocabHeadTangent(const Call& call) {
  dispatchFloating(call[6].dtype, [&](auto t) { vocabHeadTangent<decltype(t)>(call); });
}

}  // namespace kg::cpu::KG_ISA
