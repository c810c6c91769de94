// The vocabulary head's backward by sequence, and its tangent (contract: kernels.def, vocabHeadSequences and
// vocabHeadTangent). Row n has one target; D = onehot - softmax exists for one chunk of the vocabulary at a time, for
// all rows. Chunks are visited in order and added in order.
//
// Where a sequence's rows begin is known on the device alone: products by sequence (gram matrices) run over rows packed
// as [S, M, chunk], zeros beyond a sequence's rows, all of one shape.
//
// H100, 2048 rows in 8 sequences of 256, V 151,936, H 896, bfloat16: backward, logits and dhidden 2 x 0.56 TFLOP, gram
// 0.16 TFLOP, with both weight gradients 1.1 TFLOP more: 1.8 ms at 700 TFLOP/s without them, 3.4 ms with; D, 1.2 GB of
// float32 written and read and 0.6 GB of bfloat16 a copy, 0.9-1.3 ms. Tangent: 7 products of 0.56 TFLOP and gram's, 5.9
// ms, and 4 passes over [2 N, V] of float32, 2.5 ms; without a shift half of both again.
#include "cuda/head.h"

namespace kg::cuda {

namespace {

// Rows, sequences and probes of a call: what both kernels read.
template <class T>
struct HeadRows {
  using C = compute_t<T>;
  int64_t rows, width, vocabulary, sequences, probeCount;
  int64_t side, probeSide;  // rows and probes that a sequence may have; 0 where nothing asks for them
  const T *hidden, *weight;
  const C* lse;
  const int32_t *target, *table, *probeIds;
  int32_t* sequenceOf;  // [rows]: -1 where the table is wrong
  FaultSink faults;

  // `at`: the tensor `hidden`; then weight, lse, targetId, sequences, probeIds.
  HeadRows(const Call& call, int at, const TensorView& gram, const TensorView& probes)
      : rows(call[at].size(0)),
        width(call[at].size(1)),
        vocabulary(call[at + 1].size(0)),
        sequences(call[at + 4].size(0)),
        probeCount(call[at + 5].numel()),
        side(gram.present() ? gram.size(1) : 0),
        probeSide(probes.present() ? probes.size(1) : 0),
        hidden(call[at].ptr<T>()),
        weight(call[at + 1].ptr<T>()),
        lse(call[at + 2].ptr<C>()),
        target(call[at + 3].ptr<int32_t>()),
        table(call[at + 4].ptr<int32_t>()),
        probeIds(call[at + 5].ptr<int32_t>()),
        sequenceOf(nullptr),
        faults(context(call).faults) {}

  // Is entry s of the table as it must be, apart from where its rows begin?
  KG_DEVICE bool sound(int64_t s) const {
    const int32_t *q = table + 4 * s, count = q[1], probe = q[2], probes = q[3];
    return count >= 0 && (side == 0 || count <= side) && probe >= 0 && probes >= 0 && probe + probes <= probeCount &&
           (probeSide == 0 || probes <= probeSide);
  }
  KG_DEVICE int64_t firstRow(int64_t s) const { return table[4 * s]; }
  // Where row r lies among rows packed by sequence.
  KG_DEVICE int64_t slot(int64_t r) const { return sequenceOf[r] * side + r - firstRow(sequenceOf[r]); }
};

// Checks the table and the ids, and finds each row's sequence.
template <class T>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kHeadThreads) checkRows(HeadRows<T> h) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kHeadThreads + threadIdx.x;
  if (i < h.rows) {
    int32_t found = -1;
    for (int32_t s = 0; s < h.sequences; s++) {
      if (h.sound(s) && i >= h.firstRow(s) && i - h.firstRow(s) < h.table[4 * s + 1]) found = s;
    }
    h.sequenceOf[i] = found;
    const int32_t id = h.target[i];
    if (id < 0 || id >= h.vocabulary) reportFault(h.faults, FaultKind::IdOutOfRange, id, i, h.vocabulary);
  }
  if (i < h.probeCount) {
    const int32_t id = h.probeIds[i];
    if (id < 0 || id >= h.vocabulary) reportFault(h.faults, FaultKind::ProbeOutOfRange, id, i, h.vocabulary);
  }
  if (i <= h.sequences) {
    const int64_t start = i == 0 ? 0 : h.firstRow(i - 1) + h.table[4 * (i - 1) + 1];
    const int64_t expected = i == h.sequences ? h.rows : h.firstRow(i);
    if (start != expected || (i < h.sequences && !h.sound(i))) reportFault(h.faults, FaultKind::BadSegments, i, 0, 0);
  }
}

