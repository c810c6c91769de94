// Philox random numbers: words, uniform, normal. Element i depends on (seed, offset, i) alone, never on the split into
// tasks. Normal numbers are computed in float64: float32 ones differ between instruction sets only where rounding ties.
#include "cpu/tasks.h"
#include "runtime/philox.h"

namespace kg::cpu::KG_ISA {
namespace {

constexpr int kBatch = 16;  // blocks generated side by side

constexpr int kLanes = KG_VEC_BYTES / 8;

// The 64-bit product of the low halves; the high halves of a may hold anything.
KG_INLINE VecU64 multiplyLow(VecU64 a, uint32_t factor) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(factor)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecU64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(factor)));
#elif defined(__SSE2__)
  return reinterpret_cast<VecU64>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(factor)));
#else
  return (a & 0xffffffffu) * static_cast<uint64_t>(factor);
#endif
}

// philox() for kLanes neighbouring blocks, a word in the low half of each lane.
KG_INLINE void philoxLanes(PhiloxKey key, uint64_t counter, uint32_t (*words)[4]) {
  VecU64 c0, c2{}, c3{};
  for (int i = 0; i < kLanes; i++) c0[i] = counter + static_cast<uint64_t>(i);
  VecU64 c1 = c0 >> 32;
  for (int round = 0; round < kPhiloxRounds; round++) {
    const VecU64 p0 = multiplyLow(c0, kPhiloxFactor0), p1 = multiplyLow(c2, kPhiloxFactor1);
    c0 = (p1 >> 32) ^ c1 ^ static_cast<uint64_t>(key.low);
    c2 = (p0 >> 32) ^ c3 ^ static_cast<uint64_t>(key.high);
    c1 = p1;
    c3 = p0;
    key = philoxNextKey(key);
  }
  for (int i = 0; i < kLanes; i++) {
    words[i][0] = static_cast<uint32_t>(c0[i]);
    words[i][1] = static_cast<uint32_t>(c1[i]);
    words[i][2] = static_cast<uint32_t>(c2[i]);
    words[i][3] = static_cast<uint32_t>(c3[i]);
  }
}

struct Generator {
  PhiloxKey key;
  uint64_t offset;

  explicit Generator(const Call& call)
      : key{static_cast<uint32_t>(call.intAttr(0)), static_cast<uint32_t>(call.intAttr(1))},
        offset(static_cast<uint64_t>(call.intAttr(2))) {}

  // Words of blocks first .. first + kBatch - 1.
  KG_INLINE void generate(uint64_t first, uint32_t (*words)[4]) const {
    for (int b = 0; b < kBatch; b += kLanes) philoxLanes(key, offset + first + static_cast<uint64_t>(b), words + b);
  }
};

// batch(words, out, count) writes the `count` elements of one batch: kBatch * PerBlock, fewer in the last.
template <class T, int PerBlock, class F>
KG_INLINE void forBatches(const Call& call, F batch) {
  const TensorView& view = call[0];
  if (!view.contiguous()) fail("expected a contiguous output, found strides; try contiguous() first");
  const Generator generator(call);
  T* out = view.ptr<T>();
  const int64_t n = view.numel(), perBatch = kBatch * PerBlock;
  forTasks((n + perBatch - 1) / perBatch, perBatch, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      uint32_t words[kBatch][4];
      generator.generate(static_cast<uint64_t>(i) * kBatch, words);
      batch(&words[0][0], out + i * perBatch, static_cast<int>(min64(perBatch, n - i * perBatch)));
    }
  });
}

