// RMSNorm along the last axis, alone and of a residual sum, forward and backward. Rows are independent; the weight's
// gradient is summed over fixed blocks of rows and these in ascending order, so no result depends on the number of
// threads.
#include "cpu/fused.h"

namespace kg::cpu::KG_ISA {

namespace {

// Rows whose contributions to dweight are summed in one partial sum. Part of the result: not a tuning knob per machine.
constexpr int64_t kRowsPerPartial = 32;

template <class T, class C>
KG_INLINE C meanSquare(const T* x, int64_t n) {
  Vec<C> sum(C(0));
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const Vec<C> v = loadLanes<C>(x + i, count);
    sum = sum + v * v;
  });
  return hsum(sum) / C(n);
}

// The same of x + delta, which is stored.
template <class T, class C>
KG_INLINE C meanSquareOfSum(T* out, const T* x, const T* delta, int64_t n) {
  Vec<C> sum(C(0));
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const Vec<C> v = roundTo<T>(loadLanes<C>(x + i, count) + loadLanes<C>(delta + i, count));
    storeLanes(out + i, v, count);
    sum = sum + v * v;
  });
  return hsum(sum) / C(n);
}

// y = x * rstd * weight; returns rstd.
template <class T, class C>
KG_INLINE C normalizeRow(T* y, const T* x, const T* weight, int64_t n, C meanOfSquares, C eps) {
  const C rstd = C(1) / m::sqrt(meanOfSquares + eps);
  const Vec<C> scale(rstd);
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const Vec<C> normalized = roundTo<T>(loadLanes<C>(x + i, count) * scale);
    storeLanes(y + i, normalized * loadLanes<C>(weight + i, count), count);
  });
  return rstd;
}

template <class T>
void rmsNorm(const Call& call) {
  using C = compute_t<T>;
  T* y = call[0].ptr<T>();
  C* rstd = call[1].ptr<C>();
  const T* x = call[2].ptr<T>();
  const T* weight = call[3].ptr<T>();
  const int64_t width = call[2].size(-1), rows = call[1].numel();
  const C eps = static_cast<C>(call.attr(0));
  parallelFor(rows, rowGrain(width), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      const T* row = x + r * width;
      rstd[r] = normalizeRow(y + r * width, row, weight, width, meanSquare<T, C>(row, width), eps);
    }
  });
}

template <class T>
void addRmsNorm(const Call& call) {
  using C = compute_t<T>;
  T *sum = call[0].ptr<T>(), *y = call[1].ptr<T>();
  C* rstd = call[2].ptr<C>();
  const T *x = call[3].ptr<T>(), *delta = call[4].ptr<T>(), *weight = call[5].ptr<T>();
  const int64_t width = call[3].size(-1), rows = call[2].numel();
  const C eps = static_cast<C>(call.attr(0));
  parallelFor(rows, rowGrain(width), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      const int64_t at = r * width;
      const C square = meanSquareOfSum<T, C>(sum + at, x + at, delta + at, width);
      rstd[r] = normalizeRow(y + at, sum + at, weight, width, square, eps);
    }
  });
}

// mean(dy * weight * xh), xh = x * rstd.
template <class T, class C>
KG_INLINE C meanProjection(const T* dy, const T* x, const T* weight, C rstd, int64_t n) {
  Vec<C> sum(C(0));
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    sum = sum + loadLanes<C>(dy + i, count) * loadLanes<C>(weight + i, count) * loadLanes<C>(x + i, count);
  });
  return hsum(sum) * rstd / C(n);
}

// dx = rstd * (dy * weight - xh * mean(dy * weight * xh)) (+ more).
template <class T, class C>
KG_INLINE void inputGradientRow(T* dx, const T* dy, const T* x, const T* weight, const T* more, C rstd, int64_t n) {
  const Vec<C> scale(rstd), slope(rstd * meanProjection(dy, x, weight, rstd, n));
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const Vec<C> gy = loadLanes<C>(dy + i, count) * loadLanes<C>(weight + i, count);
    const Vec<C> behind = gy - loadLanes<C>(x + i, count) * slope;
    storeLanes(dx + i, more ? fma(scale, behind, loadLanes<C>(more + i, count)) : scale * behind, count);
  });
}

// sum += dy * xh.
template <class T, class C>
KG_INLINE void addWeightGradientRow(C* sum, const T* dy, const T* x, C rstd, int64_t n) {
  const Vec<C> scale(rstd);
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const Vec<C> xh = loadLanes<C>(x + i, count) * scale;
    storeLanes(sum + i, loadLanes<C>(sum + i, count) + loadLanes<C>(dy + i, count) * xh, count);
  });
}

// out[width] += the sum of partials[count, width] in ascending order.
template <class C>
KG_INLINE void addPartials(C* out, const C* partials, int64_t partialCount, int64_t width) {
  forVectors<C>(width, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    Vec<C> sum(C(0));
    for (int64_t p = 0; p < partialCount; p++) sum = sum + loadLanes<C>(partials + p * width + i, count);
    storeLanes(out + i, loadLanes<C>(out + i, count) + sum, count);
  });
}

template <class T>
void rmsNormBackward(const Call& call) {
  using C = compute_t<T>;
  T* dx = call[0].present() ? call[0].ptr<T>() : nullptr;
  const bool wantWeight = call[1].present();
  const T* dy = call[2].ptr<T>();
  const T* x = call[3].ptr<T>();
  const T* weight = call[4].ptr<T>();
  const C* rstd = call[5].ptr<C>();
  const int64_t width = call[2].size(-1), primalRows = call[5].numel();
  const int64_t rows = call[6].present() ? call[6].numel() : primalRows;
  const RowMap rowMap = RowMap::checked(call[6], primalRows);
  const T* dsum = call[7].present() ? call[7].ptr<T>() : nullptr;
  const int64_t blocks = (rows + kRowsPerPartial - 1) / kRowsPerPartial;
  C* partials = wantWeight ? static_cast<C*>(scratch(call, blocks * width * sizeof(C))) : nullptr;

  parallelFor(blocks, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t block = begin; block < end; block++) {
      C* partial = partials + block * width;
      for (int64_t i = 0; wantWeight && i < width; i++) partial[i] = C(0);
      const int64_t last = min64((block + 1) * kRowsPerPartial, rows);
      for (int64_t r = block * kRowsPerPartial; r < last; r++) {
        const int64_t primal = rowMap(r);
        const T *dyRow = dy + r * width, *xRow = x + primal * width;
        const T* more = dsum ? dsum + r * width : nullptr;
        if (dx) inputGradientRow(dx + r * width, dyRow, xRow, weight, more, rstd[primal], width);
        if (wantWeight) addWeightGradientRow(partial, dyRow, xRow, rstd[primal], width);
      }
    }
  });
  if (wantWeight) addPartials(call[1].ptr<C>(), partials, blocks, width);
}

}  // namespace

void kernel_rmsNorm(const Call& call) {
  dispatchFloating(call[0].dtype, [&](auto t) { rmsNorm<decltype(t)>(call); });
}

void kernel_addRmsNorm(const Call& call) {
  dispatchFloating(call[0].dtype, [&](auto t) { addRmsNorm<decltype(t)>(call); });
}

void kernel_rmsNormBackward(const Call& call) {
  dispatchFloating(call[2].dtype, [&](auto t) { rmsNormBackward<decltype(t)>(call); });
}

}  // namespace kg::cpu::KG_ISA