template <class T>
void checkOnDevice(const Call& call, const HeadRows<T>& h) {
  int64_t items = h.rows > h.probeCount ? h.rows : h.probeCount;
  items = items > h.sequences + 1 ? items : h.sequences + 1;
  launch(call, {gridOf(ceilDiv(items, kHeadThreads)), kHeadThreads}, checkRows<T>, h);
}

void clear(const Call& call, void* data, int64_t bytes) {
  if (bytes > 0) check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), context(call).stream), "cudaMemset");
}

// What D of row r is computed with: NaN where the data is at fault.
template <class T>
KG_DEVICE compute_t<T> shiftOf(const HeadRows<T>& h, int64_t r) {
  const bool sound = h.sequenceOf[r] >= 0 && h.target[r] >= 0 && h.target[r] < h.vocabulary;
  return sound ? h.lse[r] : compute_t<T>(NAN);
}

// One element of D.
template <class C>
KG_DEVICE C difference(C logit, C lse, bool isTarget) {
  return (isTarget ? C(1) : C(0)) - std::exp(logit - lse);
}

template <class T, class C>
KG_DEVICE void writeScaled(T* out, const ChunkRow<C>& row, C factor, int columns) {
  ChunkRow<C> scaled;
  KG_UNROLL for (int i = 0; i < kPerThread; i++) scaled.v[i] = factor * row.v[i];
  scaled.write(out, columns);
}

template <class T, class C>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kHeadThreads) narrowKernel(T* out, const C* values, int64_t count, C factor) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kHeadThreads + threadIdx.x;
  if (i < count) out[i] = T(factor * values[i]);
}

template <class T, class C>
void writeNarrow(const Call& call, T* out, const C* values, int64_t count, C factor) {
  launch(call, {gridOf(ceilDiv(count, kHeadThreads)), kHeadThreads}, narrowKernel<T, C>, out, values, count, factor);
}

// ---- backward by sequence
// ---------------------------------------------------------------------------------------------

template <class T>
struct Sequences {
  using C = compute_t<T>;
  HeadRows<T> head;
  C* logits;     // [N, kChunk]; D in place, rows of T with the row stride of C
  T* packed;     // [S, M, kChunk], or nullptr
  T* shares[2];  // [N, kChunk] D by coefficients, for first and second, or nullptr
  C *dhidden, *gram, *probes, *weights[2];
  const C* coefficients;  // [2, N]
  int64_t shareRows[2];
};

// D[n, id] at the ids of the row's sequence, from logits that are still in memory.
template <class T>
KG_DEVICE void keepProbes(const Sequences<T>& p, const LogitsBlock& block, int64_t row, compute_t<T> lse) {
  using C = compute_t<T>;
  const HeadRows<T>& h = p.head;
  const int32_t s = h.sequenceOf[row];
  if (!p.probes || s < 0) return;
  const int32_t first = h.table[4 * s + 2], count = h.table[4 * s + 3];
  for (int j = static_cast<int>(threadIdx.x); j < count; j += kHeadThreads) {
    const int32_t id = h.probeIds[first + j];
    C& out = p.probes[row * h.probeSide + j];
    if (block.hasColumn(id)) out = difference(p.logits[block.at(row, id)], lse, id == h.target[row]);
    if (block.firstColumn == 0 && (id < 0 || id >= h.vocabulary)) out = C(NAN);
  }
}

