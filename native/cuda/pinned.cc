#include "cuda/pinned.h"

#include <cuda_runtime_api.h>

#include "cuda/context.h"

namespace kg::cuda {
namespace {

constexpr size_t kSlab = size_t(1) << 20, kSmall = size_t(64) << 10;

size_t sizeFor(size_t bytes) {
  size_t size = 4096;
  while (size < bytes) size *= 2;
  return size;
}

}  // namespace

PinnedPool::~PinnedPool() {
  releaseLarge();
  for (char* slab : slabs_) cudaFreeHost(slab);
}

char* PinnedPool::lock(size_t bytes) {
  void* memory = nullptr;
  const cudaError_t error = cudaMallocHost(&memory, bytes);
  if (error == cudaSuccess) return static_cast<char*>(memory);
  cudaGetLastError();  // not the next launch's
  fail(
      "out of host memory: expected %.1f MiB of page-locked memory for copies to and from the GPU, found less (%s); "
      "try to end other processes, or raise the memory limit of the container or the user (ulimit -l)",
      bytes / double(1 << 20), cudaGetErrorString(error));
}

void PinnedPool::releaseLarge() {
  for (auto& [size, blocks] : free_) {
    if (size <= kSmall) continue;
    for (char* block : blocks) cudaFreeHost(block);
    large_ -= size * blocks.size();
    blocks.clear();
  }
}

PinnedBlock PinnedPool::take(size_t bytes) {
  const size_t size = sizeFor(bytes);
  std::unique_lock<std::mutex> guard(mutex_);
  given_.wait(guard, [&] { return inUse_ + size <= kCapacity; });
  std::vector<char*>& fits = free_[size];
  if (fits.empty() && size <= kSmall) {
    char* slab = lock(kSlab);
    slabs_.push_back(slab);
    for (size_t at = kSlab; at > 0; at -= size) fits.push_back(slab + at - size);
  } else if (fits.empty()) {
    if (large_ + size > kCapacity) releaseLarge();  // blocks of other sizes
    fits.push_back(lock(size));
    large_ += size;
  }
  PinnedBlock block{fits.back(), size};
  fits.pop_back();
  inUse_ += size;
  return block;
}

void PinnedPool::give(PinnedBlock block) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    free_[block.size].push_back(block.data);
    inUse_ -= block.size;
  }
  given_.notify_one();
}

}  // namespace kg::cuda
