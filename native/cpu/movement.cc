// fill, arange, where, and the kernels that move elements by index. Copies of views are copy.cc's.
//
// Indices are checked before anything is written.
#include "cpu/strided.h"
#include "cpu/tasks.h"

namespace kg::cpu::KG_ISA {
namespace {

constexpr int64_t kGrain = 32768;

template <class T>
void fillBlock(void* out, const void* const* in, int64_t n, int) {
  const T value = *static_cast<const T*>(in[0]);
  T* y = static_cast<T*>(out);
  for (int64_t i = 0; i < n; i++) y[i] = value;
}

template <class T>
void whereBlock(void* out, const void* const* in, int64_t n, int) {
  T* y = static_cast<T*>(out);
  const uint8_t* condition = static_cast<const uint8_t*>(in[0]);
  const T *a = static_cast<const T*>(in[1]), *b = static_cast<const T*>(in[2]);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) y[i] = condition[i] ? a[i] : b[i];
}

// f(T()) with T an unsigned integer of the dtype's size: moves look at no value.
template <class F>
KG_INLINE void dispatchSize(DType dtype, F f) {
  switch (dtypeSize(dtype)) {
    case 1:
      return f(uint8_t());
    case 2:
      return f(uint16_t());
    case 4:
      return f(uint32_t());
    case 8:
      return f(uint64_t());
    default:
      fail("expected a dtype, found %s", dtypeName(dtype));
  }
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

template <class T>
void arangeTyped(const Call& call) {
  T* out = call[0].ptr<T>();
  const double start = call.attr(0), step = call.attr(1);
  const int64_t stride = call[0].ndim > 0 ? call[0].stride(-1) : 1;
  forTasks(call[0].numel(), 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) out[i * stride] = static_cast<T>(start + static_cast<double>(i) * step);
  });
}

void checkContiguous(const char* name, const TensorView& t) {
  if (!t.contiguous()) fail("expected a contiguous %s, found strides; try contiguous() first", name);
}
const int32_t* checkedIds(const TensorView& ids, int64_t limit) {
  if (ids.dtype != DType::I32) fail("expected int32 ids, found %s", dtypeName(ids.dtype));
  checkContiguous("ids", ids);
  checkIndices("ids", ids.ptr<int32_t>(), ids.numel(), limit);
  return ids.ptr<int32_t>();
}
int64_t rowLength(const TensorView& table) {
  int64_t n = 1;
  for (int i = 1; i < table.ndim; i++) n *= table.shape[i];
  return n;
}
void checkSameDtype(const TensorView& a, const TensorView& b) {
  if (a.dtype != b.dtype) fail("expected one dtype, found %s and %s", dtypeName(a.dtype), dtypeName(b.dtype));
}

// Columns [begin, end) of every row, ids ascending in position: one thread a column, so the order is fixed.
template <class O, class S>
void scatterColumns(O* out, const S* src, const int32_t* ids, int64_t n, int64_t width, int64_t begin, int64_t end) {
  using C = compute_t<O>;
  for (int64_t r = 0; r < n; r++) {
    O* to = out + ids[r] * width + begin;
    const S* from = src + r * width + begin;
    forVectors<C>(end - begin, [=](int64_t i, int count) KG_LAMBDA_INLINE {
      storeLanes(to + i, loadLanes<C>(to + i, count) + loadLanes<C>(from + i, count), count);
    });
  }
}

template <class O, class S>
void scatterAdd(const Call& call, const int32_t* ids) {
  constexpr int64_t kPanel = 64;
  const int64_t n = call[2].numel(), width = rowLength(call[0]);
  O* out = call[0].ptr<O>();
  const S* src = call[1].ptr<S>();
  forTasks((width + kPanel - 1) / kPanel, n * kPanel, [=](int64_t begin, int64_t end) {
    scatterColumns(out, src, ids, n, width, begin * kPanel, min64(end * kPanel, width));
  });
}

// bfloat16 into bfloat16: the rows of one id are summed in float32 and rounded once. Rows are chained by id, in order.
void scatterAddRounded(const Call& call, const int32_t* ids) {
  const int64_t n = call[2].numel(), rows = call[0].shape[0], width = rowLength(call[0]);
  int32_t* head = static_cast<int32_t*>(scratch(call, static_cast<size_t>(rows + n) * sizeof(int32_t)));
  int32_t* next = head + rows;
  memset(head, 0xff, rows * sizeof(int32_t));
  for (int64_t i = n - 1; i >= 0; i--) {
    next[i] = head[ids[i]];
    head[ids[i]] = static_cast<int32_t>(i);
  }
  bf16* out = call[0].ptr<bf16>();
  const bf16* src = call[1].ptr<bf16>();
  forTasks(n, width, [=](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first++) {
      if (head[ids[first]] != first) continue;  // the first occurrence works for all
      bf16* to = out + ids[first] * width;
      forVectors<float>(width, [=](int64_t c, int count) KG_LAMBDA_INLINE {
        Vec<float> sum = loadLanes<float>(to + c, count);
        for (int32_t i = static_cast<int32_t>(first); i >= 0; i = next[i])
          sum += loadLanes<float>(src + i * width + c, count);
        storeLanes(to + c, sum, count);
      });
    }
  });
}