template <class T>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kHeadThreads) differencesKernel(Sequences<T> p, LogitsBlock block) {
  using C = compute_t<T>;
  const int64_t row = blockIdx.x;
  const HeadRows<T>& h = p.head;
  C* logits = p.logits + row * kChunk;
  const C lse = shiftOf(h, row);
  const int target = h.target[row] - block.firstColumn;
  ChunkRow<C> d;
  d.read(logits, block.columns);
  d.forEach(block.columns, [&](C& v, int column) { v = difference(v, lse, column == target); });
  keepProbes(p, block, row, lse);
  syncThreads();  // logits have been read by all
  d.write(reinterpret_cast<T*>(logits), block.columns);
  if (p.packed && h.sequenceOf[row] >= 0) d.write(p.packed + h.slot(row) * kChunk, block.columns);
  KG_UNROLL for (int k = 0; k < 2; k++) {
    if (p.shares[k] && row < p.shareRows[k]) {
      writeScaled(p.shares[k] + row * kChunk, d, p.coefficients[k * h.rows + row], block.columns);
    }
  }
}

template <class T>
void sequencesChunk(const Call& call, const Sequences<T>& p, const LogitsBlock& block) {
  using C = compute_t<T>;
  const HeadRows<T>& h = p.head;
  const int64_t stride = kChunk * static_cast<int64_t>(sizeof(C) / sizeof(T));
  const DType in = dtypeOf<T>(), out = dtypeOf<C>();
  const bool later = block.firstColumn > 0;
  computeLogits(call, p.logits, h.hidden, h.weight, block, h.width);
  launch(call, {gridOf(h.rows), kHeadThreads}, differencesKernel<T>, p, block);
  Gemm g{in,      out, h.rows,    h.width, block.columns, p.logits, stride, 1, h.weight + block.firstColumn * h.width,
         h.width, 1,   p.dhidden, h.width, 1.0,           later};
  g.planRows = kBlockRows;
  gemm(call, g);
  if (p.gram) {
    Gemm gram{in,    out,      h.side,      h.side,          block.columns,   p.packed,       kChunk,
              1,     p.packed, 1,           kChunk,          p.gram,          h.side,         1.0,
              later, nullptr,  h.sequences, h.side * kChunk, h.side * kChunk, h.side * h.side};
    gram.planRows = 0;  // small and deep, and no row of it has a counterpart elsewhere: split-K
    gemm(call, gram);
  }
  for (int k = 0; k < 2; k++) {
    if (!p.shares[k]) continue;
    gemm(call, {in, out, block.columns, h.width, p.shareRows[k], p.shares[k], 1, kChunk, h.hidden, h.width, 1,
                p.weights[k] + block.firstColumn * h.width, h.width, 1.0, true});
  }
}

template <class T>
void vocabHeadSequences(const Call& call) {
  using C = compute_t<T>;
  constexpr bool kNarrow = sizeof(T) != sizeof(C);
  Sequences<T> p{HeadRows<T>(call, 5, call[1], call[2])};
  HeadRows<T>& h = p.head;
  const bool wanted[2] = {call[3].present() && h.rows > 0, call[4].present() && call.intAttr(0) > 0};
  if ((wanted[0] || wanted[1]) && !call[11].present()) fail("expected coefficients where gradients are accumulated");
  p.shareRows[0] = h.rows;
  p.shareRows[1] = call.intAttr(0);
  const int64_t packedRows = h.sequences * h.side;
  Workspace workspace;
  const size_t logits = workspace.reserve<C>(h.rows * kChunk), packed = workspace.reserve<T>(packedRows * kChunk);
  const size_t shares[2] = {workspace.reserve<T>(wanted[0] ? h.rows * kChunk : 0),
                            workspace.reserve<T>(wanted[1] ? p.shareRows[1] * kChunk : 0)};
  const size_t dhidden = workspace.reserve<C>(kNarrow ? h.rows * h.width : 0);
  const size_t sequenceOf = workspace.reserve<int32_t>(h.rows);
  workspace.allocate(call);
  h.sequenceOf = workspace.get<int32_t>(sequenceOf);
  p.logits = workspace.get<C>(logits);
  p.dhidden = kNarrow ? workspace.get<C>(dhidden) : call[0].ptr<C>();
  p.gram = packedRows > 0 ? call[1].ptr<C>() : nullptr;
  p.packed = p.gram ? workspace.get<T>(packed) : nullptr;
  p.probes = call[2].present() ? call[2].ptr<C>() : nullptr;
  p.coefficients = call[11].present() ? call[11].ptr<C>() : nullptr;
  for (int k = 0; k < 2; k++) {
    p.shares[k] = wanted[k] ? workspace.get<T>(shares[k]) : nullptr;
    p.weights[k] = wanted[k] ? call[3 + k].ptr<C>() : nullptr;
  }
  checkOnDevice(call, h);
  if (p.gram) clear(call, p.packed, packedRows * kChunk * static_cast<int64_t>(sizeof(T)));
  if (p.probes) clear(call, p.probes, call[2].numel() * static_cast<int64_t>(sizeof(C)));
  forBlocks(h.rows, h.rows, h.vocabulary, [&](const LogitsBlock& block) { sequencesChunk(call, p, block); });
  if constexpr (kNarrow) writeNarrow(call, call[0].ptr<T>(), p.dhidden, h.rows * h.width, C(1));
}

