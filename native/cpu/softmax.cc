// softmax, logSoftmax and logSumExp along contiguous rows, the maximum subtracted. Rows are independent and parallel;
// a row of -inf alone gives NaN (softmax, logSoftmax) or -inf (logSumExp), as in torch.
#include "cpu/tasks.h"

namespace kg::cpu::KG_ISA {
namespace {

constexpr int64_t kBlock = 1024;

template <class C>
KG_INLINE C infinity() {
  return static_cast<C>(__builtin_inf());
}

// NaN may be lost here: it comes back through the sum of exponentials.
template <class C, class T>
KG_INLINE C rowMax(const T* x, int64_t n) {
  Vec<C> best(-infinity<C>());
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    best = max(best, count == Vec<C>::N ? Vec<C>::load(x + i) : Vec<C>::loadPartial(x + i, count, -infinity<C>()));
  });
  return hmax(best);
}

// Sum of e^(x - largest) over at most kBlock elements, by lanes; each exponential is handed to `keep`.
template <class C, class T, class F>
KG_INLINE C sumExpBlock(const T* x, int64_t begin, int64_t end, Vec<C> shift, F keep) {
  Vec<C> even(C(0)), odd(C(0));
  int64_t i = begin;
  for (; i + 2 * Vec<C>::N <= end; i += 2 * Vec<C>::N) {
    const Vec<C> a = vexp(Vec<C>::load(x + i) - shift), b = vexp(Vec<C>::load(x + i + Vec<C>::N) - shift);
    keep(i, a, Vec<C>::N);
    keep(i + Vec<C>::N, b, Vec<C>::N);
    even += a;
    odd += b;
  }
  for (; i < end; i += Vec<C>::N) {
    const int count = end - i < Vec<C>::N ? static_cast<int>(end - i) : Vec<C>::N;
    const Vec<C> e = vexp(Vec<C>::loadPartial(x + i, count) - shift);
    keep(i, e, count);
    C lanes[Vec<C>::N];
    e.store(lanes);
    even += Vec<C>::loadPartial(lanes, count);  // absent lanes count nothing
  }
  return hsum(even + odd);
}

// Blocks keep a sum over a whole vocabulary accurate; they are joined in float64.
template <class C, class T, class F>
KG_INLINE C sumExp(const T* x, int64_t n, C largest, F keep) {
  double total = 0;
  for (int64_t i = 0; i < n; i += kBlock)
    total += static_cast<double>(sumExpBlock<C>(x, i, min64(i + kBlock, n), Vec<C>(largest), keep));
  return static_cast<C>(total);
}

template <class C, class T>
KG_INLINE C rowLogSumExp(const T* x, int64_t n) {
  const C largest = rowMax<C>(x, n);
  // An infinite maximum is not subtracted: inf - inf would be NaN.
  const C shift = largest == infinity<C>() || largest == -infinity<C>() ? C(0) : largest;
  return m::log(sumExp(x, n, shift, [](int64_t, Vec<C>, int) {})) + shift;
}

template <class T>
void softmaxRow(const T* x, T* y, int64_t n) {
  using C = compute_t<T>;
  const C largest = rowMax<C>(x, n);
  if constexpr (sizeof(T) == sizeof(C)) {
    const C sum =
        sumExp(x, n, largest, [=](int64_t i, Vec<C> e, int count) KG_LAMBDA_INLINE { storeLanes(y + i, e, count); });
    const Vec<C> scale(C(1) / sum);
    forVectors<C>(n, [=](int64_t i, int count)
                         KG_LAMBDA_INLINE { storeLanes(y + i, loadLanes<C>(y + i, count) * scale, count); });
  } else {  // the exponentials do not fit unrounded: compute them again
    const Vec<C> scale(C(1) / sumExp(x, n, largest, [](int64_t, Vec<C>, int) {}));
    forVectors<C>(n, [=](int64_t i, int count) KG_LAMBDA_INLINE {
      storeLanes(y + i, vexp(loadLanes<C>(x + i, count) - Vec<C>(largest)) * scale, count);
    });
  }
}

template <class T>
void logSoftmaxRow(const T* x, T* y, int64_t n) {
  using C = compute_t<T>;
  const C largest = rowMax<C>(x, n);
  const C sum = sumExp(x, n, largest, [](int64_t, Vec<C>, int) {});
  const Vec<C> shift(largest), logSum(m::log(sum));
  forVectors<C>(n, [=](int64_t i, int count)
                       KG_LAMBDA_INLINE { storeLanes(y + i, (loadLanes<C>(x + i, count) - shift) - logSum, count); });
}

// row(r) over all rows of `width` elements.
template <class F>
KG_INLINE void forRows(int64_t rows, int64_t width, const F& row) {
  forTasks(rows, width, [&row](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) row(r);
  });
}

struct Rows {
  int64_t count, width;
};
Rows rowsOf(const TensorView& x) {
  const int64_t width = x.ndim > 0 ? x.size(-1) : 1;
  return {width > 0 ? x.numel() / width : 0, width};
}

void checkRows(const TensorView& out, const TensorView& x) {
  if (out.dtype != x.dtype) fail("expected one dtype, found %s from %s", dtypeName(out.dtype), dtypeName(x.dtype));
  if (!out.contiguous() || !x.contiguous()) fail("expected contiguous rows, found strides; try contiguous() first");
}

}  // namespace

void kernel_softmax(const Call& call) {
  checkRows(call[0], call[1]);
  const Rows rows = rowsOf(call[1]);
  dispatchFloating(call[1].dtype, [&](auto t) KG_LAMBDA_INLINE {
    using T = decltype(t);
    const T* x = call[1].ptr<T>();
    T* y = call[0].ptr<T>();
    forRows(rows.count, rows.width, [=](int64_t r) { softmaxRow(x + r * rows.width, y + r * rows.width, rows.width); });
  });
}

void kernel_logSoftmax(const Call& call) {
  checkRows(call[0], call[1]);
  const Rows rows = rowsOf(call[1]);
  dispatchFloating(call[1].dtype, [&](auto t) KG_LAMBDA_INLINE {
    using T = decltype(t);
    const T* x = call[1].ptr<T>();
    T* y = call[0].ptr<T>();
    forRows(rows.count, rows.width,
            [=](int64_t r) { logSoftmaxRow(x + r * rows.width, y + r * rows.width, rows.width); });
  });
}

void kernel_logSumExp(const Call& call) {
  checkRows(call[0], call[1]);
  const int64_t width = call[1].ndim > 0 ? call[1].size(-1) : 1;
  dispatchFloating(call[1].dtype, [&](auto t) KG_LAMBDA_INLINE {
    using T = decltype(t);
    const T* x = call[1].ptr<T>();
    T* y = call[0].ptr<T>();
    forRows(call[0].numel(), width,
            [=](int64_t r) { y[r] = static_cast<T>(rowLogSumExp<compute_t<T>>(x + r * width, width)); });
  });
}

}  // namespace kg::cpu::KG_ISA
