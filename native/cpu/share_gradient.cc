// One sequence's gradient of a parameter, looked at once: its square, its product with another, and its shares in two
// accumulated gradients. Blocks have a fixed size and are summed in order: no result depends on the number of threads.
#include "cpu/fused.h"

namespace kg::cpu::KG_ISA {

namespace {

constexpr int64_t kShareBlock = 8192;  // elements; part of the order of summation

// The sum of x[i] * y[i] in float64, over 32 lanes whatever the instruction set.
template <class C>
KG_INLINE double dot(const C* x, const C* y, int64_t n) {
  constexpr int kSumLanes = 32;
  double lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int j = 0; j < kSumLanes; j++) lanes[j] += static_cast<double>(x[i + j]) * static_cast<double>(y[i + j]);
  for (int j = 0; i < n; i++, j++) lanes[j] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  for (int step = kSumLanes / 2; step > 0; step /= 2)
    for (int j = 0; j < step; j++) lanes[j] += lanes[j + step];
  return lanes[0];
}

template <class C>
KG_INLINE void addScaled(C* out, C scale, const C* x, int64_t n) {
  const Vec<C> factor(scale);
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    storeLanes(out + i, fma(factor, loadLanes<C>(x + i, count), loadLanes<C>(out + i, count)), count);
  });
}

template <class C>
void shareGradient(const Call& call) {
  const int64_t n = call[3].numel(), blocks = (n + kShareBlock - 1) / kShareBlock;
  C *first = call[1].present() ? call[1].ptr<C>() : nullptr, *second = call[2].present() ? call[2].ptr<C>() : nullptr;
  const C *tile = call[3].ptr<C>(), *other = call[4].present() ? call[4].ptr<C>() : nullptr;
  const C* coefficients = call[5].ptr<C>();
  auto* partials = static_cast<double*>(scratch(call, 2 * blocks * sizeof(double)));
  parallelFor(blocks, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t at = block * kShareBlock, count = min64(kShareBlock, n - at);
      partials[2 * block] = dot(tile + at, tile + at, count);
      partials[2 * block + 1] = other ? dot(tile + at, other + at, count) : 0;
      if (first) addScaled(first + at, coefficients[0], tile + at, count);
      if (second) addScaled(second + at, coefficients[1], tile + at, count);
    }
  });
  double total[2] = {};
  for (int64_t i = 0; i < 2 * blocks; i++) total[i % 2] += partials[i];
  double* sums = call[0].ptr<double>();
  sums[0] += total[0];
  sums[1] += total[1];
}

}  // namespace

void kernel_shareGradient(const Call& call) {
  for (int i = 1; i < 6; i++)
    if (call[i].present() && call[i].dtype != call[3].dtype)
      fail("[shareGradient] expected tensors of one dtype, found %s and %s", dtypeName(call[3].dtype),
           dtypeName(call[i].dtype));
  if (call[3].dtype == DType::F32) return shareGradient<float>(call);
  if (call[3].dtype == DType::F64) return shareGradient<double>(call);
  fail("[shareGradient] expected float32 or float64, found %s", dtypeName(call[3].dtype));
}

}  // namespace kg::cpu::KG_ISA
