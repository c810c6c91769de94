// Mathematical functions on Vec<float> and Vec<double>, and the namespace `m` that the rows of elementwise.def are
// written in. A scalar goes through lane 0 of the vector code, so that it has the same bits. Included by vec.h alone.
//
// Accuracy: within 2 ulp over the whole range, subnormal numbers, infinities and NaN included.
#pragma once

namespace kg::cpu::KG_ISA {

// Coefficients: (e^r - 1 - r) / r^2 on |r| <= ln(2)/2 (Chebyshev interpolation), and fdlibm's for log(1 + f).
template <class C>
struct MathConstants;
template <>
struct MathConstants<float> {
  static constexpr int mantissaBits = 23;
  static constexpr int32_t exponentBias = 127;
  static constexpr float roundMagic = 12582912.0f;  // 1.5 * 2^23
  static constexpr float log2e = 1.44269504f, ln2High = 0.693359375f, ln2Low = -2.12194440e-4f;
  static constexpr float expMin = -104.0f, expMax = 89.0f, expm1Min = -20.0f, tiny = 0x1p-26f;
  static constexpr float minNormal = 0x1p-126f, subnormalScale = 0x1p25f, subnormalExponent = 25.0f;
  static constexpr int32_t sqrtHalf = 0x3f3504f3;
  static constexpr float expPoly[] = {0x1.000000p-1f,        0x1.5555555a78488p-3f,  0x1.5554e90f41648p-5f,
                                      0x1.1110e0f63cedcp-7f, 0x1.6d4317dde5b58p-10f, 0x1.a124e67917289p-13f};
  static constexpr float logPoly[] = {0xaaaaaa.0p-24f, 0xccce13.0p-25f, 0x91e9ee.0p-25f, 0xf89e26.0p-26f};
};
template <>
struct MathConstants<double> {
  static constexpr int mantissaBits = 52;
  static constexpr int64_t exponentBias = 1023;
  static constexpr double roundMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2e = 1.44269504088896338700, ln2High = 6.93147180369123816490e-01,
                          ln2Low = 1.90821492927058770002e-10;
  static constexpr double expMin = -746.0, expMax = 710.0, expm1Min = -45.0, tiny = 0x1p-56;
  static constexpr double minNormal = 0x1p-1022, subnormalScale = 0x1p54, subnormalExponent = 54.0;
  static constexpr int64_t sqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr double expPoly[] = {0.5,
                                       0.1666666666666667,
                                       0.04166666666666667,
                                       0.00833333333332614,
                                       0.0013888888888883752,
                                       0.00019841269874804214,
                                       2.4801587325536023e-05,
                                       2.7557255421023506e-06,
                                       2.7557273657975953e-07,
                                       2.5105208339987698e-08,
                                       2.0914680780540267e-09};
  static constexpr double logPoly[] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                                       2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                                       1.479819860511658591e-01};
};

template <class C, int Terms>
KG_INLINE Vec<C> polynomial(Vec<C> x, const C (&c)[Terms]) {
  Vec<C> y(c[Terms - 1]);
#pragma GCC unroll 16
  for (int i = Terms - 2; i >= 0; i--) y = fma(y, x, Vec<C>(c[i]));
  return y;
}

template <class C>
KG_INLINE typename VecTraits<C>::U bitsOf(Vec<C> x) {
  return reinterpret_cast<typename VecTraits<C>::U>(x.v);
}
template <class C>
KG_INLINE Vec<C> fromBits(typename VecTraits<C>::U u) {
  return reinterpret_cast<typename VecTraits<C>::V>(u);
}

// 2^n for a vector of integers in the range of normal exponents.
template <class C>
KG_INLINE Vec<C> powerOfTwo(typename VecTraits<C>::U n) {
  using K = MathConstants<C>;
  return fromBits<C>((n + K::exponentBias) << K::mantissaBits);
}

// x = n ln2 + r with |r| <= ln2/2: n as integers, r as high + low.
template <class C>
struct Reduced {
  typename VecTraits<C>::U n;
  Vec<C> r, rLow;
};
template <class C>
KG_INLINE Reduced<C> reduceByLn2(Vec<C> x) {
  using K = MathConstants<C>;
  const Vec<C> magic(K::roundMagic);
  const Vec<C> shifted = fma(x, Vec<C>(K::log2e), magic);
  const Vec<C> n = shifted - magic;
  const Vec<C> high = fma(n, Vec<C>(-K::ln2High), x);  // exact
  const Vec<C> low = n * Vec<C>(K::ln2Low);
  const Vec<C> r = high - low;
  return {bitsOf(shifted) - bitsOf(magic), r, (high - r) - low};
}

