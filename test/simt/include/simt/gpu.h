// The host twin of native/cuda/gpu.h: every name that a kernel may use, with the same contract, on top of the SIMT
// layer. Included by that file alone, under KG_SIMT.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "runtime/dtype.h"
#include "simt/runtime.h"

#define KG_GLOBAL
#define KG_DEVICE inline __attribute__((always_inline))
#define KG_LAUNCH_BOUNDS(...)
#define KG_UNROLL
#define KG_UNROLL_BY(n)
// The tag is one an instantiation, as the array is under nvcc.
#define KG_SHARED(type, name, count)                        \
  static char name##SharedTag;                              \
  type(&name)[count] = *reinterpret_cast<type(*)[(count)]>( \
      ::simt::sharedArray(&name##SharedTag, sizeof(type) * static_cast<size_t>(count)))

#define threadIdx (::simt::threadIndex)
#define blockIdx (::simt::blockIndex)
#define blockDim (::simt::blockShape)
#define gridDim (::simt::gridShape)

// Collectives know the place of their call in the kernel by default arguments.
#define KG_SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace kg::cuda {

constexpr int kWarp = 32;

KG_DEVICE int laneId() { return static_cast<int>(threadIdx.x & 31); }
KG_DEVICE int warpId() { return static_cast<int>(threadIdx.x >> 5); }
KG_DEVICE unsigned char* dynamicShared() { return simt::dynamicSharedMemory(); }

KG_DEVICE int countBits(uint32_t x) { return __builtin_popcount(x); }

// ---- barriers ------------------------------------------------------------------------------------------------------
KG_DEVICE void syncThreads(KG_SIMT_SITE) { simt::barrier({file, line}); }
KG_DEVICE void syncWarp(KG_SIMT_SITE) { simt::warpBarrier({file, line}); }
KG_DEVICE void threadFence() { simt::fence(); }

// ---- warp collectives
// ------------------------------------------------------------------------------------------------
template <class T>
KG_DEVICE T exchangeLanes(T v, int source, simt::Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(T));
  bits = simt::exchange(bits, source, site);
  memcpy(&v, &bits, sizeof(T));
  return v;
}
template <class T>
KG_DEVICE T shuffle(T v, int lane, KG_SIMT_SITE) {
  return exchangeLanes(v, lane & 31, {file, line});
}
template <class T>
KG_DEVICE T shuffleXor(T v, int mask, KG_SIMT_SITE) {
  const int source = laneId() ^ mask;
  return exchangeLanes(v, source < kWarp ? source : laneId(), {file, line});
}
template <class T>
KG_DEVICE T shuffleDown(T v, int delta, KG_SIMT_SITE) {
  const int source = laneId() + delta;
  return exchangeLanes(v, source < kWarp ? source : laneId(), {file, line});
}
template <class T>
KG_DEVICE T shuffleUp(T v, int delta, KG_SIMT_SITE) {
  const int source = laneId() - delta;
  return exchangeLanes(v, source >= 0 ? source : laneId(), {file, line});
}
KG_DEVICE bool anyLane(bool p, KG_SIMT_SITE) { return simt::vote(p, {file, line}) != 0; }
KG_DEVICE bool allLanes(bool p, KG_SIMT_SITE) { return simt::vote(p, {file, line}) == 0xffffffffu; }
KG_DEVICE uint32_t ballot(bool p, KG_SIMT_SITE) { return simt::vote(p, {file, line}); }

// ---- integer atomics (atomic for the race detector as well)
// ----------------------------------------------------------
KG_DEVICE int32_t atomicAddInt(int32_t* at, int32_t v) { return __atomic_fetch_add(at, v, __ATOMIC_RELAXED); }
KG_DEVICE int32_t atomicMaxInt(int32_t* at, int32_t v) {
  int32_t old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old < v && !__atomic_compare_exchange_n(at, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
KG_DEVICE int32_t atomicMinInt(int32_t* at, int32_t v) {
  int32_t old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old > v && !__atomic_compare_exchange_n(at, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
KG_DEVICE int32_t atomicCas(int32_t* at, int32_t expected, int32_t v) {
  __atomic_compare_exchange_n(at, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

// ---- asynchronous copies: early, as late as their wait allows, or at random
// ------------------------------------------
KG_DEVICE void performCopy(const simt::PendingCopy& copy) {
  if (copy.from)
    memcpy(copy.to, copy.from, 16);
  else
    memset(copy.to, 0, 16);
}
KG_DEVICE void copyAsync16(void* shared, const void* global, bool valid = true, KG_SIMT_SITE) {
  simt::checkAlignment(shared, 16, "the shared end of a 16-byte copy", {file, line});
  if (valid) simt::checkAlignment(global, 16, "the global end of a 16-byte copy", {file, line});
  const simt::PendingCopy copy{shared, valid ? global : nullptr};
  if (!simt::deferCopy(copy)) performCopy(copy);
}
KG_DEVICE void copyAsyncCommit() { simt::commitCopies(); }
template <int N>
KG_DEVICE void copyAsyncWait() {
  simt::PendingCopy copy;
  while (simt::takeCopy(N, &copy)) performCopy(copy);
}

// ---- tensor cores
// ----------------------------------------------------------------------------------------------------
KG_DEVICE void loadMatrix4(uint32_t (&r)[4], const void* sharedRow, KG_SIMT_SITE) {
  simt::checkAlignment(sharedRow, 16, "a row of loadMatrix4", {file, line});
  uint16_t row[8];
  memcpy(row, sharedRow, 16);
  simt::loadMatrices(r, row, false, {file, line});
}
KG_DEVICE void loadMatrix4Transposed(uint32_t (&r)[4], const void* sharedRow, KG_SIMT_SITE) {
  simt::checkAlignment(sharedRow, 16, "a row of loadMatrix4Transposed", {file, line});
  uint16_t row[8];
  memcpy(row, sharedRow, 16);
  simt::loadMatrices(r, row, true, {file, line});
}
KG_DEVICE void mmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], KG_SIMT_SITE) {
  simt::multiplyAccumulate(d, a, b, {file, line});
}
KG_DEVICE uint32_t packBf16(float low, float high) {
  return static_cast<uint32_t>(floatToBf16(low)) | static_cast<uint32_t>(floatToBf16(high)) << 16;
}

KG_DEVICE float fastExp2(float x) { return exp2f(x); }
KG_DEVICE float fastReciprocal(float x) { return 1.0f / x; }

}  // namespace kg::cuda
