// The rest of the CUDA runtime: errors, the device, memory, copies, and the launch of kernels.
#include <cstring>

#include "block.h"
#include "cuda_runtime_api.h"
#include "errors.h"
#include "memory.h"
#include "report.h"
#include "settings.h"
#include "simt/runtime.h"
#include "stream.h"

namespace simt {
namespace {

thread_local cudaError_t lastError = cudaSuccess;

struct ErrorText {
  cudaError_t error;
  const char *name, *text;
};
#define SIMT_ERROR(name, text) {name, #name, text}
const ErrorText kErrors[] = {
    SIMT_ERROR(cudaSuccess, "no error"),
    SIMT_ERROR(cudaErrorInvalidValue, "invalid argument"),
    SIMT_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    SIMT_ERROR(cudaErrorInitializationError, "initialization error"),
    SIMT_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    SIMT_ERROR(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    SIMT_ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    SIMT_ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    SIMT_ERROR(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"),
    SIMT_ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    SIMT_ERROR(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    SIMT_ERROR(cudaErrorNotReady, "device not ready"),
    SIMT_ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    SIMT_ERROR(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    SIMT_ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    SIMT_ERROR(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    SIMT_ERROR(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    SIMT_ERROR(cudaErrorUnknown, "unknown error"),
};
#undef SIMT_ERROR

const ErrorText& textOf(cudaError_t error) {
  for (const ErrorText& e : kErrors)
    if (e.error == error) return e;
  return kErrors[sizeof kErrors / sizeof kErrors[0] - 1];
}

cudaError_t checkLaunch(const LaunchConfiguration& c) {
  const auto kernel = [&] { return functionName(c.kernel); };
  if (c.block.x < 1 || c.block.x > 1024 || c.block.x % 32 != 0 || c.block.y != 1 || c.block.z != 1) {
    remark("bad launch size: blocks of (%u, %u, %u) threads for %s; expected 32 to 1024 in x, a multiple of 32",
           c.block.x, c.block.y, c.block.z, kernel().c_str());
    return setError(cudaErrorInvalidConfiguration);
  }
  if (c.grid.x < 1 || c.grid.x > 0x7fffffffu || c.grid.y < 1 || c.grid.y > 65535 || c.grid.z < 1 || c.grid.z > 65535) {
    remark("bad launch size: a grid of (%u, %u, %u) blocks for %s; expected 1 to 2147483647, 65535, 65535", c.grid.x,
           c.grid.y, c.grid.z, kernel().c_str());
    return setError(cudaErrorInvalidConfiguration);
  }
  if (c.shared > dynamicSharedLimit(c.kernel)) {
    remark(
        "too much shared memory: %zu bytes for %s; it may have %zu, and more by cudaFuncSetAttribute: %zu in all "
        "(capability %d)",
        c.shared, kernel().c_str(), dynamicSharedLimit(c.kernel), sharedOptinLimit(), settings().capability);
    return setError(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

// The two ends of a copy: device ranges must lie in one allocation.
bool soundRange(const void* at, size_t bytes, const char* what) {
  if (!inDeviceRange(at) || isDeviceMemory(at, bytes)) return true;
  remark("out of bounds: %s of %zu bytes at %p: %s", what, bytes, at, describeAddress(at).c_str());
  return false;
}

bool soundCopy(const void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const bool toDevice = inDeviceRange(to), fromDevice = inDeviceRange(from);
  const bool wantTo = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool wantFrom = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (kind != cudaMemcpyDefault && (toDevice != wantTo || fromDevice != wantFrom)) {
    remark("a copy of kind %d from %s to %s memory", kind, fromDevice ? "device" : "host",
           toDevice ? "device" : "host");
    return false;
  }
  return soundRange(to, bytes, "the target of a copy") && soundRange(from, bytes, "the source of a copy");
}

Work deviceWork(std::function<void()> run) { return {Work::Kind::Device, std::move(run), nullptr}; }

cudaError_t enqueued(bool known) { return known ? cudaSuccess : setError(cudaErrorInvalidResourceHandle); }

}  // namespace

cudaError_t setError(cudaError_t error) { return lastError = error; }

cudaError_t checkPointer(const LaunchConfiguration& configuration, int argument, const void* pointer) {
  if (!pointer || inDeviceRange(pointer) || isPinned(pointer)) return cudaSuccess;
  remark("a host pointer, %p, is argument %d of %s", pointer, argument, functionName(configuration.kernel).c_str());
  return setError(cudaErrorIllegalAddress);
}

cudaError_t enqueueKernel(const LaunchConfiguration& configuration, std::function<void()> thread) {
  if (checkLaunch(configuration) != cudaSuccess) return cudaPeekAtLastError();
  auto run = [configuration, thread = std::move(thread)] { runKernel(configuration, thread); };
  return enqueued(enqueue(configuration.stream, deviceWork(std::move(run))));
}

}  // namespace simt

using simt::setError;

extern "C" {

cudaError_t cudaGetLastError() {
  const cudaError_t error = simt::lastError;
  simt::lastError = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return simt::lastError; }
const char* cudaGetErrorString(cudaError_t error) { return simt::textOf(error).text; }
const char* cudaGetErrorName(cudaError_t error) { return simt::textOf(error).name; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = simt::settings().oldDevices + 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return device == simt::settings().oldDevices ? cudaSuccess : setError(cudaErrorInvalidDevice);
}
cudaError_t cudaGetDevice(int* device) {
  *device = simt::settings().oldDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  const int old = simt::settings().oldDevices;
  if (device < 0 || device > old) return setError(cudaErrorInvalidDevice);
  *properties = {};
  strcpy(properties->name, device < old ? "old GPU" : "SIMT layer");
  properties->totalGlobalMem = simt::settings().memory;
  properties->sharedMemPerBlock = simt::kStaticSharedLimit;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  const int capability = device < old ? 75 : simt::settings().capability;
  properties->major = capability / 10;
  properties->minor = capability % 10;
  properties->multiProcessorCount = simt::settings().processors;
  properties->sharedMemPerMultiprocessor = simt::sharedOptinLimit() + 1024;
  properties->sharedMemPerBlockOptin = simt::sharedOptinLimit();
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (cudaGetDeviceProperties(&p, device) != cudaSuccess) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = p.maxThreadsPerBlock;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(p.sharedMemPerBlock);
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = p.multiProcessorCount;
      return cudaSuccess;
    case cudaDevAttrUnifiedAddressing:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = p.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = p.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(p.sharedMemPerMultiprocessor);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(p.sharedMemPerBlockOptin);
      return cudaSuccess;
  }
  return setError(cudaErrorInvalidValue);
}
cudaError_t cudaDeviceReset() { return cudaDeviceSynchronize(); }

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  simt::waits("cudaMalloc");
  *memory = bytes ? simt::allocateDevice(bytes) : nullptr;
  return *memory || bytes == 0 ? cudaSuccess : setError(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* memory) {
  if (!memory) return cudaSuccess;
  simt::waits("cudaFree");
  simt::synchronizeDevice();
  if (simt::freeDevice(memory)) return cudaSuccess;
  simt::remark("cudaFree of %p, which is no allocation", memory);
  return setError(cudaErrorInvalidValue);
}
cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  simt::waits("cudaMallocHost");
  *memory = bytes > simt::settings().pinned ? nullptr : simt::allocatePinned(bytes);
  return *memory ? cudaSuccess : setError(cudaErrorMemoryAllocation);
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) { return cudaMallocHost(memory, bytes); }
cudaError_t cudaFreeHost(void* memory) {
  if (!memory) return cudaSuccess;
  simt::waits("cudaFreeHost");
  simt::synchronizeDevice();
  return simt::freePinned(memory) ? cudaSuccess : setError(cudaErrorInvalidValue);
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = simt::settings().memory;
  *free = *total - simt::deviceMemoryInUse();
  return cudaSuccess;
}

// Pinned memory is read and written when the stream gets there; of pageable memory, as in CUDA, a copy is taken at once
// and results are there at the return.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  if (!simt::soundCopy(to, from, bytes, kind)) return setError(cudaErrorInvalidValue);
  const bool pageableSource = !simt::inDeviceRange(from) && !simt::isPinned(from);
  if (pageableSource) {
    std::string taken(static_cast<const char*>(from), bytes);
    auto run = [to, taken = std::move(taken)] { memcpy(to, taken.data(), taken.size()); };
    return simt::enqueued(simt::enqueue(stream, simt::deviceWork(std::move(run))));
  }
  const bool known = simt::enqueue(stream, simt::deviceWork([=] { memmove(to, from, bytes); }));
  const bool pageableTarget = !simt::inDeviceRange(to) && !simt::isPinned(to);
  if (pageableTarget) simt::waits("cudaMemcpyAsync to pageable memory");
  return simt::enqueued(known && (!pageableTarget || simt::synchronizeStream(stream)));
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t status = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return status == cudaSuccess ? cudaStreamSynchronize(nullptr) : status;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  if (!simt::inDeviceRange(to) || !simt::soundRange(to, bytes, "the target of a memset"))
    return setError(cudaErrorInvalidValue);
  return simt::enqueued(simt::enqueue(stream, simt::deviceWork([=] { memset(to, value, bytes); })));
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value >= 0 && simt::allowDynamicShared(kernel, static_cast<size_t>(value))) return cudaSuccess;
  simt::remark("too much shared memory: %d bytes for %s; this device (capability %d) has %zu a block", value,
               simt::functionName(kernel).c_str(), simt::settings().capability, simt::sharedOptinLimit());
  return setError(cudaErrorInvalidValue);
}
// sharedSizeBytes is a bound: a kernel's arrays are known when it runs.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = {simt::staticSharedBound(kernel), static_cast<int>(simt::dynamicSharedLimit(kernel))};
  return cudaSuccess;
}
}
