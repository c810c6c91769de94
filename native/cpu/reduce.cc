// The reductions of elementwise.def. One summation order, whatever the layout, the batch and the number of threads: the
// reduced elements, in logical order, are cut into blocks of kBlock; element i of a block goes to lane i % kLanes;
// lanes are joined by a tree, blocks in order (sums in float64, compensated). Never sums across blocks in a task.
#include "cpu/elementwise.h"
#include "cpu/tasks.h"

namespace kg::cpu::KG_ISA {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int kLanes = 32;
constexpr int64_t kPanel = 512;  // the most columns that one task reduces side by side

template <class C, class V>
KG_INLINE V loadOr(const C* p, int count, C fill) {
  if constexpr (std::is_same_v<V, IntLane>) {
    return count > 0 ? V::load(p) : V(fill);
  } else {
    return V::loadPartial(p, count, fill);
  }
}
template <class C, class V>
KG_INLINE V loadOr(const bf16* p, int count, C fill) {
  return V::loadPartial(p, count, fill);
}

template <class V>
KG_INLINE auto firstLane(V x) {
  if constexpr (V::N == 1) {
    return x.v;
  } else {
    return x.first();
  }
}

template <class Row, int Step, class V>
KG_INLINE V foldLanes(V x) {
  if constexpr (Step > 0) {
    return foldLanes<Row, Step / 2>(Row::template apply<V>(x, swapLanes<Step>(x)));
  } else {
    return x;
  }
}

template <class Row, class T>
KG_INLINE compute_t<T> identity() {
  return firstLane(Row::template identity<Vec<compute_t<T>>>());
}

// n <= kBlock elements that lie one after another.
template <class Row, class T>
void reduceRow(const void* from, int64_t n, void* result) {
  using C = compute_t<T>;
  using V = Vec<C>;
  constexpr int count = kLanes / V::N;
  const T* x = static_cast<const T*>(from);
  V lanes[count];
  for (V& lane : lanes) lane = Row::template identity<V>();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma GCC unroll 8
    for (int j = 0; j < count; j++) lanes[j] = Row::template apply<V>(lanes[j], V::load(x + i + j * V::N));
  }
  for (int j = 0; i < n && j < count; j++, i += V::N) {
    const int left = n - i < V::N ? static_cast<int>(n - i) : V::N;
    lanes[j] =
        Row::template apply<V>(lanes[j], left == V::N ? V::load(x + i) : loadOr<C, V>(x + i, left, identity<Row, T>()));
  }
  for (int half = count / 2; half > 0; half /= 2)
    for (int j = 0; j < half; j++) lanes[j] = Row::template apply<V>(lanes[j], lanes[j + half]);
  *static_cast<C*>(result) = firstLane(foldLanes<Row, V::N / 2>(lanes[0]));
}

// n <= kBlock rows at x + offsets[i], each of `width` <= kPanel neighbouring columns, reduced column by column.
template <class Row, class T>
void reduceColumns(const void* from, const int64_t* offsets, int64_t n, int64_t width, void* results) {
  using C = compute_t<T>;
  using V = Vec<C>;
  alignas(64) C lanes[kLanes][kPanel];
  const T* x = static_cast<const T*>(from);
  const int64_t used = n < kLanes ? n : kLanes;
  for (int j = 0; j < kLanes; j++)
    for (int64_t c = 0; c < width; c += V::N) Row::template identity<V>().store(&lanes[j][c]);
  for (int64_t i = 0; i < n; i++) {
    C* lane = lanes[i % kLanes];
    const T* row = x + offsets[i];
    forVectors<C>(width, [=](int64_t c, int count) KG_LAMBDA_INLINE {
      Row::template apply<V>(V::load(lane + c), loadLanes<C>(row + c, count)).store(lane + c);
    });
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half && j + half < used; j++)
      for (int64_t c = 0; c < width; c += V::N)
        Row::template apply<V>(V::load(&lanes[j][c]), V::load(&lanes[j + half][c])).store(&lanes[j][c]);
  memcpy(results, lanes[0], width * sizeof(C));
}

// In float64, with what each addition loses (Knuth's two-sum) carried along.
template <class C>
double sumBlocks(const C* p, int64_t stride, int64_t blocks) {
  double total = p[0], lost = 0;
  for (int64_t b = 1; b < blocks; b++) {
    const double x = p[b * stride], sum = total + x, part = sum - total;
    lost += (total - (sum - part)) + (x - part);
    total = sum;
  }
  // inf - inf in `lost` must not spoil an infinite total.
  return lost == lost ? total + lost : total;
}

