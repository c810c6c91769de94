// Philox4x32-10 (Salmon et al., 2011) and the numbers made of its words. Plain integer code for host and device: a
// backend calls philox() for a block of four words and the functions below for numbers; the layout is in kernels.def.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KG_PHILOX __host__ __device__ inline __attribute__((always_inline))
#else
#define KG_PHILOX inline __attribute__((always_inline))
#endif

namespace kg {

struct PhiloxKey {
  uint32_t low, high;
};

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;

KG_PHILOX PhiloxKey philoxNextKey(PhiloxKey key) { return {key.low + 0x9E3779B9u, key.high + 0xBB67AE85u}; }

// The four words of block `counter`.
KG_PHILOX void philox(PhiloxKey key, uint64_t counter, uint32_t* out) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < kPhiloxRounds; round++) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxFactor0) * c0, p1 = static_cast<uint64_t>(kPhiloxFactor1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key.low;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key.high;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    key = philoxNextKey(key);
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// [0, 1): 24 bits in float32, 8 in bfloat16 (rounding 24 could give 1), 53 bits of two words in float64.
KG_PHILOX float philoxUniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }
KG_PHILOX float philoxUniform8(uint32_t word) { return static_cast<float>(word >> 24) * 0x1p-8f; }
KG_PHILOX double philoxUniform(uint32_t high, uint32_t low) {
  return (static_cast<double>(high >> 5) * 67108864.0 + static_cast<double>(low >> 6)) * 0x1p-53;
}

}  // namespace kg
