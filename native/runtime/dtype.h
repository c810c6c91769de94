// Element types and their host conversions. Knows no kernel, no Node.
//
// Every inline function here is forced inline: this header is included by files compiled for different
// instruction sets, and an out-of-line copy from one of them must never be linked into another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define KG_INLINE __host__ __device__ inline __attribute__((always_inline))
#else
#define KG_INLINE inline __attribute__((always_inline))
#endif

namespace kg {

// The numbers are part of the boundary to JavaScript (src/tensor/dtype.ts); append, never renumber.
enum class DType : int32_t {
  None = 0,  // an optional tensor that is absent
  F32 = 1,
  F64 = 2,
  BF16 = 3,
  F16 = 4,  // storage only: cast before computing
  I32 = 5,
  U8 = 6,
  Bool = 7,  // one byte, 0 or 1
};

KG_INLINE size_t dtypeSize(DType t) {
  switch (t) {
    case DType::F64:
      return 8;
    case DType::F32:
    case DType::I32:
      return 4;
    case DType::BF16:
    case DType::F16:
      return 2;
    case DType::U8:
    case DType::Bool:
      return 1;
    case DType::None:
      return 0;
  }
  return 0;
}

KG_INLINE const char* dtypeName(DType t) {
  switch (t) {
    case DType::F64:
      return "float64";
    case DType::F32:
      return "float32";
    case DType::I32:
      return "int32";
    case DType::BF16:
      return "bfloat16";
    case DType::F16:
      return "float16";
    case DType::U8:
      return "uint8";
    case DType::Bool:
      return "bool";
    case DType::None:
      return "none";
  }
  return "?";
}

KG_INLINE float bf16ToFloat(uint16_t bits) {
  uint32_t u = static_cast<uint32_t>(bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even; a NaN stays a (quiet) NaN.
KG_INLINE uint16_t floatToBf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// A bfloat16 number that converts from and to float implicitly; arithmetic happens in float.
struct bf16 {
  uint16_t bits;
  bf16() = default;
  KG_INLINE bf16(float f) : bits(floatToBf16(f)) {}
  KG_INLINE operator float() const { return bf16ToFloat(bits); }
};
static_assert(sizeof(bf16) == 2, "bf16 is two bytes");

// The type in which arithmetic on T is done and accumulated: double for double, float otherwise.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <>
struct Compute<int32_t> {
  using type = int32_t;
};
template <class T>
using compute_t = typename Compute<T>::type;

}  // namespace kg