// Joins the `blocks` partial results of each of `count` outputs in order; partial[b * stride + i].
template <class Row, class T>
void finish(const void* partials, int64_t stride, int64_t blocks, int64_t count, void* out, int64_t outStride) {
  using C = compute_t<T>;
  constexpr bool floatingSum = std::is_same_v<Row, Row_reduceSum> && std::is_floating_point_v<C>;
  const C* p = static_cast<const C*>(partials);
  T* y = static_cast<T*>(out);
  for (int64_t i = 0; i < count; i++) {
    if constexpr (floatingSum) {
      y[i * outStride] = static_cast<T>(static_cast<C>(sumBlocks(p + i, stride, blocks)));
    } else {
      Vec<C> total(p[i]);
      for (int64_t b = 1; b < blocks; b++) total = Row::template apply<Vec<C>>(total, Vec<C>(p[b * stride + i]));
      y[i * outStride] = static_cast<T>(firstLane(total));
    }
  }
}

// The functions of one row and dtype, so that the loops below exist once.
struct Reducer {
  void (*row)(const void* from, int64_t n, void* result);
  void (*columns)(const void* from, const int64_t* offsets, int64_t n, int64_t width, void* results);
  void (*finish)(const void* partials, int64_t stride, int64_t blocks, int64_t count, void* out, int64_t outStride);
  int64_t computeSize;
};
template <class Row, class T>
KG_INLINE Reducer reducerOf() {
  return {reduceRow<Row, T>, reduceColumns<Row, T>, finish<Row, T>, sizeof(compute_t<T>)};
}

// The reduced axes of x in logical order, neighbours folded.
struct Inner {
  int ndim = 0;
  int64_t numel = 1;
  int64_t shape[kMaxDims];
  int64_t strides[kMaxDims];

  bool contiguous() const { return ndim == 0 || (ndim == 1 && strides[0] == 1); }
  int64_t offset(int64_t i) const {
    int64_t sum = 0;
    for (int d = ndim - 1; d > 0; d--) {
      sum += i % shape[d] * strides[d];
      i /= shape[d];
    }
    return ndim ? sum + i * strides[0] : 0;
  }
  void offsets(int64_t begin, int64_t n, int64_t* to) const {
    if (ndim <= 1) {
      for (int64_t i = 0; i < n; i++) to[i] = ndim ? (begin + i) * strides[0] : 0;
    } else {
      for (int64_t i = 0; i < n; i++) to[i] = offset(begin + i);
    }
  }
};

Inner innerOf(const TensorView& x, int first) {
  Inner in;
  for (int d = first; d < x.ndim; d++) {
    in.numel *= x.shape[d];
    if (x.shape[d] == 1) continue;
    const int last = in.ndim - 1;
    if (last >= 0 && in.strides[last] == x.strides[d] * x.shape[d]) {
      in.shape[last] *= x.shape[d];
      in.strides[last] = x.strides[d];
    } else {
      in.shape[in.ndim] = x.shape[d];
      in.strides[in.ndim++] = x.strides[d];
    }
  }
  return in;
}

// Offsets of outer element o, in elements, for operand 0 (out) or 1 (x).
int64_t outerOffset(const Walk& w, int operand, int64_t o) {
  int64_t sum = 0;
  for (int d = w.ndim - 1; d > 0; d--) {
    sum += o % w.shape[d] * w.strides[operand][d];
    o /= w.shape[d];
  }
  return sum + o * w.strides[operand][0];
}

struct Plan {
  Reducer reducer;
  Walk outer;
  Inner inner;
  int64_t blocks;
  char* partials;  // [blocks][outer], in the compute type

  char* partial(int64_t block, int64_t o) const { return partials + (block * outer.numel + o) * reducer.computeSize; }
  int64_t blockLength(int64_t block) const { return min64(kBlock, inner.numel - block * kBlock); }
  const char* x(int64_t offset) const { return outer.data[1] + offset * outer.elementSize[1]; }
};