// Largest value, NaN if there is one; then its first position.
template <class T>
int32_t argmaxRow(const T* x, int64_t n) {
  using C = compute_t<T>;
  using V = Vec<C>;
  const C lowest = static_cast<C>(-__builtin_inf());
  V best(lowest), unordered(C(0));
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const V v = count == V::N ? V::load(x + i) : V::loadPartial(x + i, count, lowest);
    best = max(best, v);
    unordered = select(v != v, V(C(1)), unordered);
  });
  const bool hasNan = hmax(unordered) != C(0);
  const C largest = hmax(best);
  for (int64_t i = 0; i < n; i++) {
    const C v = static_cast<C>(x[i]);
    if (hasNan ? v != v : v == largest) return static_cast<int32_t>(i);
  }
  return 0;
}
template <>
int32_t argmaxRow(const int32_t* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; i++)
    if (x[i] > x[best]) best = i;
  return static_cast<int32_t>(best);
}

}  // namespace

void kernel_fill(const Call& call) {
  const TensorView& out = call[0];
  uint64_t value = stored(call.attr(0), out.dtype);
  TensorView source = out;
  source.data = &value;
  for (int i = 0; i < source.ndim; i++) source.strides[i] = 0;
  const TensorView* views[] = {&out, &source};
  const Walk walk = makeWalk(views, 2);
  dispatchSize(out.dtype, [&](auto t) { runBlocks(walk, fillBlock<decltype(t)>, kGrain, 1); });
}

void kernel_arange(const Call& call) {
  if (call[0].ndim > 1) checkContiguous("out", call[0]);
  switch (call[0].dtype) {
    case DType::F32:
      return arangeTyped<float>(call);
    case DType::F64:
      return arangeTyped<double>(call);
    case DType::I32:
      return arangeTyped<int32_t>(call);
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
  dispatchSize(call[0].dtype, [&](auto t) { runBlocks(walk, whereBlock<decltype(t)>, kGrain, 0); });
}

void kernel_gatherRows(const Call& call) {
  checkSameDtype(call[0], call[1]);
  checkContiguous("table", call[1]);
  const int32_t* ids = checkedIds(call[2], call[1].shape[0]);
  const int64_t width = rowLength(call[1]), bytes = width * static_cast<int64_t>(dtypeSize(call[1].dtype));
  char* out = call[0].ptr<char>();
  const char* table = call[1].ptr<char>();
  forTasks(call[2].numel(), width, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) memcpy(out + i * bytes, table + ids[i] * bytes, bytes);
  });
}

void kernel_scatterAddRows(const Call& call) {
  checkContiguous("src", call[1]);
  const int32_t* ids = checkedIds(call[2], call[0].shape[0]);
  const DType out = call[0].dtype, src = call[1].dtype;
  if (out == DType::F32 && src == DType::F32) return scatterAdd<float, float>(call, ids);
  if (out == DType::F32 && src == DType::BF16) return scatterAdd<float, bf16>(call, ids);
  if (out == DType::F64 && src == DType::F64) return scatterAdd<double, double>(call, ids);
  if (out == DType::BF16 && src == DType::BF16) return scatterAddRounded(call, ids);
  fail("expected one floating dtype, or bfloat16 into float32, found %s into %s", dtypeName(src), dtypeName(out));
}

void kernel_gatherLast(const Call& call) {
  checkSameDtype(call[0], call[1]);
  checkContiguous("x", call[1]);
  const int64_t width = call[1].size(-1);
  const int32_t* ids = checkedIds(call[2], width);
  dispatchSize(call[0].dtype, [&](auto t) {
    using T = decltype(t);
    T* out = call[0].ptr<T>();
    const T* x = call[1].ptr<T>();
    for (int64_t r = 0, n = call[2].numel(); r < n; r++) out[r] = x[r * width + ids[r]];
  });
}

void kernel_scatterLast(const Call& call) {
  checkSameDtype(call[0], call[1]);
  checkContiguous("out", call[0]);
  const int64_t width = call[0].size(-1);
  const int32_t* ids = checkedIds(call[2], width);
  dispatchSize(call[0].dtype, [&](auto t) {
    using T = decltype(t);
    T* out = call[0].ptr<T>();
    const T* g = call[1].ptr<T>();
    forTasks(call[2].numel(), width, [=](int64_t begin, int64_t end) {
      memset(static_cast<void*>(out + begin * width), 0, (end - begin) * width * sizeof(T));
      for (int64_t r = begin; r < end; r++) out[r * width + ids[r]] = g[r];
    });
  });
}

void kernel_argmax(const Call& call) {
  if (call[0].dtype != DType::I32) fail("expected an int32 output, found %s", dtypeName(call[0].dtype));
  checkContiguous("x", call[1]);
  const int64_t width = call[1].size(-1);
  if (width == 0) fail("expected a last axis of at least one element, found none");
  int32_t* out = call[0].ptr<int32_t>();
  auto run = [&](auto t) KG_LAMBDA_INLINE {
    using T = decltype(t);
    const T* x = call[1].ptr<T>();
    forTasks(call[1].numel() / width, width, [=](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) out[r] = argmaxRow(x + r * width, width);
    });
  };
  if (call[1].dtype == DType::I32) return run(int32_t());
  dispatchFloating(call[1].dtype, run);
}

}  // namespace kg::cpu::KG_ISA