// ---- tangent
// ----------------------------------------------------------------------------------------------------------

// Rows are stacked in pairs of blocks, so that two products are one: [hidden; hiddenDot] weight^T gives the logits and
// their tangent, [dl; D]^T [hidden; hiddenDot] the weight's gradient.
template <class T>
struct Tangent {
  using C = compute_t<T>;
  HeadRows<T> head;
  C* chunk;     // [2N, kChunk]: logits, then D in place; l without the terms of gram and probes
  T* products;  // [2N, kChunk]: [dl; D] as products take them
  T* packed;    // [S, M, kChunk] D, or nullptr
  C* gramTerm;  // [S, M, kChunk] 2 gramDot D
  T *stacked, *gramNarrow;
  const C* probesDot;
  const T* weightDot;
  C *shift, *dhidden, *dweight;
};

// Logits of a row to D: in place, as products take it, and packed by sequence.
template <class T>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kHeadThreads) tangentDifferencesKernel(Tangent<T> p, LogitsBlock block) {
  using C = compute_t<T>;
  const int64_t row = blockIdx.x;
  const HeadRows<T>& h = p.head;
  const C lse = shiftOf(h, row);
  const int target = h.target[row] - block.firstColumn;
  ChunkRow<C> d;
  d.read(p.chunk + row * kChunk, block.columns);
  d.forEach(block.columns, [&](C& v, int column) { v = difference(v, lse, column == target); });
  d.write(p.chunk + row * kChunk, block.columns);
  d.write(p.products + (h.rows + row) * kChunk, block.columns);
  if (p.packed && h.sequenceOf[row] >= 0) d.write(p.packed + h.slot(row) * kChunk, block.columns);
}

// l of a row, complete.
template <class T>
KG_DEVICE void readTangent(ChunkRow<compute_t<T>>& l, const Tangent<T>& p, const LogitsBlock& block, int64_t row) {
  using C = compute_t<T>;
  const HeadRows<T>& h = p.head;
  l.read(p.chunk + (h.rows + row) * kChunk, block.columns);
  const int32_t s = h.sequenceOf[row];
  if (s < 0) return;
  if (p.packed) {
    ChunkRow<C> term;
    term.read(p.gramTerm + h.slot(row) * kChunk, block.columns);
    KG_UNROLL for (int i = 0; i < kPerThread; i++) {
      if (ChunkRow<C>::column(i) < block.columns) l.v[i] += term.v[i];
    }
  }
  if (!p.probesDot) return;
  const int32_t first = h.table[4 * s + 2], count = h.table[4 * s + 3];
  for (int32_t j = 0; j < count; j++) {
    const int32_t id = h.probeIds[first + j];
    const int at = id - block.firstColumn;
    if (!block.hasColumn(id) || !ChunkRow<C>::owns(at)) continue;
    l.forEach(block.columns, [&](C& v, int column) { v += column == at ? p.probesDot[row * h.probeSide + j] : C(0); });
  }
}

