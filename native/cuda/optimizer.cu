// Optimizer kernels over many tensors in a few launches: a launch is handed up to kGroups groups of pointers by value,
// its blocks each take kBlock elements of one of them. Learning rate, step, clipping and skip come from device memory,
// and nothing of it is read on the host.
//
// Sums of squares have one order: element i of a block of 16,384 goes to thread i % 256 in float64, threads are joined
// by trees, blocks likewise by a second kernel.
//
// Roofline (H100, 3.35 TB/s), per parameter: AdamW with bfloat16 gradients and copies moves 4 * 3 + 2 bytes in and
// 4 * 3 + 2 out: 28; 494 M parameters (Qwen2.5-0.5B) 13.8 GB: 4.1 ms. A thread has 56 bytes of reads in flight, a full
// multiprocessor over 80 KB. Arithmetic: about 60 instructions a parameter, 494 M * 60 / 32 / (132 * 4 * 1.7e9) = 1.0
// ms. sumSquares of 494 M bfloat16: 1 GB: 0.3 ms. SGD with the same gradients and copies moves 4 + 2 in and 4 + 2 out:
// 12, 5.9 GB: 1.8 ms; with momentum 8 more, 9.9 GB: 3.0 ms; 5 flops a parameter are nothing beside it.
#include "cuda/block.h"
#include "cuda/math.h"
#include "cuda/strided.h"

namespace kg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGroups = 64;  // of a launch: 64 * 56 bytes of parameters, 4 KB at most

// ---- which block works on what --------------------------------------------------------------------------------------
// Groups with the block that each begins at.
template <class Group, int kCount>
struct Batch {
  int32_t count;
  uint32_t blocks;
  uint32_t firstBlock[kCount];
  Group groups[kCount];
  static_assert(kDense<Group>);

