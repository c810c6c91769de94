// Optimizer kernels over many tensors in one pass over memory: work is cut in fixed blocks of each tensor, so sums have
// one order and updates are elementwise. Learning rate, step, clipping and skip come from device memory as scalars.
#include <cmath>

#include "cpu/fused.h"

namespace kg::cpu::KG_ISA {

namespace {

constexpr int64_t kBlock = 16384;  // elements; part of the order of summation of sumSquares

KG_INLINE int64_t blocksOf(const TensorView& v) { return (v.numel() + kBlock - 1) / kBlock; }

// f(group, begin, end, block) for every block of every group's first tensor, in parallel. `block` counts over all
// groups. firstBlock[groups + 1] is scratch that this fills.
template <class F>
KG_INLINE void forTensorBlocks(const TensorView* groups, int64_t groupCount, int64_t groupSize, int64_t* firstBlock,
                               F f) {
  firstBlock[0] = 0;
  for (int64_t i = 0; i < groupCount; i++) firstBlock[i + 1] = firstBlock[i] + blocksOf(groups[i * groupSize]);
  parallelFor(firstBlock[groupCount], 1, [&](int64_t begin, int64_t end, int) {
    int64_t group = 0;
    for (int64_t block = begin; block < end; block++) {
      while (block >= firstBlock[group + 1]) group++;
      const int64_t first = (block - firstBlock[group]) * kBlock;
      f(group, first, min64(first + kBlock, groups[group * groupSize].numel()), block);
    }
  });
}

// In float64 over 32 lanes, whatever the instruction set: the same sum everywhere.
template <class T>
KG_INLINE double sumSquaresOf(const T* x, int64_t n) {
  constexpr int kLanes = 32;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; j++) {
      const double v = static_cast<compute_t<T>>(x[i + j]);
      lanes[j] += v * v;
    }
  }
  for (int j = 0; i < n; i++, j++) {
    const double v = static_cast<compute_t<T>>(x[i]);
    lanes[j] += v * v;
  }
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int j = 0; j < step; j++) lanes[j] += lanes[j + step];
  }
  return lanes[0];
}

struct AdamwScalars {
  double decay;                          // 1 - lr * weightDecay
  double factor;                         // of the gradient
  double beta2, rate1, rate2;            // rate = 1 - beta
  double stepSize, correction, epsilon;  // lr / (1 - b1^t), sqrt(1 - b2^t)
};

KG_INLINE AdamwScalars adamwScalars(const double* scalars, const Call& call) {
  const double lr = scalars[0], step = scalars[1], beta1 = call.attr(0), beta2 = call.attr(1);
  AdamwScalars s;
  s.decay = 1 - lr * call.attr(3);
  s.factor = scalars[2];
  s.beta2 = beta2;
  s.rate1 = 1 - beta1;
  s.rate2 = 1 - beta2;
  s.stepSize = lr / (1 - pow(beta1, step));
  s.correction = ::sqrt(1 - pow(beta2, step));
  s.epsilon = call.attr(2);
  return s;
}

template <class C>
KG_INLINE void storeLowPrecision(bf16* p, Vec<C> v, int count) {
  if constexpr (sizeof(C) == 4) {
    storeLanes(p, v, count);
  } else {
    for (int i = 0; i < count; i++) p[i] = static_cast<float>(v[i]);
  }
}

// a + rate * (b - a), from the nearer end, as torch's lerp.
template <class C>
KG_INLINE Vec<C> lerp(Vec<C> a, Vec<C> b, C rate) {
  return rate < C(0.5) ? a + Vec<C>(rate) * (b - a) : b - (b - a) * Vec<C>(C(1) - rate);
}

template <class C, class G>
KG_INLINE void adamwBlock(C* w, C* mean, C* square, const G* grad, bf16* low, int64_t n, const AdamwScalars& s) {
  const Vec<C> decay(C(s.decay)), factor(C(s.factor)), beta2(C(s.beta2)), rate2(C(s.rate2));
  const Vec<C> stepSize(C(s.stepSize)), correction(C(s.correction)), epsilon(C(s.epsilon));
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const Vec<C> g = loadLanes<C>(grad + i, count) * factor;
    const Vec<C> newM = lerp(loadLanes<C>(mean + i, count), g, C(s.rate1));
    const Vec<C> newV = loadLanes<C>(square + i, count) * beta2 + rate2 * g * g;
    const Vec<C> denominator = m::sqrt(newV) / correction + epsilon;
    const Vec<C> newW = loadLanes<C>(w + i, count) * decay - stepSize * newM / denominator;
    storeLanes(mean + i, newM, count);
    storeLanes(square + i, newV, count);
    storeLanes(w + i, newW, count);
    if (low) storeLowPrecision(low + i, newW, count);
  });
}

