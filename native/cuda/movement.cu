// fill, arange, where, and the kernels that move elements by index; scatterAddRows is in scatter.cu, copies of views in
// copy.cu. An index out of range is reported and its element left alone.
//
// Roofline (H100, 3.35 TB/s, of which a copy reaches about 90 %; no arithmetic to speak of, one comparison an element
// in argmax), bytes, at full rate and expected:
//   fill         8192 x 896 bfloat16: written             14.7 MB   4.4 us    5 us
//   arange       8192 int32                                 33 KB   a launch, 2 us
//   where        8192 x 896 bfloat16: 3 elements, a byte  51.4 MB  15.3 us   17 us
//   gatherRows   8192 rows of 896 bfloat16, read, written 29.4 MB   8.8 us   10 us
//   gatherLast   8192 rows: an id, a sector of 32 bytes   0.36 MB   a launch, 2-3 us of latency
//   scatterLast  [512, 151936] bfloat16: written           156 MB    46 us   51 us
//   argmax       [512, 151936] bfloat16: read              156 MB    46 us   52 us
#include "cuda/math.h"
#include "cuda/strided.h"

namespace kg::cuda {
namespace {

// f(TypeTag<unsigned integer of the dtype's size>): moves look at no value.
template <class F>
void dispatchSize(DType dtype, F f) {
  switch (dtypeSize(dtype)) {
    case 1:
      return f(TypeTag<uint8_t>{});
    case 2:
      return f(TypeTag<uint16_t>{});
    case 4:
      return f(TypeTag<uint32_t>{});
    case 8:
      return f(TypeTag<uint64_t>{});
    default:
      fail("expected a dtype, found %s", dtypeName(dtype));
  }
}

template <class T>
constexpr int kItem = 16 / static_cast<int>(sizeof(T));

// ---- fill, arange, where --------------------------------------------------------------------------------------------
template <class T, int V>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void fillKernel(Layout<1> layout, T value) {
  T v[V];
  KG_UNROLL for (int i = 0; i < V; i++) v[i] = value;
  forItems<V>(layout, [&](const int64_t (&at)[1], int count) {
    storeItem<V>(reinterpret_cast<T*>(layout.data[0]) + at[0], count, v);
  });
}

template <class T, int V>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void whereKernel(Layout<4> layout) {
  forItems<V>(layout, [&](const int64_t (&at)[4], int count) {
    uint8_t condition[V];
    T a[V], b[V];
    loadItem<V>(reinterpret_cast<const uint8_t*>(layout.data[1]) + at[1], layout.splat(1), count, condition);
    loadItem<V>(reinterpret_cast<const T*>(layout.data[2]) + at[2], layout.splat(2), count, a);
    loadItem<V>(reinterpret_cast<const T*>(layout.data[3]) + at[3], layout.splat(3), count, b);
    KG_UNROLL for (int i = 0; i < V; i++) a[i] = condition[i] ? a[i] : b[i];
    storeItem<V>(reinterpret_cast<T*>(layout.data[0]) + at[0], count, a);
  });
}

template <class T>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void arangeKernel(T* out, int64_t n, int64_t stride, double start, double by) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kItemThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kItemThreads + threadIdx.x; i < n; i += step)
    out[i * stride] = static_cast<T>(start + static_cast<double>(i) * by);
}

template <class T>
void arange(const Call& call) {
  const TensorView& out = call[0];
  if (out.ndim > 1 && !out.contiguous()) fail("expected a contiguous out, found strides; try contiguous() first");
  launch(call, {gridFor(context(call), out.numel()), kItemThreads}, arangeKernel<T>, out.ptr<T>(), out.numel(),
         out.ndim > 0 ? out.stride(-1) : 1, call.attr(0), call.attr(1));
}

