// Derivatives of the backward passes of RMSNorm and SwiGLU: for phi = <dxDot, dx> + ..., what phi sends to the inputs
// of the backward kernel. One pass over a row; the contract stands in ops/kernels.def.
#include "cpu/fused.h"

namespace kg::cpu::KG_ISA {

namespace {

constexpr int64_t kRowsPerPartial = 32;  // as in rmsNormBackward: part of the result, not a tuning knob

// With r = rstd, xh = r x, a = dy weight, t = dxDot, b = weightDot dy and means over the row of length n:
//   gDot = weight r (t - xh mean(xh t)) + weightDot xh
//   dx = r^2 (xh (3 mean(xh a) mean(xh t) - mean(a t)) - a mean(xh t) - t mean(xh a)) + r (b - xh mean(xh b))
//   dweight = dy r (t - xh mean(xh t))
template <class C>
struct NormMeans {
  C xa, xt, at, xb;
};

template <class T, class C>
KG_INLINE NormMeans<C> normMeans(const T* t, const C* wd, const T* g, const T* x, const T* w, C rstd, int64_t n) {
  Vec<C> xa(C(0)), xt(C(0)), at(C(0)), xb(C(0));
  const Vec<C> scale(rstd);
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const Vec<C> xh = loadLanes<C>(x + i, count) * scale, dy = loadLanes<C>(g + i, count);
    const Vec<C> a = dy * loadLanes<C>(w + i, count), d = loadLanes<C>(t + i, count);
    xa = fma(xh, a, xa);
    xt = fma(xh, d, xt);
    at = fma(a, d, at);
    if (wd) xb = fma(xh * loadLanes<C>(wd + i, count), dy, xb);
  });
  const C over = C(1) / C(n);
  return {hsum(xa) * over, hsum(xt) * over, hsum(at) * over, hsum(xb) * over};
}

template <class T, class C>
KG_INLINE void normTangentRow(T* gDot, T* dx, C* dweight, const T* t, const C* wd, const T* g, const T* x, const T* w,
                              C rstd, int64_t n) {
  const NormMeans<C> m = normMeans(t, wd, g, x, w, rstd, n);
  const Vec<C> r(rstd), r2(rstd * rstd), xa(m.xa), xt(m.xt), xb(m.xb), along(C(3) * m.xa * m.xt - m.at);
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const Vec<C> xh = loadLanes<C>(x + i, count) * r, dy = loadLanes<C>(g + i, count);
    const Vec<C> weight = loadLanes<C>(w + i, count), a = dy * weight, d = loadLanes<C>(t + i, count);
    const Vec<C> u = r * (d - xh * xt);
    Vec<C> forG = weight * u, forX = r2 * (xh * along - a * xt - d * xa);
    if (wd) {
      const Vec<C> v = loadLanes<C>(wd + i, count);
      forG = fma(v, xh, forG);
      forX = fma(r, v * dy - xh * xb, forX);
    }
    storeLanes(gDot + i, forG, count);
    storeLanes(dx + i, forX, count);
    if (dweight) storeLanes(dweight + i, fma(dy, u, loadLanes<C>(dweight + i, count)), count);
  });
}

template <class T>
void rmsNormTangent(const Call& call) {
  using C = compute_t<T>;
  T *gDot = call[0].ptr<T>(), *dx = call[1].ptr<T>();
  const T *t = call[3].ptr<T>(), *g = call[5].ptr<T>(), *x = call[6].ptr<T>(), *w = call[7].ptr<T>();
  const C *weightDot = call[4].present() ? call[4].ptr<C>() : nullptr, *rstd = call[8].ptr<C>();
  const int64_t rows = call[3].size(0), width = call[3].size(1);
  const RowMap rowMap = RowMap::checked(call[9], call[8].numel());
  const int32_t* sequence = call[10].present() ? call[10].ptr<int32_t>() : nullptr;
  if (sequence && weightDot) checkIndices("rowSequence", sequence, rows, call[4].size(0));
  const bool wantWeight = call[2].present();
  const int64_t blocks = (rows + kRowsPerPartial - 1) / kRowsPerPartial;
  C* partials = wantWeight ? static_cast<C*>(scratch(call, blocks * width * sizeof(C))) : nullptr;
  parallelFor(blocks, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t block = begin; block < end; block++) {
      C* partial = wantWeight ? partials + block * width : nullptr;
      if (partial) memset(static_cast<void*>(partial), 0, width * sizeof(C));
      const int64_t last = min64((block + 1) * kRowsPerPartial, rows);
      for (int64_t i = block * kRowsPerPartial; i < last; i++) {
        const int64_t primal = rowMap(i), at = i * width;
        const C* wd = weightDot ? weightDot + (sequence ? sequence[i] : 0) * width : nullptr;
        normTangentRow(gDot + at, dx + at, partial, t + at, wd, g + at, x + primal * width, w, rstd[primal], width);
      }
    }
  });
  for (int64_t block = 0; wantWeight && block < blocks; block++) {
    C* out = call[2].ptr<C>();
    forVectors<C>(width, [&](int64_t i, int count) KG_LAMBDA_INLINE {
      storeLanes(out + i, loadLanes<C>(out + i, count) + loadLanes<C>(partials + block * width + i, count), count);
    });
  }
}

// With s = sigmoid(gate), f = silu(gate), f' = s (1 + gate (1 - s)), f'' = s (1 - s) (2 + gate (1 - 2 s)), p and q the
// tangents of dgate and dup: gDot = p up f' + q f, dgate = dy (p up f'' + q f'), dup = dy p f'.
template <class T, class C>
KG_INLINE void swigluTangentRow(T* gDot, T* dgate, T* dup, const T* p, const T* q, const T* dy, const T* gate,
                                const T* up, int64_t n) {
  const Vec<C> one(C(1)), two(C(2));
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const Vec<C> x = loadLanes<C>(gate + i, count), u = loadLanes<C>(up + i, count), g = loadLanes<C>(dy + i, count);
    const Vec<C> forGate = loadLanes<C>(p + i, count), forUp = loadLanes<C>(q + i, count), s = vsigmoid(x);
    const Vec<C> slope = s * (one + x * (one - s)), bend = s * (one - s) * (two + x * (one - two * s));
    storeLanes(gDot + i, forGate * u * slope + forUp * x * s, count);
    storeLanes(dgate + i, g * (forGate * u * bend + forUp * slope), count);
    storeLanes(dup + i, g * forGate * slope, count);
  });
}

template <class T>
void swigluTangent(const Call& call) {
  const int64_t rows = call[5].size(0), width = call[5].size(1);
  const RowMap rowMap = RowMap::checked(call[8], call[6].size(0));
  parallelFor(rows, rowGrain(width), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t at = i * width, primal = rowMap(i) * width;
      swigluTangentRow<T, compute_t<T>>(call[0].ptr<T>() + at, call[1].ptr<T>() + at, call[2].ptr<T>() + at,
                                        call[3].ptr<T>() + at, call[4].ptr<T>() + at, call[5].ptr<T>() + at,
                                        call[6].ptr<T>() + primal, call[7].ptr<T>() + primal, width);
    }
  });
}

}  // namespace

void kernel_rmsNormTangent(const Call& call) {
  dispatchFloating(call[3].dtype, [&](auto t) { rmsNormTangent<decltype(t)>(call); });
}

void kernel_swigluTangent(const Call& call) {
  dispatchFloating(call[5].dtype, [&](auto t) { swigluTangent<decltype(t)>(call); });
}

}  // namespace kg::cpu::KG_ISA
