// The kernels' only CUDA include, and their whole vocabulary: thin wrappers over CUDA C++ under nvcc, host twins with
// the same contract in the SIMT test layer (KG_SIMT), where the same kernel sources run without a GPU. What is not here
// may not be used by a kernel: no raw __shfl, __syncthreads, inline PTX or <<<>>> in any other file. A wrapper added
// here needs its twin in test/simt.
//
// Known to both worlds without a wrapper: threadIdx, blockIdx, blockDim, gridDim, dim3, <cmath> functions, uint4,
// float4.
#pragma once

#include "runtime/dtype.h"

#ifdef KG_SIMT
#include "simt/gpu.h"
#else

#include <cuda_runtime.h>

#define KG_GLOBAL __global__
#define KG_DEVICE __device__ __forceinline__
#define KG_LAUNCH_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
// Statement: a static shared array `type name[count]` (count a constant expression). Not in helper functions that are
// called twice with overlapping use: there is one array an instantiation.
#define KG_SHARED(type, name, count) __shared__ alignas(16) type name[count]
// Statements before a loop: unrolled whole; its body n times (nvcc unrolls loops of constant length whole if not told).
#define KG_PRAGMA(text) _Pragma(#text)
#define KG_UNROLL KG_PRAGMA(unroll)
#define KG_UNROLL_BY(n) KG_PRAGMA(unroll n)

namespace kg::cuda {

constexpr int kWarp = 32;

KG_DEVICE int laneId() { return static_cast<int>(threadIdx.x & 31); }  // blocks are one-dimensional
KG_DEVICE int warpId() { return static_cast<int>(threadIdx.x >> 5); }

// The launch's dynamic shared memory, 128-byte aligned.
KG_DEVICE unsigned char* dynamicShared() {
  extern __shared__ __align__(128) unsigned char kgDynamicShared[];
  return kgDynamicShared;
}

KG_DEVICE int countBits(uint32_t x) { return __popc(x); }

// ---- barriers: every thread of the block (all lanes of the warp) must arrive ----------------------------------------
KG_DEVICE void syncThreads() { __syncthreads(); }
KG_DEVICE void syncWarp() { __syncwarp(); }
KG_DEVICE void threadFence() { __threadfence(); }

// ---- warp collectives: all 32 lanes take part; T of 4 or 8 bytes
// ------------------------------------------------------
template <class T>
KG_DEVICE T shuffle(T v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}
template <class T>
KG_DEVICE T shuffleXor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class T>
KG_DEVICE T shuffleDown(T v, int delta) {
  return __shfl_down_sync(0xffffffffu, v, delta);
}
template <class T>
KG_DEVICE T shuffleUp(T v, int delta) {
  return __shfl_up_sync(0xffffffffu, v, delta);
}
KG_DEVICE bool anyLane(bool p) { return __any_sync(0xffffffffu, p); }
KG_DEVICE bool allLanes(bool p) { return __all_sync(0xffffffffu, p); }
KG_DEVICE uint32_t ballot(bool p) { return __ballot_sync(0xffffffffu, p); }

// ---- integer atomics, global or shared memory (never floating point: results must not depend on an order)
// ------------
KG_DEVICE int32_t atomicAddInt(int32_t* at, int32_t v) { return atomicAdd(at, v); }
KG_DEVICE int32_t atomicMaxInt(int32_t* at, int32_t v) { return atomicMax(at, v); }
KG_DEVICE int32_t atomicMinInt(int32_t* at, int32_t v) { return atomicMin(at, v); }
KG_DEVICE int32_t atomicCas(int32_t* at, int32_t expected, int32_t v) { return atomicCAS(at, expected, v); }

// ---- asynchronous copies of 16 bytes, both ends 16-byte aligned; valid = false writes zeros and reads nothing
// ---------
KG_DEVICE void copyAsync16(void* shared, const void* global, bool valid = true) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
KG_DEVICE void copyAsyncCommit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most N of this thread's committed groups are in flight (a barrier must follow for other threads'
// data).
template <int N>
KG_DEVICE void copyAsyncWait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// ---- tensor cores (bfloat16 operands, float32 accumulators)
// ----------------------------------------------------------- Four 8x8 matrices of 16-bit elements; lane l hands the
// 16-byte aligned address of row l % 8 of matrix l / 8. Lane l receives of each matrix the elements (l / 4, 2 (l % 4))
// and the one right of it; transposed: of the transpose.
KG_DEVICE void loadMatrix4(uint32_t (&r)[4], const void* sharedRow) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(sharedRow));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
KG_DEVICE void loadMatrix4Transposed(uint32_t (&r)[4], const void* sharedRow) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(sharedRow));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
// d[16x8] += a[16x16] b[16x8], PTX mma.m16n8k16.row.col. With g = lane / 4, t = lane % 4:
// a = {(g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..)}, b = {(k 2t.., n g), (k 2t+8.., n g)}, pairs low half first;
// d = {(g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)}.
KG_DEVICE void mmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Two floats to two bfloat16 (nearest even), `low` in the low half.
KG_DEVICE uint32_t packBf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// ---- approximate functions, about 2 ulp: for kernels whose tolerance is bfloat16's or whose error is checked
// -----------
KG_DEVICE float fastExp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
KG_DEVICE float fastReciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace kg::cuda

#endif  // KG_SIMT

namespace kg::cuda {

// N elements moved by one instruction of sizeof(T) * N bytes (16 at most); the address is that aligned.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};
template <class T, int N>
KG_DEVICE Pack<T, N> loadPack(const T* at) {
  return *reinterpret_cast<const Pack<T, N>*>(at);
}
template <class T, int N>
KG_DEVICE void storePack(T* at, const Pack<T, N>& p) {
  *reinterpret_cast<Pack<T, N>*>(at) = p;
}

}  // namespace kg::cuda
