// What code compiled against the SIMT layer calls in it: launching kernels, and the collectives behind simt/gpu.h.
// Implemented by libkeelgrad-simt. Knows nothing of keelgrad's engine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <utility>

#include "cuda_runtime_api.h"

namespace simt {

// The CUDA thread that runs now. One block runs at a time in a process, so these are plain variables.
extern uint3 threadIndex, blockIndex;
extern dim3 blockShape, gridShape;

// A place in a kernel's source; collectives are told apart by it.
struct Site {
  const char* file;
  int line;
};

void barrier(Site site);
void warpBarrier(Site site);
uint64_t exchange(uint64_t bits, int sourceLane, Site site);  // every lane gives bits and takes those of one lane
uint32_t vote(bool predicate, Site site);                     // bit l: lane l's predicate
// Lane l brings the 16 bytes of row l % 8 of matrix l / 8.
void loadMatrices(uint32_t* registers, const uint16_t* row, bool transposed, Site site);
void multiplyAccumulate(float* d, const uint32_t* a, const uint32_t* b, Site site);
void fence();

// A static shared array of the running block, one for each tag; filled with NaN when a block first asks for it.
void* sharedArray(const void* tag, size_t bytes);
unsigned char* dynamicSharedMemory();
void checkAlignment(const void* address, size_t alignment, const char* what, Site site);

// One thread's asynchronous copy of 16 bytes; the copying itself is done by the caller, where sanitizers see it.
struct PendingCopy {
  void* to;
  const void* from;  // nullptr: zeros
};
bool deferCopy(const PendingCopy& copy);  // false: to be done at once
void commitCopies();
bool takeCopy(int groupsInFlight, PendingCopy* copy);  // the next copy that must be done before a wait for so many ends

// ---- host side
// -------------------------------------------------------------------------------------------------------
struct LaunchConfiguration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
  const void* kernel;  // names it in messages
};
// Checks the launch's limits and enqueues it; errors are also left for cudaGetLastError, as CUDA does.
cudaError_t enqueueKernel(const LaunchConfiguration& configuration, std::function<void()> thread);
// A kernel was given this pointer; an error where it is the host's.
cudaError_t checkPointer(const LaunchConfiguration& configuration, int argument, const void* pointer);

template <class T>
bool soundArgument(const LaunchConfiguration& configuration, int index, const T& argument) {
  if constexpr (std::is_pointer_v<T>) return checkPointer(configuration, index, argument) == cudaSuccess;
  return true;
}

// launch(grid, block, dynamic shared bytes, stream, kernel, arguments...)
template <class... P>
cudaError_t launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream, void (*kernel)(P...),
                   std::common_type_t<P>... arguments) {
  const LaunchConfiguration configuration{grid, block, shared, stream, reinterpret_cast<const void*>(kernel)};
  int index = 0;
  if (!(soundArgument(configuration, index++, arguments) && ...)) return cudaPeekAtLastError();
  return enqueueKernel(configuration, [=] { kernel(arguments...); });
}

}  // namespace simt

extern "C" {
// For libraries that work on device memory without kernels of their own (the stand-in cuBLAS): enqueues function(data)
// on the stream; device memory is accessible while it runs. `name` is a literal.
void simtEnqueue(cudaStream_t stream, void (*function)(void* data), void* data, const char* name);
}