namespace m {

using KG_ISA::select;
template <class S>
KG_INLINE S select(bool c, S a, S b) {
  return c ? a : b;
}
template <class C>
KG_INLINE Vec<C> abs(Vec<C> x) {
  return fromBits<C>(bitsOf(x) & ~bitsOf(Vec<C>(C(-0.0))));
}
template <class C>
KG_INLINE Vec<C> copySign(Vec<C> magnitude, Vec<C> sign) {
  const auto bit = bitsOf(Vec<C>(C(-0.0)));
  return fromBits<C>((bitsOf(magnitude) & ~bit) | (bitsOf(sign) & bit));
}
template <class C>
KG_INLINE Vec<C> sqrt(Vec<C> x) {
  return vsqrt(x);
}

template <class C>
KG_INLINE Vec<C> exp(Vec<C> x) {
  using K = MathConstants<C>;
  // The operand order keeps a NaN: max and min return their second operand then.
  x = max(Vec<C>(K::expMin), min(Vec<C>(K::expMax), x));
  const Reduced<C> d = reduceByLn2(x);
  const Vec<C> y = fma(d.r * d.r, polynomial(d.r, K::expPoly), d.r) + Vec<C>(C(1));
  // Two exact-or-final factors, so that subnormal results are rounded once. n + 2^12 is positive: a logical shift
  // halves.
  const auto half = ((d.n + 4096) >> 1) - 2048;
  return y * powerOfTwo<C>(half) * powerOfTwo<C>(d.n - half);
}

template <class C>
KG_INLINE Vec<C> expm1(Vec<C> x) {
  using K = MathConstants<C>;
  const Vec<C> clamped = max(Vec<C>(K::expm1Min), min(Vec<C>(K::expMax), x));
  const Reduced<C> d = reduceByLn2(clamped);
  const Vec<C> tail = fma(d.rLow, d.r, d.rLow);
  const Vec<C> p = d.r + fma(d.r * d.r, polynomial(d.r, K::expPoly), tail);  // e^r - 1
  // 2^n p + (2^n - 1), halved so that 2^n does not overflow before the result does.
  const Vec<C> scale = powerOfTwo<C>(d.n - 1);
  const Vec<C> y = fma(scale, p, scale - Vec<C>(C(0.5)));
  return select(abs(x) < Vec<C>(K::tiny), x, y + y);
}

// log((1 + f) 2^k) + correction, with 1 + f in [sqrt(1/2), sqrt(2)).
template <class C>
KG_INLINE Vec<C> logKernel(Vec<C> f, Vec<C> k, Vec<C> correction) {
  using K = MathConstants<C>;
  const Vec<C> s = f / (Vec<C>(C(2)) + f);
  const Vec<C> z = s * s;
  const Vec<C> series = z * polynomial(z, K::logPoly);
  const Vec<C> halfSquare = Vec<C>(C(0.5)) * f * f;
  const Vec<C> low = fma(k, Vec<C>(K::ln2Low), correction);
  return fma(k, Vec<C>(K::ln2High), f - (halfSquare - (s * (halfSquare + series) + low)));
}
// x = 2^k mantissa with the mantissa in [sqrt(1/2), sqrt(2)), for normal positive x.
template <class C>
KG_INLINE Vec<C> splitExponent(Vec<C> x, Vec<C>* mantissa) {
  using K = MathConstants<C>;
  const auto one = static_cast<typename VecTraits<C>::Int>(K::exponentBias) << K::mantissaBits;
  const auto shifted = bitsOf(x) + (one - K::sqrtHalf);
  const auto fraction = (static_cast<typename VecTraits<C>::Int>(1) << K::mantissaBits) - 1;
  *mantissa = fromBits<C>((shifted & fraction) + K::sqrtHalf);
  // Integer to floating point by adding it to the bits of a number whose unit is 1.
  const Vec<C> magic(K::roundMagic);
  return fromBits<C>(bitsOf(magic) + ((shifted >> K::mantissaBits) - K::exponentBias)) - magic;
}

template <class C>
KG_INLINE Vec<C> log(Vec<C> x) {
  using K = MathConstants<C>;
  const Vec<C> zero(C(0)), infinity{C(__builtin_inf())};
  const auto subnormal = x < Vec<C>(K::minNormal);
  Vec<C> mantissa;
  Vec<C> k = splitExponent(select(subnormal, x * Vec<C>(K::subnormalScale), x), &mantissa);
  k = k - select(subnormal, Vec<C>(K::subnormalExponent), zero);
  Vec<C> y = logKernel(mantissa - Vec<C>(C(1)), k, zero);
  y = select(x < infinity, y, x);  // inf and NaN are their own logarithms
  y = select(x == zero, -infinity, y);
  return select(x < zero, Vec<C>(C(__builtin_nan(""))), y);
}

template <class C>
KG_INLINE Vec<C> log1p(Vec<C> x) {
  const Vec<C> zero(C(0)), one(C(1)), two(C(2)), infinity{C(__builtin_inf())};
  const Vec<C> u = one + x;
  Vec<C> mantissa;
  const Vec<C> k = splitExponent(u, &mantissa);
  // What the sum 1 + x lost, relative to it; nothing is lost where x itself serves as f.
  const Vec<C> lost = select(k >= two, one - (u - x), x - (u - one)) / u;
  const auto small = k == zero;
  Vec<C> y = logKernel(select(small, x, mantissa - one), k, select(small, zero, lost));
  y = select(x < infinity, y, x);
  y = select(x == zero, x, y);
  y = select(x == -one, -infinity, y);
  return select(x < -one, Vec<C>(C(__builtin_nan(""))), y);
}

// q / (sum + lost) from the rounded quotient q / sum, given about 1 / sum.
template <class C>
KG_INLINE Vec<C> correctQuotient(Vec<C> q, Vec<C> lost, Vec<C> inverse) {
  return fma(-q * lost, inverse, q);
}
template <class C>
KG_INLINE Vec<C> tanh(Vec<C> x) {
  const Vec<C> t = expm1(Vec<C>(C(-2)) * abs(x)), two(C(2));
  const Vec<C> sum = t + two, lost = (two - sum) + t;
  const Vec<C> q = -t / sum;
  return copySign(correctQuotient(q, lost, fma(q, Vec<C>(C(0.5)), Vec<C>(C(0.5)))), x);
}
// e^-|x| never overflows; x NaN stays NaN through it.
template <class C>
KG_INLINE Vec<C> sigmoid(Vec<C> x) {
  const Vec<C> e = exp(-abs(x)), one(C(1));
  const Vec<C> sum = one + e, lost = (one - sum) + e;
  const auto negative = x < Vec<C>(C(0));
  const Vec<C> q = select(negative, e, one) / sum;
  return correctQuotient(q, lost, select(negative, one - q, q));
}
template <class C>
KG_INLINE Vec<C> softplus(Vec<C> x) {
  return max(x, Vec<C>(C(0))) + log1p(exp(-abs(x)));
}
template <class C>
KG_INLINE Vec<C> logSigmoid(Vec<C> x) {
  // min(x, 0) - log1p(e^-|x|); NaN stays NaN through either term.
  return min(x, Vec<C>(C(0))) - log1p(exp(-abs(x)));
}

// Rarely used: the scalar function lane by lane.
#define KG_LANEWISE(name)                                                                                          \
  template <class C>                                                                                               \
  KG_INLINE Vec<C> name(Vec<C> x) {                                                                                \
    C lanes[Vec<C>::N];                                                                                            \
    x.store(lanes);                                                                                                \
    for (C& lane : lanes) lane = sizeof(C) == 4 ? C(__builtin_##name##f(float(lane))) : C(__builtin_##name(lane)); \
    return Vec<C>::load(lanes);                                                                                    \
  }
KG_LANEWISE(sin)
KG_LANEWISE(cos)
#undef KG_LANEWISE
template <class C>
KG_INLINE Vec<C> pow(Vec<C> x, Vec<C> y) {
  C lanes[Vec<C>::N];
  for (int i = 0; i < Vec<C>::N; i++)
    lanes[i] = sizeof(C) == 4 ? C(__builtin_powf(float(x[i]), float(y[i]))) : C(__builtin_pow(x[i], y[i]));
  return Vec<C>::load(lanes);
}

// The identities of min and max.
template <class C>
KG_INLINE Vec<C> highest(Vec<C>) {
  return C(__builtin_inf());
}
template <class C>
KG_INLINE Vec<C> lowest(Vec<C>) {
  return -C(__builtin_inf());
}

#define KG_SCALAR(name)                                                 \
  KG_INLINE float name(float x) { return name(Vec<float>(x)).first(); } \
  KG_INLINE double name(double x) { return name(Vec<double>(x)).first(); }
KG_SCALAR(abs)
KG_SCALAR(exp)
KG_SCALAR(expm1)
KG_SCALAR(log)
KG_SCALAR(log1p)
KG_SCALAR(sqrt)
KG_SCALAR(sin)
KG_SCALAR(cos)
KG_SCALAR(tanh)
KG_SCALAR(sigmoid)
KG_SCALAR(softplus)
KG_SCALAR(logSigmoid)
#undef KG_SCALAR

}  // namespace m

// The short names kernels use.
#define KG_VECTOR_NAME(vname, name)  \
  template <class C>                 \
  KG_INLINE Vec<C> vname(Vec<C> x) { \
    return m::name(x);               \
  }
KG_VECTOR_NAME(vabs, abs)
KG_VECTOR_NAME(vexp, exp)
KG_VECTOR_NAME(vexpm1, expm1)
KG_VECTOR_NAME(vlog, log)
KG_VECTOR_NAME(vlog1p, log1p)
KG_VECTOR_NAME(vtanh, tanh)
KG_VECTOR_NAME(vsigmoid, sigmoid)
KG_VECTOR_NAME(vsoftplus, softplus)
KG_VECTOR_NAME(vlogSigmoid, logSigmoid)
#undef KG_VECTOR_NAME

}  // namespace kg::cpu::KG_ISA
