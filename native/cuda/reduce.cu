// The reductions of elementwise.def. One order, the CPU's, whatever the layout, the batch and the schedule: the reduced
// elements, in logical order, are cut into blocks of 1,024; element i of a block goes to lane i % 32; lanes are joined
// by a tree. Blocks are joined by 32 lanes (by 1,024 where there are more than 64 blocks) and a tree, sums in float64
// with what each addition loses. Which threads do it depends on the layout and the device; no result does:
//   threads  one a result, where there are at most 16 elements to it
//   warps    one a result or a block of it: lanes read neighbours
//   columns  32 results side by side a thread block, one lane each a warp: where the neighbours are other results
// Few results of many blocks go through scratch memory: a partial result a block, joined by a second kernel.
//
// Roofline (H100, 3.35 TB/s): every element is read once; 64 Mi elements in bfloat16, 134 MB: 40 us. A warp reads 64 or
// 128 neighbouring bytes an access, eight accesses ahead of their sums: 32 KB in flight a multiprocessor.
#include "cuda/elementwise.h"

namespace kg::cuda {
namespace {

constexpr int kBlock = 1024;  // elements
constexpr uint32_t kFewBlocks = 64;
constexpr int kFew = 16;  // elements that one thread reduces
constexpr int kColumns = 32;
constexpr int kPitch = kColumns + 1;
constexpr int kWarps = kItemThreads / kWarp;

// The reduced axes of x in logical order, neighbours folded; from the inside.
struct Inner {
  int64_t ndim;
  int64_t numel;
  Divisor lengths[kMaxDims];
  int64_t strides[kMaxDims];

  KG_DEVICE int64_t offset(int64_t i) const {
    if (numel >= int64_t{1} << 31) return wideOffset(i);
    uint32_t rest = static_cast<uint32_t>(i), coordinate;
    int64_t sum = 0;
    KG_UNROLL_BY(1) for (int d = 0; d + 1 < ndim; d++) {
      rest = divide(rest, lengths[d], &coordinate);
      sum += coordinate * strides[d];
    }
    return sum + rest * strides[ndim - 1];
  }
  KG_DEVICE int64_t wideOffset(int64_t i) const {
    int64_t sum = 0;
    KG_UNROLL_BY(1) for (int d = 0; d + 1 < ndim; d++) {
      sum += i % lengths[d].by * strides[d];
      i /= lengths[d].by;
    }
    return sum + i * strides[ndim - 1];
  }
};

struct Reduction {
  Layout<2> outer;  // the result, x
  Inner inner;
  uint32_t tasks;  // results, or tiles of them; times blocks where there are partial results
  uint32_t blocks;
  Divisor byBlocks;
  Divisor byTiles;  // columns alone
  void* partials;   // [results][blocks], in the compute type; null: whole results
};
static_assert(kDense<Reduction>);

// ---- one row and dtype ----------------------------------------------------------------------------------------------
// S is the number as it is kept, row_compute_t<T> the one that the row is written for.
template <class Row, class T>
KG_DEVICE compute_t<T> combine(compute_t<T> a, compute_t<T> b) {
  using C = row_compute_t<T>;
  return static_cast<compute_t<T>>(Row::template apply<C>(C(a), C(b)));
}
template <class Row, class T>
KG_DEVICE compute_t<T> identity() {
  return static_cast<compute_t<T>>(Row::template identity<row_compute_t<T>>());
}
template <class Row, class T>
KG_DEVICE compute_t<T> combineWarp(compute_t<T> v) {
  return warpReduce(v, [](compute_t<T> a, compute_t<T> b) { return combine<Row, T>(a, b); });
}

// What joins blocks: the row's own combination, or for floating sums float64 with the errors of its additions (Knuth's
// two-sum), which makes both sides of a butterfly equal.
template <class Row, class T, bool kExact = std::is_same_v<Row, Row_reduceSum> && !std::is_same_v<T, int32_t>>
struct Join {
  compute_t<T> value;

  KG_DEVICE static Join none() { return {identity<Row, T>()}; }
  KG_DEVICE void add(compute_t<T> x) { value = combine<Row, T>(value, x); }
  KG_DEVICE void add(const Join& other) { add(other.value); }
  KG_DEVICE Join across(int mask) const { return {shuffleXor(value, mask)}; }
  KG_DEVICE compute_t<T> result() const { return value; }
};
template <class Row, class T>
struct Join<Row, T, true> {
  double total, lost;