// Tasks are (outer element, block): in the order of memory.
void reduceRows(const Plan& p, int64_t begin, int64_t end) {
  alignas(64) char buffer[kBlock * 8];
  int64_t offsets[kBlock];
  for (int64_t task = begin; task < end; task++) {
    const int64_t block = task % p.blocks, o = task / p.blocks, n = p.blockLength(block);
    const int64_t start = outerOffset(p.outer, 1, o);
    const int size = p.outer.elementSize[1];
    if (p.inner.contiguous()) {
      p.reducer.row(p.x(start + block * kBlock), n, p.partial(block, o));
      continue;
    }
    if (p.inner.ndim == 1) {
      gatherStrided(buffer, p.x(start + block * kBlock * p.inner.strides[0]), p.inner.strides[0], n, size);
    } else {
      p.inner.offsets(block * kBlock, n, offsets);
      for (int64_t i = 0; i < n; i++) memcpy(buffer + i * size, p.x(start + offsets[i]), size);
    }
    p.reducer.row(buffer, n, p.partial(block, o));
  }
}

// Columns are cut into panels of equal width: wide ones read memory in longer pieces, several give every thread work.
// No result depends on the cut.
struct Panels {
  int64_t width, count, rows;
  explicit Panels(const Plan& p) {
    const int64_t columns = p.outer.inner();
    rows = p.outer.numel / columns;
    const int64_t wanted = 2 * threadCount() / (rows * p.blocks);
    width = columns / (wanted > 0 ? wanted : 1);
    width = width < 64 ? 64 : width > kPanel ? kPanel : (width + 15) / 16 * 16;
    count = (columns + width - 1) / width;
  }
};

// Tasks are (outer row, block, panel).
void reduceColumnPanels(const Plan& p, const Panels& panels, int64_t begin, int64_t end) {
  int64_t offsets[kBlock];
  int64_t offsetsOf = -1;
  const int64_t columns = p.outer.inner();
  for (int64_t task = begin; task < end; task++) {
    const int64_t first = task % panels.count * panels.width, block = task / panels.count % p.blocks;
    const int64_t o = task / panels.count / p.blocks * columns + first, n = p.blockLength(block);
    if (offsetsOf != block) p.inner.offsets(block * kBlock, n, offsets);
    offsetsOf = block;
    p.reducer.columns(p.x(outerOffset(p.outer, 1, o)), offsets, n, min64(panels.width, columns - first),
                      p.partial(block, o));
  }
}

void writeOutputs(const Plan& p) {
  const int64_t run = p.outer.inner();
  forTasks(p.outer.numel / run, run * p.blocks, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      char* out = p.outer.data[0] + outerOffset(p.outer, 0, row * run) * p.outer.elementSize[0];
      p.reducer.finish(p.partial(0, row * run), p.outer.numel, p.blocks, run, out, p.outer.innerStride(0));
    }
  });
}

void reduce(const Call& call, const Reducer& reducer) {
  const TensorView& x = call[1];
  const int first = x.ndim - static_cast<int>(call.intAttr(0));
  TensorView outer = x;
  outer.ndim = first;
  const TensorView* views[] = {&call[0], &outer};
  Plan p{reducer, makeWalk(views, 2), innerOf(x, first), 0, nullptr};
  if (p.outer.numel == 0) return;
  p.blocks = p.inner.numel > kBlock ? (p.inner.numel + kBlock - 1) / kBlock : 1;
  // Few results need no scratch memory; a single element is the common case.
  alignas(64) char small[1024];
  const size_t bytes = static_cast<size_t>(p.blocks * p.outer.numel * reducer.computeSize);
  p.partials = bytes <= sizeof small ? small : static_cast<char*>(scratch(call, bytes));
  const int64_t length = min64(kBlock, p.inner.numel);
  if (p.outer.innerStride(1) == 1 && p.outer.inner() > 1 && !p.inner.contiguous()) {
    const Panels panels(p);
    forTasks(p.blocks * panels.count * panels.rows, length * panels.width,
             [&](int64_t begin, int64_t end) { reduceColumnPanels(p, panels, begin, end); });
  } else {
    forTasks(p.blocks * p.outer.numel, length, [&](int64_t begin, int64_t end) { reduceRows(p, begin, end); });
  }
  writeOutputs(p);
}

template <class Row>
KG_INLINE void reduceKernel(const Call& call) {
  const DType dtype = call[1].dtype;
  if (call[0].dtype != dtype) fail("expected one dtype, found %s from %s", dtypeName(call[0].dtype), dtypeName(dtype));
  if (dtype == DType::I32) return reduce(call, reducerOf<Row, int32_t>());
  dispatchFloating(dtype, [&](auto t) KG_LAMBDA_INLINE { reduce(call, reducerOf<Row, decltype(t)>()); });
}

}  // namespace

#define KG_REDUCE(name, ...) \
  void kernel_##name(const Call& call) { reduceKernel<Row_##name>(call); }
#include "ops/all.def"

}  // namespace kg::cpu::KG_ISA