// shift += the chunk's part of sum_v softmax l, with softmax = onehot - D.
template <class T>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kHeadThreads) shiftKernel(Tangent<T> p, LogitsBlock block) {
  using C = compute_t<T>;
  KG_SHARED(C, shared, kWarp);
  const int64_t row = blockIdx.x;
  const int target = p.head.target[row] - block.firstColumn;
  ChunkRow<C> d, l;
  d.read(p.chunk + row * kChunk, block.columns);
  readTangent(l, p, block, row);
  C sum = 0;
  KG_UNROLL for (int i = 0; i < kPerThread; i++) {
    const int column = ChunkRow<C>::column(i);
    if (column < block.columns) sum += ((column == target ? C(1) : C(0)) - d.v[i]) * l.v[i];
  }
  sum = blockSum(sum, shared);
  if (threadIdx.x == 0) p.shift[row] = (block.firstColumn > 0 ? p.shift[row] : C(0)) + sum;
}

// dl = -softmax (l - shift).
template <class T>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kHeadThreads) tangentKernel(Tangent<T> p, LogitsBlock block) {
  using C = compute_t<T>;
  const int64_t row = blockIdx.x;
  const int target = p.head.target[row] - block.firstColumn;
  const C shift = p.shift[row];
  ChunkRow<C> d, l;
  d.read(p.chunk + row * kChunk, block.columns);
  readTangent(l, p, block, row);
  KG_UNROLL for (int i = 0; i < kPerThread; i++) {
    const int column = ChunkRow<C>::column(i);
    if (column < block.columns) l.v[i] = (d.v[i] - (column == target ? C(1) : C(0))) * (l.v[i] - shift);
  }
  l.write(p.products + row * kChunk, block.columns);
}

// chunk: logits -> D, tangents of logits -> l but for the terms that readTangent adds.
template <class T>
void tangentLogits(const Call& call, const Tangent<T>& p, const LogitsBlock& block) {
  using C = compute_t<T>;
  const HeadRows<T>& h = p.head;
  const DType in = dtypeOf<T>(), out = dtypeOf<C>();
  const LogitsBlock both{0, 2 * h.rows, block.firstColumn, block.columns};
  computeLogits(call, p.chunk, p.stacked, h.weight, both, h.width);
  if (p.weightDot) {
    gemm(call, {in, out, h.rows, block.columns, h.width, h.hidden, h.width, 1,
                p.weightDot + block.firstColumn * h.width, 1, h.width, p.chunk + h.rows * kChunk, kChunk, 1.0, true});
  }
  launch(call, {gridOf(h.rows), kHeadThreads}, tangentDifferencesKernel<T>, p, block);
  if (p.packed) {
    gemm(call, {in,
                out,
                h.side,
                block.columns,
                h.side,
                p.gramNarrow,
                h.side,
                1,
                p.packed,
                kChunk,
                1,
                p.gramTerm,
                kChunk,
                1.0,
                false,
                nullptr,
                h.sequences,
                h.side * h.side,
                h.side * kChunk,
                h.side * kChunk});
  }
}

template <class T>
void tangentChunk(const Call& call, const Tangent<T>& p, const LogitsBlock& block) {
  using C = compute_t<T>;
  const HeadRows<T>& h = p.head;
  const DType in = dtypeOf<T>(), out = dtypeOf<C>();
  const int64_t weights = block.firstColumn * h.width;
  tangentLogits(call, p, block);
  launch(call, {gridOf(h.rows), kHeadThreads}, tangentKernel<T>, p, block);
  gemm(call, {in, out, h.rows, h.width, block.columns, p.products, kChunk, 1, h.weight + weights, h.width, 1, p.dhidden,
              h.width, 1.0, block.firstColumn > 0});
  if (p.weightDot) {
    gemm(call, {in, out, h.rows, h.width, block.columns, p.products + h.rows * kChunk, kChunk, 1, p.weightDot + weights,
                h.width, 1, p.dhidden, h.width, 1.0, true});
  }
  if (p.dweight) {
    gemm(call, {in, out, block.columns, h.width, 2 * h.rows, p.products, 1, kChunk, p.stacked, h.width, 1,
                p.dweight + weights, h.width, 1.0, true});
  }
}