// cos and sin of 2 pi v for v in [0, 1): the quarter turn nearest to v is taken out exactly, fdlibm's polynomials do
// the rest.
KG_INLINE void cosSinOfTurns(Vec<double> v, Vec<double>* cosine, Vec<double>* sine) {
  using V = Vec<double>;
  static constexpr double sinPoly[] = {-1.66666666666666324348e-01, 8.33333333332248946124e-03,
                                       -1.98412698298579493134e-04, 2.75573137070700676789e-06,
                                       -2.50507602534068634195e-08, 1.58969099521155010221e-10};
  static constexpr double cosPoly[] = {4.16666666666666019037e-02, -1.38888888888741095749e-03,
                                       2.48015872894767294178e-05, -2.75573143513906633035e-07,
                                       2.08757232129817482790e-09, -1.13596475577881948265e-11};
  const V magic(MathConstants<double>::roundMagic), one(1.0), two(2.0), three(3.0);
  const V quarters = v * V(4.0), turn = (quarters + magic) - magic;
  const V x = (quarters - turn) * V(1.57079632679489661923), z = x * x;
  const V s = fma(x * z, polynomial(z, sinPoly), x);
  const V c = fma(z * z, polynomial(z, cosPoly), fma(z, V(-0.5), one));
  const auto odd = (turn == one) | (turn == three);
  const V a = select(odd, s, c), b = select(odd, c, s);
  *cosine = select((turn == one) | (turn == two), -a, a);
  *sine = select((turn == two) | (turn == three), -b, b);
}

// Box-Muller in place: pairs (u, v), u in (0, 1] and v in [0, 1), apart in two arrays, become pairs of normal numbers.
template <int Pairs>
KG_INLINE void boxMuller(double* u, double* v) {
  using V = Vec<double>;
  for (int i = 0; i < Pairs; i += V::N) {
    V cosine, sine;
    cosSinOfTurns(V::load(v + i), &cosine, &sine);
    const V radius = vsqrt(V(-2.0) * vlog(V::load(u + i)));
    (radius * cosine).store(u + i);
    (radius * sine).store(v + i);
  }
}

template <class T>
void normalOfSingleWords(const Call& call) {
  forBatches<T, 4>(call, [](const uint32_t* words, T* out, int count) {
    constexpr int pairs = kBatch * 2;
    double u[pairs], v[pairs];
    for (int i = 0; i < pairs; i++) {
      u[i] = static_cast<double>(philoxUniform(words[2 * i])) + 0x1p-24;
      v[i] = static_cast<double>(philoxUniform(words[2 * i + 1]));
    }
    boxMuller<pairs>(u, v);
    for (int i = 0; i < count; i++) out[i] = static_cast<T>(static_cast<float>(i % 2 ? v[i / 2] : u[i / 2]));
  });
}

void normalOfDoubleWords(const Call& call) {
  forBatches<double, 2>(call, [](const uint32_t* words, double* out, int count) {
    double u[kBatch], v[kBatch];
    for (int i = 0; i < kBatch; i++) {
      u[i] = philoxUniform(words[4 * i], words[4 * i + 1]) + 0x1p-53;
      v[i] = philoxUniform(words[4 * i + 2], words[4 * i + 3]);
    }
    boxMuller<kBatch>(u, v);
    for (int i = 0; i < count; i++) out[i] = i % 2 ? v[i / 2] : u[i / 2];
  });
}

}  // namespace

void kernel_randomBits(const Call& call) {
  if (call[0].dtype != DType::I32) fail("expected an int32 output, found %s", dtypeName(call[0].dtype));
  forBatches<int32_t, 4>(call, [](const uint32_t* words, int32_t* out, int count) KG_LAMBDA_INLINE {
    for (int i = 0; i < count; i++) out[i] = static_cast<int32_t>(words[i]);
  });
}

void kernel_randomUniform(const Call& call) {
  switch (call[0].dtype) {
    case DType::F32:
      return forBatches<float, 4>(call, [](const uint32_t* words, float* out, int count) KG_LAMBDA_INLINE {
        for (int i = 0; i < count; i++) out[i] = philoxUniform(words[i]);
      });
    case DType::BF16:
      return forBatches<bf16, 4>(call, [](const uint32_t* words, bf16* out, int count) KG_LAMBDA_INLINE {
        for (int i = 0; i < count; i++) out[i] = bf16(philoxUniform8(words[i]));
      });
    case DType::F64:
      return forBatches<double, 2>(call, [](const uint32_t* words, double* out, int count) KG_LAMBDA_INLINE {
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
      return normalOfDoubleWords(call);
    default:
      fail("expected float32, float64 or bfloat16, found %s", dtypeName(call[0].dtype));
  }
}

}  // namespace kg::cpu::KG_ISA
