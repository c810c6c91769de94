// What a kernel's host half may know of the device it enqueues on: the stream, the device's limits, the fault slot, and
// how to launch. A host half checks the call, asks for scratch(), launches, and returns; it never waits and never reads
// device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <tuple>

#include "ops/backend.h"
#include "runtime/error.h"

// Files that hold host code alone (.cc) see the host's half of this header.
#if defined(__CUDACC__) || defined(KG_SIMT)
#define KG_DEVICE_CODE 1
#include "cuda/gpu.h"
#endif

namespace kg::cuda {

// The first fault in the data that a launch met (an id out of range); read with the next copy to the host, which
// reports it.
enum class FaultKind : int32_t {
  None = 0,
  IdOutOfRange,      // id, position, size of the table: ids, positions, targetId
  RowOutOfRange,     // row, position, rows: targetRow, rowMap
  BadSegments,       // segment, 0, 0
  ProbeOutOfRange,   // id, position, size of the vocabulary
  ZeroDivisor,       // 0, 0, 0: int32 division
  NegativeExponent,  // exponent, 0, 0: int32 power
  RowMapOutOfRange,  // row, position, rows: where RowOutOfRange already means targetRow
};
struct FaultSlot {
  int32_t ticket;  // of the launch that has it; 0: free
  int32_t kind;
  int32_t kernel;  // KernelId
  int32_t unused;
  int64_t values[3];  // as FaultKind says
};
// As many launches can fail before the host reads of the first and clears its slot.
constexpr uint32_t kFaultSlots = 32;
// Handed to a kernel by value.
struct FaultSink {
  FaultSlot* slots;
  int32_t kernel;
  uint32_t ticket;
  const uint32_t* replay;  // in a graph: the ticket of its first launch in this replay, the others count from it
};
#ifdef KG_DEVICE_CODE
// A slot that an earlier launch holds stays its own until the host has read and cleared it; the next free one is taken.
KG_DEVICE void reportFault(const FaultSink& sink, FaultKind kind, int64_t a, int64_t b, int64_t c) {
  const uint32_t launch = sink.ticket + (sink.replay ? *sink.replay : 0);
  const int32_t ticket = static_cast<int32_t>(launch);
  for (uint32_t i = 0; i < kFaultSlots; i++) {
    FaultSlot& slot = sink.slots[(launch + i) % kFaultSlots];
    const int32_t holder = atomicCas(&slot.ticket, 0, ticket);
    if (holder == ticket) return;
    if (holder != 0) continue;
    slot.kind = static_cast<int32_t>(kind);
    slot.kernel = sink.kernel;
    slot.values[0] = a;
    slot.values[1] = b;
    slot.values[2] = c;
    return;
  }
}
#endif

struct Context {
  cudaStream_t stream;
  int device;
  int capability;            // 80, 90, ...
  int processors;            // streaming multiprocessors
  int sharedMemoryPerBlock;  // bytes, opt-in limit
  FaultSink faults;          // of the kernel that is being enqueued
};
const Context& context(const Call& call);

// Memory of the device that outlives the call, the caller's to cudaFree; memory in the cache is given back for it.
// `what` says for what, as a literal. Throws OutOfMemory.
void* acquire(const Call& call, size_t bytes, const char* what);

// Throws "CUDA: <error> in <what>".
void check(cudaError_t status, const char* what);
// Raises a kernel's limit of dynamic shared memory where these bytes and its static arrays are more than a block may
// have unasked (48 KiB), once a kernel and device.
void allowShared(const Context& context, const void* kernel, size_t bytes);

#ifdef KG_DEVICE_CODE
struct LaunchShape {
  dim3 grid;
  int threads;        // blocks are one-dimensional, a multiple of 32
  size_t shared = 0;  // dynamic shared memory, bytes
};

// launch(call, {grid, threads, shared}, kernel<...>, arguments...): enqueues; an empty grid is nothing to do.
template <class... P, class... A>
void launch(const Call& call, LaunchShape shape, void (*kernel)(P...), A... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  const Context& on = context(call);
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shape.shared > 0) allowShared(on, function, shape.shared);
#ifdef KG_SIMT
  check(simt::launch(shape.grid, dim3(shape.threads), shape.shared, on.stream, kernel, static_cast<P>(arguments)...),
        "launch");
#else
  std::tuple<P...> values(static_cast<P>(arguments)...);
  std::apply(
      [&](P&... value) {
        void* pointers[] = {static_cast<void*>(&value)..., nullptr};
        check(cudaLaunchKernel(function, shape.grid, dim3(shape.threads), pointers, shape.shared, on.stream), "launch");
      },
      values);
#endif
}
#endif

}  // namespace kg::cuda