// The value as the dtype stores it, in the first bytes of the result.
uint64_t stored(double value, DType dtype) {
  uint64_t bits = 0;
  auto put = [&](auto x) { memcpy(&bits, &x, sizeof x); };
  switch (dtype) {
    case DType::F32:
      put(static_cast<float>(value));
      break;
    case DType::F64:
      put(value);
      break;
    case DType::BF16:
      put(bf16(static_cast<float>(value)));
      break;
    case DType::I32:
      put(static_cast<int32_t>(value));
      break;
    case DType::U8:
      put(static_cast<uint8_t>(value));
      break;
    case DType::Bool:
      put(static_cast<uint8_t>(value != 0));
      break;
    default:
      fail("expected any dtype but float16, found %s; try filling float32 and casting", dtypeName(dtype));
  }
  return bits;
}

// ---- rows and elements by index -------------------------------------------------------------------------------------
// True where `id` names one of `limit`; reports it otherwise.
KG_DEVICE bool inRange(const FaultSink& faults, int32_t id, int64_t position, int64_t limit) {
  if (id >= 0 && id < limit) return true;
  reportFault(faults, FaultKind::IdOutOfRange, id, position, limit);
  return false;
}

// Rows of `units` elements of T, which is as wide as the rows' alignment allows.
template <class T>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void gatherRowsKernel(T* out, const T* table, const int32_t* ids,
                                                               int64_t first, uint32_t items, Divisor units,
                                                               int64_t limit, FaultSink faults) {
  const uint32_t step = gridDim.x * blockDim.x;
  KG_UNROLL_BY(1) for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < items; i += step) {
    uint32_t unit;
    const int64_t row = first + divide(i, units, &unit);
    const int32_t id = ids[row];
    if (!inRange(faults, id, row, limit)) continue;
    out[row * units.by + unit] = table[static_cast<int64_t>(id) * units.by + unit];
  }
}

template <class T>
void gatherRowsAs(const Call& call, int64_t rowBytes) {
  const int64_t units = rowBytes / static_cast<int64_t>(sizeof(T)), rows = call[2].numel();
  const int64_t step = units < (1 << 30) ? (int64_t{1} << 30) / units : 1;
  const Context& on = context(call);
  for (int64_t first = 0; first < rows && units > 0; first += step) {
    const int64_t items = (rows - first < step ? rows - first : step) * units;
    launch(call, {gridFor(on, items), kItemThreads}, gatherRowsKernel<T>, call[0].ptr<T>(), call[1].ptr<T>(),
           call[2].ptr<int32_t>(), first, static_cast<uint32_t>(items), makeDivisor(units), call[1].shape[0],
           on.faults);
  }
}

template <class T>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void gatherLastKernel(T* out, const T* x, const int32_t* ids, int64_t rows,
                                                               int64_t width, FaultSink faults) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kItemThreads;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kItemThreads + threadIdx.x; r < rows; r += step)
    if (inRange(faults, ids[r], r, width)) out[r] = x[r * width + ids[r]];
}

// A thread block a row (or several in turn).
template <class T, int V>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void scatterLastKernel(T* out, const T* g, const int32_t* ids, int64_t rows,
                                                                int64_t width, FaultSink faults) {
  KG_UNROLL_BY(1) for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int32_t id = ids[r];
    if (threadIdx.x == 0) inRange(faults, id, r, width);
    const T value = g[r];
    KG_UNROLL_BY(1) for (int64_t c = static_cast<int64_t>(threadIdx.x) * V; c < width; c += int64_t{kItemThreads} * V) {
      T v[V];
      KG_UNROLL for (int i = 0; i < V; i++) v[i] = c + i == id ? value : T(0);
      storeItem<V>(out + r * width + c, V, v);
    }
  }
}