template <class T>
void fillStacks(const Call& call, const Tangent<T>& p) {
  using C = compute_t<T>;
  const int64_t block = p.head.rows * p.head.width;
  const size_t bytes = static_cast<size_t>(block) * sizeof(T);
  const cudaStream_t stream = context(call).stream;
  if (block > 0) {
    check(cudaMemcpyAsync(p.stacked, p.head.hidden, bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpy");
    check(cudaMemcpyAsync(p.stacked + block, call[2].data, bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpy");
  }
  if (!p.packed) return;
  clear(call, p.packed, p.head.sequences * p.head.side * kChunk * static_cast<int64_t>(sizeof(T)));
  writeNarrow(call, p.gramNarrow, call[3].ptr<C>(), call[3].numel(), C(2));
}

template <class T>
void vocabHeadTangent(const Call& call) {
  using C = compute_t<T>;
  constexpr bool kNarrow = sizeof(T) != sizeof(C);
  Tangent<T> p{HeadRows<T>(call, 6, call[3], call[4])};
  HeadRows<T>& h = p.head;
  const int64_t packedRows = h.sequences * h.side;
  Workspace workspace;
  const size_t chunk = workspace.reserve<C>(2 * h.rows * kChunk), products = workspace.reserve<T>(2 * h.rows * kChunk);
  const size_t packed = workspace.reserve<T>(packedRows * kChunk), term = workspace.reserve<C>(packedRows * kChunk);
  const size_t stacked = workspace.reserve<T>(2 * h.rows * h.width), gram = workspace.reserve<T>(packedRows * h.side);
  const size_t shift = workspace.reserve<C>(h.rows), sequenceOf = workspace.reserve<int32_t>(h.rows);
  const size_t dhidden = workspace.reserve<C>(kNarrow ? h.rows * h.width : 0);
  workspace.allocate(call);
  h.sequenceOf = workspace.get<int32_t>(sequenceOf);
  p.chunk = workspace.get<C>(chunk);
  p.products = workspace.get<T>(products);
  p.packed = packedRows > 0 ? workspace.get<T>(packed) : nullptr;
  p.gramTerm = workspace.get<C>(term);
  p.stacked = workspace.get<T>(stacked);
  p.gramNarrow = workspace.get<T>(gram);
  p.probesDot = call[4].present() ? call[4].ptr<C>() : nullptr;
  p.weightDot = call[5].present() ? call[5].ptr<T>() : nullptr;
  const bool given = call[12].present();
  p.shift = given ? call[12].ptr<C>() : workspace.get<C>(shift);
  p.dhidden = kNarrow ? workspace.get<C>(dhidden) : call[0].ptr<C>();
  p.dweight = call[1].present() ? call[1].ptr<C>() : nullptr;
  checkOnDevice(call, h);
  fillStacks(call, p);
  if (!given) {
    forBlocks(h.rows, h.rows, h.vocabulary, [&](const LogitsBlock& block) {
      tangentLogits(call, p, block);
      launch(call, {gridOf(h.rows), kHeadThreads}, shiftKernel<T>, p, block);
    });
  }
  forBlocks(h.rows, h.rows, h.vocabulary, [&](const LogitsBlock& block) { tangentChunk(call, p, block); });
  if constexpr (kNarrow) writeNarrow(call, call[0].ptr<T>(), p.dhidden, h.rows * h.width, C(1));
}

}  // namespace

void kernel_vocabHeadSequences(const Call& call) {
  dispatchFloat(call[5].dtype, [&](auto tag) { vocabHeadSequences<typename decltype(tag)::type>(call); });
}

void kernel_vocabHeadTangent(const Call& call) {
  dispatchFloat(call[6].dtype, [&](auto tag) { vocabHeadTangent<typename decltype(tag)::type>(call); });
}

}  // namespace kg::cuda
