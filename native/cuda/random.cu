// Philox random numbers: words, uniform, normal. Element i depends on (seed, offset, i) alone. Words and uniforms have
// the CPU's bits; normal numbers are computed in float64 by the CPU's formulas and differ only where rounding ties.
//
// Roofline (H100, 3.35 TB/s): one write an element; 64 Mi floats, 268 MB: 80 us. A thread makes the four words of a
// block with 10 rounds of 4 multiplications and about 70 instructions: 16 Mi * 70 / 32 / (132 * 4 * 1.7e9) = 41 us.
// Normal numbers take about 120 float64 operations a pair: 32 Mi * 120 / 34e12 = 120 us (64 times less float64 on
// cards for workstations: initialization alone uses them).
#include "cuda/math.h"
#include "cuda/strided.h"
#include "runtime/philox.h"

namespace kg::cuda {
namespace {

struct Generator {
  PhiloxKey key;
  uint64_t offset;

  explicit Generator(const Call& call)
      : key{static_cast<uint32_t>(call.intAttr(0)), static_cast<uint32_t>(call.intAttr(1))},
        offset(static_cast<uint64_t>(call.intAttr(2))) {}
};

struct Bits {
  static KG_DEVICE void make(const uint32_t* words, int32_t (&out)[4]) {
    KG_UNROLL for (int i = 0; i < 4; i++) out[i] = static_cast<int32_t>(words[i]);
  }
};

struct Uniform {
  static KG_DEVICE void make(const uint32_t* words, float (&out)[4]) {
    KG_UNROLL for (int i = 0; i < 4; i++) out[i] = philoxUniform(words[i]);
  }
  static KG_DEVICE void make(const uint32_t* words, bf16 (&out)[4]) {
    KG_UNROLL for (int i = 0; i < 4; i++) out[i] = bf16(philoxUniform8(words[i]));
  }
  static KG_DEVICE void make(const uint32_t* words, double (&out)[2]) {
    KG_UNROLL for (int i = 0; i < 2; i++) out[i] = philoxUniform(words[2 * i], words[2 * i + 1]);
  }
};

// cos and sin of 2 pi v for v in [0, 1): the quarter turn nearest to v is taken out exactly, fdlibm's polynomials do
// the rest.
KG_DEVICE void cosSinOfTurns(double v, double* cosine, double* sine) {
  const double quarters = v * 4, turn = ::rint(quarters);
  const double x = (quarters - turn) * 1.57079632679489661923, z = x * x;
  double s = 1.58969099521155010221e-10;
  s = ::fma(s, z, -2.50507602534068634195e-08);
  s = ::fma(s, z, 2.75573137070700676789e-06);
  s = ::fma(s, z, -1.98412698298579493134e-04);
  s = ::fma(s, z, 8.33333333332248946124e-03);
  s = ::fma(s, z, -1.66666666666666324348e-01);
  s = ::fma(x * z, s, x);
  double c = -1.13596475577881948265e-11;
  c = ::fma(c, z, 2.08757232129817482790e-09);
  c = ::fma(c, z, -2.75573143513906633035e-07);
  c = ::fma(c, z, 2.48015872894767294178e-05);
  c = ::fma(c, z, -1.38888888888741095749e-03);
  c = ::fma(c, z, 4.16666666666666019037e-02);
  c = ::fma(z * z, c, ::fma(z, -0.5, 1.0));
  const bool odd = turn == 1 || turn == 3;
  const double a = odd ? s : c, b = odd ? c : s;
  *cosine = turn == 1 || turn == 2 ? -a : a;
  *sine = turn == 2 || turn == 3 ? -b : b;
}

// Box-Muller: u in (0, 1] and v in [0, 1).
struct Normal {
  static KG_DEVICE void pair(double u, double v, double* first, double* second) {
    double cosine, sine;
    cosSinOfTurns(v, &cosine, &sine);
    const double radius = ::sqrt(-2 * ::log(u));
    *first = radius * cosine;
    *second = radius * sine;
  }
  template <class T>
  static KG_DEVICE void make(const uint32_t* words, T (&out)[4]) {
    KG_UNROLL for (int i = 0; i < 4; i += 2) {
      double a, b;
      pair(static_cast<double>(philoxUniform(words[i])) + 0x1p-24, static_cast<double>(philoxUniform(words[i + 1])), &a,
           &b);
      out[i] = static_cast<T>(static_cast<float>(a));
      out[i + 1] = static_cast<T>(static_cast<float>(b));
    }
  }
  static KG_DEVICE void make(const uint32_t* words, double (&out)[2]) {
    pair(philoxUniform(words[0], words[1]) + 0x1p-53, philoxUniform(words[2], words[3]), &out[0], &out[1]);
  }
};

// Elements a Philox block.
template <class T>
constexpr int kPerBlock = sizeof(T) == 8 ? 2 : 4;

template <class Kind, class T>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void randomKernel(T* out, int64_t n, Generator generator, bool aligned) {
  constexpr int kCount = kPerBlock<T>;
  const int64_t blocks = (n + kCount - 1) / kCount, step = static_cast<int64_t>(gridDim.x) * kItemThreads;
  KG_UNROLL_BY(1)
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kItemThreads + threadIdx.x; i < blocks; i += step) {
    uint32_t words[4];
    philox(generator.key, generator.offset + static_cast<uint64_t>(i), words);
    T v[kCount];
    Kind::make(words, v);
    const int64_t left = n - i * kCount;
    if (aligned && left >= kCount) {
      storeItem<kCount>(out + i * kCount, kCount, v);
    } else {
      KG_UNROLL for (int j = 0; j < kCount; j++) {
        if (j < left) out[i * kCount + j] = v[j];
      }
    }
  }
}

template <class Kind, class T>
void generate(const Call& call) {
  if (!call[0].contiguous()) fail("expected a contiguous output, found strides; try contiguous() first");
  const int64_t n = call[0].numel();
  const bool aligned = reinterpret_cast<uintptr_t>(call[0].data) % (kPerBlock<T> * sizeof(T)) == 0;
  launch(call, {gridFor(context(call), ceilDiv(n, kPerBlock<T>)), kItemThreads}, randomKernel<Kind, T>,
         call[0].ptr<T>(), n, Generator(call), aligned);
}

}  // namespace

void kernel_randomBits(const Call& call) {
  if (call[0].dtype != DType::I32) fail("expected an int32 output, found %s", dtypeName(call[0].dtype));
  generate<Bits, int32_t>(call);
}

void kernel_randomUniform(const Call& call) {
  dispatchFloat(call[0].dtype, [&](auto tag) { generate<Uniform, typename decltype(tag)::type>(call); });
}

void kernel_randomNormal(const Call& call) {
  dispatchFloat(call[0].dtype, [&](auto tag) { generate<Normal, typename decltype(tag)::type>(call); });
}

}  // namespace kg::cuda