// ---- argmax ---------------------------------------------------------------------------------------------------------
// NaN is above everything; of equals the first wins.
template <class C>
KG_DEVICE bool above(C a, int32_t i, C b, int32_t j) {
  const bool nanA = a != a, nanB = b != b;
  if (nanA || nanB) return nanA && (!nanB || i < j);
  return a > b || (a == b && i < j);
}
template <class C>
KG_DEVICE void argmaxWarp(C& best, int32_t& at) {
  for (int mask = kWarp / 2; mask > 0; mask >>= 1) {
    const C other = shuffleXor(best, mask);
    const int32_t index = shuffleXor(at, mask);
    if (!above(other, index, best, at)) continue;
    best = other;
    at = index;
  }
}

// A row belongs to a warp (whole = false) or to a thread block.
template <class T>
KG_GLOBAL KG_LAUNCH_BOUNDS(1024) void argmaxKernel(int32_t* out, const T* x, int64_t rows, int64_t width, bool whole) {
  using C = compute_t<T>;
  KG_SHARED(C, values, kWarp);
  KG_SHARED(int32_t, indices, kWarp);
  const int lanes = whole ? static_cast<int>(blockDim.x) : kWarp, lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t perBlock = blockDim.x / lanes, step = gridDim.x * perBlock;
  KG_UNROLL_BY(1) for (int64_t r = blockIdx.x * perBlock + static_cast<int>(threadIdx.x) / lanes; r < rows; r += step) {
    const T* row = x + r * width;
    int32_t at = lane < width ? lane : 0;  // a lane without elements repeats the first
    C best = static_cast<C>(row[at]);
    KG_UNROLL_BY(1) for (int64_t i = static_cast<int64_t>(lane) + lanes; i < width; i += lanes) {
      const C v = static_cast<C>(row[i]);
      if (!above(v, static_cast<int32_t>(i), best, at)) continue;
      best = v;
      at = static_cast<int32_t>(i);
    }
    argmaxWarp(best, at);
    if (whole) {
      syncThreads();
      if (laneId() == 0) {
        values[warpId()] = best;
        indices[warpId()] = at;
      }
      syncThreads();
      const int from = laneId() < lanes / kWarp ? laneId() : 0;
      best = values[from];
      at = indices[from];
      argmaxWarp(best, at);
    }
    if (lane == 0) out[r] = at;
  }
}

template <class T>
void argmax(const Call& call, int64_t rows, int64_t width) {
  const bool whole = width > 1024;
  const int threads = width > 16384 ? 1024 : 256;
  const int64_t wanted = whole ? rows : ceilDiv(rows, threads / kWarp), most = int64_t{1} << 30;
  launch(call, {gridOf(wanted < most ? wanted : most), threads}, argmaxKernel<T>, call[0].ptr<int32_t>(),
         call[1].ptr<T>(), rows, width, whole);
}

// ---- checks ---------------------------------------------------------------------------------------------------------
void checkContiguous(const char* name, const TensorView& t) {
  if (!t.contiguous()) fail("expected a contiguous %s, found strides; try contiguous() first", name);
}
void checkIds(const TensorView& ids) {
  if (ids.dtype != DType::I32) fail("expected int32 ids, found %s", dtypeName(ids.dtype));
  checkContiguous("ids", ids);
}
void checkSameDtype(const TensorView& a, const TensorView& b) {
  if (a.dtype != b.dtype) fail("expected one dtype, found %s and %s", dtypeName(a.dtype), dtypeName(b.dtype));
}

}  // namespace

void kernel_fill(const Call& call) {
  const uint64_t value = stored(call.attr(0), call[0].dtype);
  const TensorView* views[] = {&call[0]};
  const Walk walk = makeWalk(views, 1);
  dispatchSize(call[0].dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = kItem<T>;
    const T bits = static_cast<T>(value);
    forPieces(walk, [&](const Walk& piece) {
      if (packable(piece, V)) return launchItems(call, makeLayout<1>(piece, V), fillKernel<T, V>, bits);
      launchItems(call, makeLayout<1>(piece, 1), fillKernel<T, 1>, bits);
    });
  });
}