  KG_DEVICE static Join none() { return {0, 0}; }
  KG_DEVICE void add(compute_t<T> x) { add(Join{static_cast<double>(x), 0}); }
  KG_DEVICE void add(const Join& other) {
    const double sum = total + other.total, part = sum - total;
    lost = (lost + other.lost) + ((total - (sum - part)) + (other.total - part));
    total = sum;
  }
  KG_DEVICE Join across(int mask) const { return {shuffleXor(total, mask), shuffleXor(lost, mask)}; }
  // inf - inf in `lost` must not spoil an infinite total.
  KG_DEVICE compute_t<T> result() const { return static_cast<compute_t<T>>(lost == lost ? total + lost : total); }
};
template <class J>
KG_DEVICE J joinWarp(J join) {
  for (int mask = kWarp / 2; mask > 0; mask >>= 1) join.add(join.across(mask));
  return join;
}

// Lane `lane` of a block of the result whose first element is x[0].
template <class Row, class T>
KG_DEVICE compute_t<T> reduceLane(const T* x, const Inner& inner, uint32_t block, int lane) {
  using S = compute_t<T>;
  S sum = identity<Row, T>();
  const int64_t first = static_cast<int64_t>(block) * kBlock, left = inner.numel - first;
  const int n = left < kBlock ? static_cast<int>(left) : kBlock;
  int i = lane;
  if (inner.ndim > 1) {
    KG_UNROLL_BY(1) for (; i < n; i += kWarp) sum = combine<Row, T>(sum, static_cast<S>(x[inner.offset(first + i)]));
    return sum;
  }
  constexpr int kAhead = 8;
  const int64_t stride = inner.strides[0], step = stride * kWarp;
  const T* at = x + (first + lane) * stride;
  KG_UNROLL_BY(1) for (; i + (kAhead - 1) * kWarp < n; i += kAhead * kWarp, at += kAhead * step) {
    T v[kAhead];
    KG_UNROLL for (int j = 0; j < kAhead; j++) v[j] = at[j * step];
    KG_UNROLL for (int j = 0; j < kAhead; j++) sum = combine<Row, T>(sum, static_cast<S>(v[j]));
  }
  KG_UNROLL_BY(1) for (; i < n; i += kWarp, at += step) sum = combine<Row, T>(sum, static_cast<S>(*at));
  return sum;
}

template <class T>
KG_DEVICE void writeResult(const Reduction& r, int64_t at, compute_t<T> value) {
  reinterpret_cast<T*>(r.outer.data[0])[at] = static_cast<T>(value);
}
template <class T>
KG_DEVICE const T* elements(const Reduction& r, int64_t at) {
  return reinterpret_cast<const T*>(r.outer.data[1]) + at;
}

// ---- the mappings ---------------------------------------------------------------------------------------------------
template <class Row, class T>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void reduceThreads(Reduction r) {
  using S = compute_t<T>;
  const int n = static_cast<int>(r.inner.numel);
  const int64_t stride = r.inner.strides[0];
  forItems<1>(r.outer, [&](const int64_t (&at)[2], int) {
    const T* x = elements<T>(r, at[1]);
    S lanes[kFew];
    KG_UNROLL for (int i = 0; i < kFew; i++) {
      lanes[i] = identity<Row, T>();
      if (i < n) lanes[i] = combine<Row, T>(lanes[i], static_cast<S>(x[i * stride]));
    }
    KG_UNROLL for (int half = kFew / 2; half > 0; half /= 2) {
      KG_UNROLL for (int i = 0; i < half; i++) lanes[i] = combine<Row, T>(lanes[i], lanes[i + half]);
    }
    writeResult<T>(r, at[0], lanes[0]);
  });
}

// Which result and which of its blocks a task is for.
struct Task {
  uint32_t result, begin, end;

