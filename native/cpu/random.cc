// Philox random numbers: words, uniform, normal. Element i depends on (seed, offset, i) alone, never on the split into
// tasks. Normal numbers are computed in float64 by libm, so that all instruction sets give the same float32.
#include "cpu/fused.h"
#include "runtime/philox.h"

namespace kg::cpu::KG_ISA {
namespace {

constexpr double kTwoPi = 6.283185307179586476925;
constexpr int kBatch = 16;  // blocks generated side by side, for the vectorizer

struct Generator {
  PhiloxKey key;
  uint64_t offset;

  explicit Generator(const Call& call)
      : key{static_cast<uint32_t>(call.intAttr(0)), static_cast<uint32_t>(call.intAttr(1))},
        offset(static_cast<uint64_t>(call.intAttr(2))) {}

  // Words of blocks first .. first + kBatch - 1.
  KG_INLINE void generate(uint64_t first, uint32_t (*words)[4]) const {
    for (int b = 0; b < kBatch; b++) philox(key, offset + first + static_cast<uint64_t>(b), words[b]);
  }
};

// block(words, out, count) writes the `count` <= perBlock elements of one block.
template <class T, int PerBlock, class F>
KG_INLINE void forBlocks(const Call& call, int64_t grainElements, F block) {
  const TensorView& view = call[0];
  if (!view.contiguous()) fail("expected a contiguous output, found strides; try contiguous() first");
  const Generator generator(call);
  T* out = view.ptr<T>();
  const int64_t n = view.numel(), batchElements = kBatch * PerBlock;
  auto range = [=](int64_t begin, int64_t end, int) {
    for (int64_t batch = begin; batch < end; batch++) {
      uint32_t words[kBatch][4];
      generator.generate(static_cast<uint64_t>(batch) * kBatch, words);
      for (int b = 0; b < kBatch; b++) {
        const int64_t at = batch * batchElements + b * PerBlock;
        if (at < n) block(words[b], out + at, static_cast<int>(min64(PerBlock, n - at)));
      }
    }
  };
  const int64_t batches = (n + batchElements - 1) / batchElements, grain = grainElements / batchElements;
  if (batches <= grain) return range(0, batches, 0);
  parallelFor(batches, grain, range);
}

constexpr int64_t kWordGrain = 16384, kNormalGrain = 2048;

// Box-Muller; u in (0, 1], v in [0, 1).
KG_INLINE void normalPair(double u, double v, double* cosine, double* sine) {
  const double radius = __builtin_sqrt(-2.0 * __builtin_log(u));
  *cosine = radius * __builtin_cos(kTwoPi * v);
  *sine = radius * __builtin_sin(kTwoPi * v);
}

template <class T>
void normalOfSingleWords(const Call& call) {
  forBlocks<T, 4>(call, kNormalGrain, [](const uint32_t* words, T* out, int count) {
    for (int i = 0; i < count; i += 2) {
      double z[2];
      normalPair(philoxUniform(words[i]) + 0x1p-24, philoxUniform(words[i + 1]), &z[0], &z[1]);
      out[i] = static_cast<T>(static_cast<float>(z[0]));
      if (i + 1 < count) out[i + 1] = static_cast<T>(static_cast<float>(z[1]));
    }
  });
}

}  // namespace

void kernel_randomBits(const Call& call) {
  if (call[0].dtype != DType::I32) fail("expected an int32 output, found %s", dtypeName(call[0].dtype));
  forBlocks<int32_t, 4>(call, kWordGrain, [](const uint32_t* words, int32_t* out, int count) KG_LAMBDA_INLINE {
    for (int i = 0; i < count; i++) out[i] = static_cast<int32_t>(words[i]);
  });
}

void kernel_randomUniform(const Call& call) {
  switch (call[0].dtype) {
    case DType::F32:
      return forBlocks<float, 4>(call, kWordGrain, [](const uint32_t* words, float* out, int count) KG_LAMBDA_INLINE {
        for (int i = 0; i < count; i++) out[i] = philoxUniform(words[i]);
      });
    case DType::BF16:
      return forBlocks<bf16, 4>(call, kWordGrain, [](const uint32_t* words, bf16* out, int count) KG_LAMBDA_INLINE {
        for (int i = 0; i < count; i++) out[i] = bf16(philoxUniform8(words[i]));
      });
    case DType::F64:
      return forBlocks<double, 2>(call, kWordGrain, [](const uint32_t* words, double* out, int count) KG_LAMBDA_INLINE {
        for (int i = 0; i < count; i++) out[i] = philoxUniform(words[2 * i], words[2 * i + 1]);
      });
    default:
      fail("expected float32, float64 or bfloat16, found %s", dtypeName(call[0].dtype));
  }
}

void kernel_randomNormal(const Call& call) {
  switch (call[0].dtype) {
    case DType::F32:
      return normalOfSingleWords<float>(call);
    case DType::BF16:
      return normalOfSingleWords<bf16>(call);
    case DType::F64:
      return forBlocks<double, 2>(call, kNormalGrain, [](const uint32_t* words, double* out, int count) {
        double z[2];
        normalPair(philoxUniform(words[0], words[1]) + 0x1p-53, philoxUniform(words[2], words[3]), &z[0], &z[1]);
        for (int i = 0; i < count; i++) out[i] = z[i];
      });
    default:
      fail("expected float32, float64 or bfloat16, found %s", dtypeName(call[0].dtype));
  }
}

}  // namespace kg::cpu::KG_ISA