void kernel_arange(const Call& call) {
  switch (call[0].dtype) {
    case DType::F32:
      return arange<float>(call);
    case DType::F64:
      return arange<double>(call);
    case DType::I32:
      return arange<int32_t>(call);
    default:
      fail("expected float32, float64 or int32, found %s", dtypeName(call[0].dtype));
  }
}

void kernel_where(const Call& call) {
  checkSameDtype(call[0], call[2]);
  checkSameDtype(call[0], call[3]);
  if (dtypeSize(call[1].dtype) != 1) fail("expected a bool condition, found %s", dtypeName(call[1].dtype));
  const TensorView* views[] = {&call[0], &call[1], &call[2], &call[3]};
  const Walk walk = makeWalk(views, 4);
  dispatchSize(call[0].dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = kItem<T>;
    forPieces(walk, [&](const Walk& piece) {
      if (packable(piece, V)) return launchItems(call, makeLayout<4>(piece, V), whereKernel<T, V>);
      launchItems(call, makeLayout<4>(piece, 1), whereKernel<T, 1>);
    });
  });
}

void kernel_gatherRows(const Call& call) {
  checkSameDtype(call[0], call[1]);
  checkContiguous("table", call[1]);
  checkIds(call[2]);
  int64_t bytes = static_cast<int64_t>(dtypeSize(call[1].dtype));
  for (int i = 1; i < call[1].ndim; i++) bytes *= call[1].shape[i];
  const uintptr_t common = reinterpret_cast<uintptr_t>(call[0].data) | reinterpret_cast<uintptr_t>(call[1].data) |
                           static_cast<uintptr_t>(bytes);
  if (common % 16 == 0) return gatherRowsAs<Pack<uint32_t, 4>>(call, bytes);
  if (common % 4 == 0) return gatherRowsAs<uint32_t>(call, bytes);
  if (common % 2 == 0) return gatherRowsAs<uint16_t>(call, bytes);
  gatherRowsAs<uint8_t>(call, bytes);
}

void kernel_gatherLast(const Call& call) {
  checkSameDtype(call[0], call[1]);
  checkContiguous("x", call[1]);
  checkIds(call[2]);
  const int64_t rows = call[2].numel();
  const Context& on = context(call);
  dispatchSize(call[0].dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(call, {gridFor(on, rows), kItemThreads}, gatherLastKernel<T>, call[0].ptr<T>(), call[1].ptr<T>(),
           call[2].ptr<int32_t>(), rows, call[1].size(-1), on.faults);
  });
}

void kernel_scatterLast(const Call& call) {
  checkSameDtype(call[0], call[1]);
  checkContiguous("out", call[0]);
  checkIds(call[2]);
  const int64_t rows = call[2].numel(), width = call[0].size(-1);
  const Context& on = context(call);
  const dim3 grid = gridOf(rows < (1 << 30) ? rows : 1 << 30);
  dispatchSize(call[0].dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = kItem<T>;
    const bool packs = width % V == 0 && reinterpret_cast<uintptr_t>(call[0].data) % 16 == 0;
    launch(call, {grid, kItemThreads}, packs ? scatterLastKernel<T, V> : scatterLastKernel<T, 1>, call[0].ptr<T>(),
           call[1].ptr<T>(), call[2].ptr<int32_t>(), rows, width, on.faults);
  });
}

void kernel_argmax(const Call& call) {
  if (call[0].dtype != DType::I32) fail("expected an int32 output, found %s", dtypeName(call[0].dtype));
  checkContiguous("x", call[1]);
  const int64_t width = call[1].size(-1);
  if (width == 0) fail("expected a last axis of at least one element, found none");
  const int64_t rows = call[1].numel() / width;
  if (call[1].dtype == DType::I32) return argmax<int32_t>(call, rows, width);
  dispatchFloat(call[1].dtype, [&](auto tag) { argmax<typename decltype(tag)::type>(call, rows, width); });
}

}  // namespace kg::cuda