  KG_DEVICE static Task of(const Reduction& r, uint32_t task) {
    if (r.partials == nullptr) return {task, 0, r.blocks};
    uint32_t block;
    const uint32_t result = divide(task, r.byBlocks, &block);
    return {result, block, block + 1};
  }
};

template <class Row, class T>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void reduceWarps(Reduction r) {
  using S = compute_t<T>;
  const uint32_t step = gridDim.x * kWarps;
  KG_UNROLL_BY(1) for (uint32_t i = blockIdx.x * kWarps + warpId(); i < r.tasks; i += step) {
    const Task task = Task::of(r, i);
    int64_t at[2];
    locate<1>(r.outer, task.result, at);
    Join<Row, T> join = Join<Row, T>::none();
    S value = identity<Row, T>();
    KG_UNROLL_BY(1) for (uint32_t block = task.begin; block < task.end; block++) {
      value = combineWarp<Row, T>(reduceLane<Row, T>(elements<T>(r, at[1]), r.inner, block, laneId()));
      if (static_cast<int>(block % kWarp) == laneId()) join.add(value);
    }
    if (r.partials == nullptr) {
      value = joinWarp(join).result();
      if (laneId() == 0) writeResult<T>(r, at[0], value);
    } else if (laneId() == 0) {
      static_cast<S*>(r.partials)[i] = value;
    }
  }
}

// Thread (lane j, column c) is 32 j + c; after a turn in shared memory warp c holds column c.
template <class Row, class T>
KG_GLOBAL KG_LAUNCH_BOUNDS(kBlock) void reduceColumns(Reduction r) {
  using S = compute_t<T>;
  KG_SHARED(S, turned, kWarp * kPitch);
  const int column = laneId(), lane = warpId();
  const uint32_t columns = r.outer.innerLength;
  KG_UNROLL_BY(1) for (uint32_t i = blockIdx.x; i < r.tasks; i += gridDim.x) {
    const Task task = Task::of(r, i);
    uint32_t tile;
    const uint32_t row = divide(task.result, r.byTiles, &tile);
    const bool reads = tile * kColumns + column < columns, writes = tile * kColumns + lane < columns;
    const uint32_t first = row * columns + tile * kColumns;
    int64_t at[2] = {0, 0};
    if (reads) locate<1>(r.outer, first + column, at);
    Join<Row, T> join = Join<Row, T>::none();
    S value = identity<Row, T>();
    KG_UNROLL_BY(1) for (uint32_t block = task.begin; block < task.end; block++) {
      S sum = identity<Row, T>();
      if (reads) sum = reduceLane<Row, T>(elements<T>(r, at[1]), r.inner, block, lane);
      turned[lane * kPitch + column] = sum;
      syncThreads();
      value = combineWarp<Row, T>(turned[column * kPitch + lane]);
      syncThreads();
      if (static_cast<int>(block % kWarp) == column) join.add(value);
    }
    if (r.partials == nullptr) value = joinWarp(join).result();
    if (!writes || column != 0) continue;
    if (r.partials != nullptr) {
      static_cast<S*>(r.partials)[static_cast<int64_t>(first + lane) * r.blocks + task.begin] = value;
    } else {
      locate<1>(r.outer, first + lane, at);
      writeResult<T>(r, at[0], value);
    }
  }
}

// A warp a result, or a thread block of 1,024 where it has more than kFewBlocks partial results.
template <class Row, class T>
KG_GLOBAL KG_LAUNCH_BOUNDS(kBlock) void joinBlocks(Reduction r) {
  using J = Join<Row, T>;
  KG_SHARED(J, joins, kWarp);
  const bool whole = r.blocks > kFewBlocks;
  const uint32_t lanes = whole ? kBlock : kWarp, warps = blockDim.x / kWarp;
  const uint32_t result = whole ? blockIdx.x : blockIdx.x * warps + warpId();
  if (result >= r.outer.items) return;
  const compute_t<T>* partials = static_cast<const compute_t<T>*>(r.partials) + static_cast<int64_t>(result) * r.blocks;
  J join = J::none();
  KG_UNROLL_BY(1) for (uint32_t b = whole ? threadIdx.x : laneId(); b < r.blocks; b += lanes) join.add(partials[b]);
  join = joinWarp(join);
  if (whole) {
    if (laneId() == 0) joins[warpId()] = join;
    syncThreads();
    if (warpId() != 0) return;
    join = joinWarp(joins[laneId()]);
  }
  if (laneId() != 0) return;
  int64_t at[2];
  locate<1>(r.outer, result, at);
  writeResult<T>(r, at[0], join.result());
}

// ---- host -----------------------------------------------------------------------------------------------------------
// The kernels of one row and dtype, so that what follows exists once.
struct Reducer {
  void (*threads)(Reduction);
  void (*warps)(Reduction);
  void (*columns)(Reduction);
  void (*join)(Reduction);
  int64_t computeSize;
};
template <class Row, class T>
Reducer reducerOf() {
  return {reduceThreads<Row, T>, reduceWarps<Row, T>, reduceColumns<Row, T>, joinBlocks<Row, T>, sizeof(compute_t<T>)};
}

Inner innerOf(const TensorView& x, int first) {
  Inner in{};
  int64_t shape[kMaxDims];
  in.numel = 1;
  for (int d = x.ndim - 1; d >= first; d--) {
    in.numel *= x.shape[d];
    if (x.shape[d] == 1) continue;
    const int last = in.ndim - 1;
    if (last >= 0 && x.strides[d] == in.strides[last] * shape[last]) {
      shape[last] *= x.shape[d];
    } else {
      shape[in.ndim] = x.shape[d];
      in.strides[in.ndim++] = x.strides[d];
    }
  }
  for (int d = 0; d < in.ndim && in.numel > 0; d++) in.lengths[d] = makeDivisor(shape[d]);
  return in;
}

enum class Mapping { Threads, Warps, Columns };
Mapping mappingFor(const Walk& outer, const Inner& inner) {
  const int64_t across = outer.innerStride(1), along = inner.strides[0];
  if (inner.numel <= kFew && inner.ndim <= 1 && (across == 1 || inner.numel <= kFew / 2)) return Mapping::Threads;
  return inner.numel > 1 && across < along && outer.inner() >= 8 ? Mapping::Columns : Mapping::Warps;
}

void reducePiece(const Call& call, const Reducer& reducer, const Walk& outer, Reduction r) {
  const Context& on = context(call);
  r.outer = makeLayout<2>(outer, 1);
  const Mapping mapping = mappingFor(outer, r.inner);
  if (mapping == Mapping::Threads) return launch(call, {gridFor(on, outer.numel), kItemThreads}, reducer.threads, r);
  const bool columns = mapping == Mapping::Columns;
  const int64_t tiles = ceilDiv(outer.inner(), kColumns), results = outer.numel;
  r.byTiles = makeDivisor(tiles);
  int64_t tasks = columns ? results / outer.inner() * tiles : results;
  if (r.blocks > kFewBlocks || (r.blocks > 1 && tasks < on.processors * (columns ? 2 : 16))) {
    r.partials = scratch(call, static_cast<size_t>(results * r.blocks * reducer.computeSize));
    tasks *= r.blocks;
  }
  const int64_t wanted = columns ? tasks : ceilDiv(tasks, kWarps), most = int64_t{on.processors} * 64;
  const dim3 grid = gridOf(wanted < most ? wanted : most);
  r.tasks = static_cast<uint32_t>(tasks);
  launch(call, {grid, columns ? kBlock : kItemThreads}, columns ? reducer.columns : reducer.warps, r);
  if (r.partials == nullptr) return;
  const bool whole = r.blocks > kFewBlocks;
  launch(call, {gridOf(whole ? results : ceilDiv(results, kWarps)), whole ? kBlock : kItemThreads}, reducer.join, r);
}

void reduce(const Call& call, const Reducer& reducer) {
  const TensorView& x = call[1];
  const int first = x.ndim - static_cast<int>(call.intAttr(0));
  TensorView outer = x;
  outer.ndim = first;
  const TensorView* views[] = {&call[0], &outer};
  Reduction r{};
  r.inner = innerOf(x, first);
  r.blocks = static_cast<uint32_t>(r.inner.numel > 0 ? ceilDiv(r.inner.numel, kBlock) : 1);
  r.byBlocks = makeDivisor(r.blocks);
  forPieces(makeWalk(views, 2), [&](const Walk& piece) { reducePiece(call, reducer, piece, r); });
}

template <class Row>
void reduceKernel(const Call& call) {
  const DType dtype = call[1].dtype;
  if (call[0].dtype != dtype) fail("expected one dtype, found %s from %s", dtypeName(call[0].dtype), dtypeName(dtype));
  if (dtype == DType::I32) return reduce(call, reducerOf<Row, int32_t>());
  dispatchFloat(dtype, [&](auto tag) { reduce(call, reducerOf<Row, typename decltype(tag)::type>()); });
}

}  // namespace

#define KG_REDUCE(name, ...) \
  void kernel_##name(const Call& call) { reduceKernel<Row_##name>(call); }
#include "ops/all.def"

}  // namespace kg::cuda