struct SgdScalars {
  double lr, factor, momentum, decay;
  bool first;  // the buffer does not exist yet
};

template <class C, class G>
KG_INLINE void sgdBlock(C* w, C* buffer, const G* grad, bf16* low, int64_t n, const SgdScalars& s) {
  const Vec<C> lr(C(s.lr)), factor(C(s.factor)), momentum(C(s.momentum)), decay(C(s.decay));
  forVectors<C>(n, [&](int64_t i, int count) KG_LAMBDA_INLINE {
    const Vec<C> old = loadLanes<C>(w + i, count);
    Vec<C> update = loadLanes<C>(grad + i, count) * factor + decay * old;
    if (buffer) {
      if (!s.first) update = momentum * loadLanes<C>(buffer + i, count) + update;
      storeLanes(buffer + i, update, count);
    }
    const Vec<C> newW = old - lr * update;
    storeLanes(w + i, newW, count);
    if (low) storeLowPrecision(low + i, newW, count);
  });
}

// f(C(), G()) for the dtypes of a parameter and its gradient.
template <class F>
KG_INLINE void dispatchUpdate(DType param, DType grad, F f) {
  if (param == DType::F64 && grad == DType::F64) return f(double(), double());
  if (param == DType::F32 && grad == DType::F32) return f(float(), float());
  if (param == DType::F32 && grad == DType::BF16) return f(float(), bf16());
  fail("expected a float32 parameter with a float32 or bfloat16 gradient, or float64 for both, found %s with %s",
       dtypeName(param), dtypeName(grad));
}

template <class T>
KG_INLINE T* at(const TensorView& v, int64_t offset) {
  return v.present() ? v.ptr<T>() + offset : nullptr;
}

KG_INLINE int64_t* blockTable(const Call& call, int64_t groups) {
  return static_cast<int64_t*>(scratch(call, (groups + 1) * sizeof(int64_t)));
}

}  // namespace

void kernel_sumSquares(const Call& call) {
  const TensorView* x = call.tensors + 1;
  const int64_t count = call.tensorCount - 1;
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; i++) blocks += blocksOf(x[i]);
  auto* partials = static_cast<double*>(scratch(call, blocks * sizeof(double) + (count + 1) * sizeof(int64_t)));
  auto* firstBlock = reinterpret_cast<int64_t*>(partials + blocks);

  forTensorBlocks(x, count, 1, firstBlock, [&](int64_t i, int64_t begin, int64_t end, int64_t block) {
    dispatchFloating(x[i].dtype,
                     [&](auto t) { partials[block] = sumSquaresOf(x[i].ptr<decltype(t)>() + begin, end - begin); });
  });
  double total = 0;
  for (int64_t block = 0; block < blocks; block++) total += partials[block];
  double& out = *call[0].ptr<double>();
  out = call.attr(0) != 0 ? out + total : total;
}

void kernel_adamw(const Call& call) {
  const double* scalars = call[0].ptr<double>();
  if (scalars[3] != 0) return;
  const AdamwScalars s = adamwScalars(scalars, call);
  const TensorView* groups = call.tensors + 1;
  const int64_t count = (call.tensorCount - 1) / 5;
  forTensorBlocks(groups, count, 5, blockTable(call, count), [&](int64_t i, int64_t begin, int64_t end, int64_t) {
    const TensorView* t = groups + i * 5;
    dispatchUpdate(t[0].dtype, t[3].dtype, [&](auto c, auto g) {
      using C = decltype(c);
      adamwBlock(at<C>(t[0], begin), at<C>(t[1], begin), at<C>(t[2], begin), at<decltype(g)>(t[3], begin),
                 at<bf16>(t[4], begin), end - begin, s);
    });
  });
}

void kernel_sgd(const Call& call) {
  const double* scalars = call[0].ptr<double>();
  if (scalars[3] != 0) return;
  const SgdScalars s = {scalars[0], scalars[2], call.attr(0), call.attr(1), scalars[1] == 1};
  const TensorView* groups = call.tensors + 1;
  const int64_t count = (call.tensorCount - 1) / 4;
  forTensorBlocks(groups, count, 4, blockTable(call, count), [&](int64_t i, int64_t begin, int64_t end, int64_t) {
    const TensorView* t = groups + i * 4;
    dispatchUpdate(t[0].dtype, t[2].dtype, [&](auto c, auto g) {
      using C = decltype(c);
      sgdBlock(at<C>(t[0], begin), at<C>(t[1], begin), at<decltype(g)>(t[2], begin), at<bf16>(t[3], begin), end - begin,
               s);
    });
  });
}

}  // namespace kg::cpu::KG_ISA
