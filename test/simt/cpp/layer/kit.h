// What the layer's own tests share: device buffers of ints or floats, launches, and a digest of results.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/gpu.h"

namespace kit {

inline void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  printf("CUDA: %s in %s\n", cudaGetErrorString(status), what);
  fflush(stdout);
  exit(3);
}

template <class T>
T* deviceBuffer(size_t count) {
  T* memory = nullptr;
  require(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  return memory;
}
template <class T>
T* deviceBuffer(const std::vector<T>& values) {
  T* memory = deviceBuffer<T>(values.size());
  require(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  return memory;
}
template <class T>
std::vector<T> hostCopy(const T* memory, size_t count) {
  std::vector<T> values(count);
  require(cudaMemcpy(values.data(), memory, count * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
  return values;
}

template <class... P, class... A>
void launch(int blocks, int threads, size_t shared, void (*kernel)(P...), A... arguments) {
  require(simt::launch(dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), shared, nullptr,
                       kernel, static_cast<P>(arguments)...),
          "launch");
}

// The same for equal bytes, and only for them as far as tests go.
template <class T>
uint64_t digest(const std::vector<T>& values) {
  uint64_t hash = 1469598103934665603u;
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); i++) hash = (hash ^ bytes[i]) * 1099511628211u;
  return hash;
}

}  // namespace kit