  // The group of a block: the last that begins at or before it.
  KG_DEVICE int groupOf(uint32_t block) const {
    int low = 0, high = count - 1;
    KG_UNROLL_BY(1) while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (firstBlock[middle] <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// Fills batches group by group; `flush(batch)` is called with each that is full, and with the rest by finish().
template <class Group, int kCount, class F>
class Batcher {
 public:
  Batcher(int64_t perBlock, F flush) : perBlock_(perBlock), flush_(flush) {}
  void add(const Group& group, int64_t numel) {
    if (numel == 0) return;
    if (batch_.count == kCount) finish();
    batch_.firstBlock[batch_.count] = batch_.blocks;
    batch_.groups[batch_.count++] = group;
    batch_.blocks += static_cast<uint32_t>(ceilDiv(numel, perBlock_));
  }
  void finish() {
    if (batch_.count > 0) flush_(batch_);
    batch_ = {};
  }

 private:
  int64_t perBlock_;
  F flush_;
  Batch<Group, kCount> batch_{};
};
template <class Group, int kCount, class F>
Batcher<Group, kCount, F> batcher(int64_t perBlock, F flush) {
  return {perBlock, flush};
}

// ---- sums of squares ------------------------------------------------------------------------------------------------
constexpr int kSumBlock = 16384;
constexpr int kSumGroups = 128;

struct Squared {
  const void* x;
  int64_t numel;
  int64_t dtype;  // DType
};

template <class T>
KG_DEVICE double sumSquaresOf(const T* x, int64_t n) {
  constexpr int kAhead = 8;
  double sum = 0;
  int64_t i = threadIdx.x;
  KG_UNROLL_BY(1) for (; i + (kAhead - 1) * kThreads < n; i += kAhead * kThreads) {
    T v[kAhead];
    KG_UNROLL for (int j = 0; j < kAhead; j++) v[j] = x[i + j * kThreads];
    KG_UNROLL for (int j = 0; j < kAhead; j++) {
      const double wide = static_cast<double>(static_cast<compute_t<T>>(v[j]));
      sum = ::fma(wide, wide, sum);
    }
  }
  KG_UNROLL_BY(1) for (; i < n; i += kThreads) {
    const double wide = static_cast<double>(static_cast<compute_t<T>>(x[i]));
    sum = ::fma(wide, wide, sum);
  }
  return sum;
}

KG_GLOBAL KG_LAUNCH_BOUNDS(kThreads) void sumSquaresKernel(Batch<Squared, kSumGroups> batch, double* partials) {
  KG_SHARED(double, shared, kWarp);
  const int index = batch.groupOf(blockIdx.x);
  const Squared& group = batch.groups[index];
  const int64_t first = static_cast<int64_t>(blockIdx.x - batch.firstBlock[index]) * kSumBlock;
  const int64_t n = group.numel - first < kSumBlock ? group.numel - first : kSumBlock;
  const DType dtype = static_cast<DType>(group.dtype);
  double sum;
  if (dtype == DType::F32) {
    sum = sumSquaresOf(static_cast<const float*>(group.x) + first, n);
  } else if (dtype == DType::BF16) {
    sum = sumSquaresOf(static_cast<const bf16*>(group.x) + first, n);
  } else {
    sum = sumSquaresOf(static_cast<const double*>(group.x) + first, n);
  }
  sum = blockSum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

KG_GLOBAL KG_LAUNCH_BOUNDS(1024) void sumPartials(double* total, const double* partials, int64_t n, bool accumulate) {
  KG_SHARED(double, shared, kWarp);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += partials[i];
  sum = blockSum(sum, shared);
  if (threadIdx.x == 0) *total = accumulate ? *total + sum : sum;
}

// ---- AdamW ----------------------------------------------------------------------------------------------------------
// What all groups share, computed once on the device.
struct AdamwScalars {
  double decay;                          // 1 - lr * weightDecay
  double factor;                         // of the gradient
  double beta2, rate1, rate2;            // rate = 1 - beta
  double stepSize, correction, epsilon;  // lr / (1 - b1^t), sqrt(1 - b2^t)
  double skip;
};
struct AdamwSettings {
  double beta1, beta2, epsilon, weightDecay;
};

KG_GLOBAL void prepareAdamw(AdamwScalars* to, const double* scalars, AdamwSettings with) {
  if (threadIdx.x != 0) return;
  const double lr = scalars[0], step = scalars[1];
  AdamwScalars s;
  s.decay = 1 - lr * with.weightDecay;
  s.factor = scalars[2];
  s.beta2 = with.beta2;
  s.rate1 = 1 - with.beta1;
  s.rate2 = 1 - with.beta2;
  s.stepSize = lr / (1 - ::pow(with.beta1, step));
  s.correction = ::sqrt(1 - ::pow(with.beta2, step));
  s.epsilon = with.epsilon;
  s.skip = scalars[3];
  *to = s;
}

struct Updated {
  void *param, *first, *second;  // AdamW: mean and mean square; SGD: the buffer or null
  const void* grad;
  bf16* low;  // or null
  int64_t numel;
  int64_t aligned;  // all of them to packs of 4 elements
};
constexpr int kUpdate = 4;          // elements of a thread at a time
constexpr int kUpdateBlock = 4096;  // elements of a thread block

// f(offset, count) for the packs of this block's part of its group.
template <class F>
KG_DEVICE void forUpdates(const Updated& group, int64_t first, F f) {
  const int64_t end = first + kUpdateBlock < group.numel ? first + kUpdateBlock : group.numel;
  KG_UNROLL_BY(1)
  for (int64_t i = first + static_cast<int64_t>(threadIdx.x) * kUpdate; i < end; i += kThreads * kUpdate) {
    const int64_t left = end - i;
    f(i, left < kUpdate ? static_cast<int>(left) : kUpdate);
  }
}
template <class C, class T>
KG_DEVICE void loadUpdate(const void* from, int64_t at, int count, bool aligned, C (&v)[kUpdate]) {
  const T* x = static_cast<const T*>(from) + at;
  T narrow[kUpdate];
  if (aligned && count == kUpdate) {
    loadItem<kUpdate>(x, false, kUpdate, narrow);
  } else {
    KG_UNROLL for (int i = 0; i < kUpdate; i++) narrow[i] = i < count ? x[i] : T();
  }
  KG_UNROLL for (int i = 0; i < kUpdate; i++) v[i] = static_cast<C>(narrow[i]);
}
template <class T, class C>
KG_DEVICE void storeUpdate(void* to, int64_t at, int count, bool aligned, const C (&v)[kUpdate]) {
  T* y = static_cast<T*>(to) + at;
  T narrow[kUpdate];
  KG_UNROLL for (int i = 0; i < kUpdate; i++) {
    if constexpr (sizeof(T) == 2) {
      narrow[i] = T(static_cast<float>(v[i]));
    } else {
      narrow[i] = v[i];
    }
  }
  if (aligned && count == kUpdate) return storeItem<kUpdate>(y, kUpdate, narrow);
  KG_UNROLL for (int i = 0; i < kUpdate; i++) {
    if (i < count) y[i] = narrow[i];
  }
}

// a + rate * (b - a), from the nearer end, as torch's lerp.
template <class C>
KG_DEVICE C lerp(C a, C b, C rate) {
  return rate < C(0.5) ? a + rate * (b - a) : b - (b - a) * (C(1) - rate);
}

template <class C, class G>
KG_GLOBAL KG_LAUNCH_BOUNDS(kThreads) void adamwKernel(Batch<Updated, kGroups> batch, const AdamwScalars* scalars) {
  if (scalars->skip != 0) return;
  const C decay = static_cast<C>(scalars->decay), factor = static_cast<C>(scalars->factor);
  const C beta2 = static_cast<C>(scalars->beta2), rate1 = static_cast<C>(scalars->rate1);
  const C rate2 = static_cast<C>(scalars->rate2), stepSize = static_cast<C>(scalars->stepSize);
  const C correction = static_cast<C>(scalars->correction), epsilon = static_cast<C>(scalars->epsilon);
  const int index = batch.groupOf(blockIdx.x);
  const Updated& group = batch.groups[index];
  const bool aligned = group.aligned != 0;
  forUpdates(group, static_cast<int64_t>(blockIdx.x - batch.firstBlock[index]) * kUpdateBlock,
             [&](int64_t at, int count) {
               C w[kUpdate], mean[kUpdate], square[kUpdate], grad[kUpdate];
               loadUpdate<C, C>(group.param, at, count, aligned, w);
               loadUpdate<C, C>(group.first, at, count, aligned, mean);
               loadUpdate<C, C>(group.second, at, count, aligned, square);
               loadUpdate<C, G>(group.grad, at, count, aligned, grad);
               KG_UNROLL for (int i = 0; i < kUpdate; i++) {
                 const C g = grad[i] * factor;
                 mean[i] = lerp(mean[i], g, rate1);
                 square[i] = square[i] * beta2 + rate2 * g * g;
                 w[i] = w[i] * decay - stepSize * mean[i] / (m::sqrt(square[i]) / correction + epsilon);
               }
               storeUpdate<C>(group.first, at, count, aligned, mean);
               storeUpdate<C>(group.second, at, count, aligned, square);
               storeUpdate<C>(group.param, at, count, aligned, w);
               if (group.low) storeUpdate<bf16>(group.low, at, count, aligned, w);
             });
}

// ---- SGD ------------------------------------------------------------------------------------------------------------
struct SgdSettings {
  double momentum, weightDecay;
};

template <class C, class G>
KG_GLOBAL KG_LAUNCH_BOUNDS(kThreads) void sgdKernel(Batch<Updated, kGroups> batch, const double* scalars,
                                                    SgdSettings with) {
  if (scalars[3] != 0) return;
  const C lr = static_cast<C>(scalars[0]), factor = static_cast<C>(scalars[2]);
  const C momentum = static_cast<C>(with.momentum), decay = static_cast<C>(with.weightDecay);
  const bool firstStep = scalars[1] == 1;  // the buffer does not exist yet
  const int index = batch.groupOf(blockIdx.x);
  const Updated& group = batch.groups[index];
  const bool aligned = group.aligned != 0;
  forUpdates(group, static_cast<int64_t>(blockIdx.x - batch.firstBlock[index]) * kUpdateBlock,
             [&](int64_t at, int count) {
               C w[kUpdate], update[kUpdate], buffer[kUpdate] = {};
               loadUpdate<C, C>(group.param, at, count, aligned, w);
               loadUpdate<C, G>(group.grad, at, count, aligned, update);
               const bool remembers = group.first != nullptr && !firstStep;
               if (remembers) loadUpdate<C, C>(group.first, at, count, aligned, buffer);
               KG_UNROLL for (int i = 0; i < kUpdate; i++) {
                 update[i] = update[i] * factor + decay * w[i];
                 if (remembers) update[i] = momentum * buffer[i] + update[i];
                 w[i] = w[i] - lr * update[i];
               }
               if (group.first) storeUpdate<C>(group.first, at, count, aligned, update);
               storeUpdate<C>(group.param, at, count, aligned, w);
               if (group.low) storeUpdate<bf16>(group.low, at, count, aligned, w);
             });
}

// ---- host -----------------------------------------------------------------------------------------------------------
template <class C, class G>
struct Types {
  using Param = C;
  using Grad = G;
};

void checkTypes(DType param, DType grad) {
  const bool known = (param == DType::F64 && grad == DType::F64) ||
                     (param == DType::F32 && (grad == DType::F32 || grad == DType::BF16));
  if (!known)
    fail("expected a float32 parameter with a float32 or bfloat16 gradient, or float64 for both, found %s with %s",
         dtypeName(param), dtypeName(grad));
}

bool onPack(const TensorView& v) {
  const size_t pack = kUpdate * dtypeSize(v.dtype);
  return !v.present() || reinterpret_cast<uintptr_t>(v.data) % (pack < 16 ? pack : 16) == 0;
}
template <class T>
T* pointer(const TensorView& v) {
  return v.present() ? v.ptr<T>() : nullptr;
}

// The groups of a call whose parameter and gradient have these dtypes, in batches. Views of a group stand in the order
// parameter, states, gradient, copy.
template <class F>
void forBatches(const Call& call, int states, DType param, DType grad, F launchBatch) {
  auto batches = batcher<Updated, kGroups>(kUpdateBlock, launchBatch);
  const int size = states + 3;
  for (int i = 1; i + size <= call.tensorCount; i += size) {
    const TensorView* t = call.tensors + i;
    const TensorView &gradient = t[states + 1], &low = t[states + 2];
    if (t[0].dtype != param || gradient.dtype != grad) continue;
    bool aligned = true;
    for (int v = 0; v < size; v++) aligned = aligned && onPack(t[v]);
    batches.add({t[0].data, pointer<void>(t[1]), states > 1 ? pointer<void>(t[2]) : nullptr, gradient.data,
                 pointer<bf16>(low), t[0].numel(), aligned},
                t[0].numel());
  }
  batches.finish();
}

// f(Types, dtype of the parameter, dtype of the gradient) for each pair that the contract knows.
template <class F>
void forTypes(F f) {
  f(Types<float, float>{}, DType::F32, DType::F32);
  f(Types<float, bf16>{}, DType::F32, DType::BF16);
  f(Types<double, double>{}, DType::F64, DType::F64);
}

void checkGroups(const Call& call, int states) {
  for (int i = 1; i + states + 3 <= call.tensorCount; i += states + 3)
    checkTypes(call[i].dtype, call[i + states + 1].dtype);
}

}  // namespace

void kernel_sumSquares(const Call& call) {
  int64_t blocks = 0, done = 0;
  for (int i = 1; i < call.tensorCount; i++) blocks += ceilDiv(call[i].numel(), kSumBlock);
  auto* partials = static_cast<double*>(scratch(call, static_cast<size_t>(blocks + 1) * sizeof(double)));
  auto batches = batcher<Squared, kSumGroups>(kSumBlock, [&](const Batch<Squared, kSumGroups>& batch) {
    launch(call, {gridOf(batch.blocks), kThreads}, sumSquaresKernel, batch, partials + done);
    done += batch.blocks;
  });
  for (int i = 1; i < call.tensorCount; i++) {
    dispatchFloat(call[i].dtype, [](auto) {});
    batches.add({call[i].data, call[i].numel(), static_cast<int64_t>(call[i].dtype)}, call[i].numel());
  }
  batches.finish();
  launch(call, {gridOf(1), 1024}, sumPartials, call[0].ptr<double>(), partials, blocks, call.attr(0) != 0);
}

void kernel_adamw(const Call& call) {
  checkGroups(call, 2);
  auto* scalars = static_cast<AdamwScalars*>(scratch(call, sizeof(AdamwScalars)));
  const AdamwSettings with{call.attr(0), call.attr(1), call.attr(2), call.attr(3)};
  launch(call, {gridOf(1), kWarp}, prepareAdamw, scalars, call[0].ptr<double>(), with);
  forTypes([&](auto types, DType param, DType grad) {
    using C = typename decltype(types)::Param;
    using G = typename decltype(types)::Grad;
    forBatches(call, 2, param, grad, [&](const Batch<Updated, kGroups>& batch) {
      launch(call, {gridOf(batch.blocks), kThreads}, adamwKernel<C, G>, batch, scalars);
    });
  });
}

void kernel_sgd(const Call& call) {
  checkGroups(call, 1);
  const SgdSettings with{call.attr(0), call.attr(1)};
  forTypes([&](auto types, DType param, DType grad) {
    using C = typename decltype(types)::Param;
    using G = typename decltype(types)::Grad;
    forBatches(call, 1, param, grad, [&](const Batch<Updated, kGroups>& batch) {
      launch(call, {gridOf(batch.blocks), kThreads}, sgdKernel<C, G>, batch, call[0].ptr<double>(), with);
    });
  });
}

}  // namespace kg::cuda
