#include "cuda/queue.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "cuda/backend.h"
#include "cuda/gemm.h"

namespace kg::cuda {
namespace {

constexpr size_t kScratchStep = size_t(8) << 20;
constexpr size_t kExactFrom = size_t(10) << 20;
constexpr auto kSpin = std::chrono::microseconds(50);

void* acquireDevice(void* self, size_t bytes) {
  void* memory = nullptr;
  if (cudaSetDevice(*static_cast<int*>(self)) == cudaSuccess && cudaMalloc(&memory, bytes) == cudaSuccess)
    return memory;
  cudaGetLastError();  // not the next launch's
  return nullptr;
}

void releaseDevice(void* self, void* memory, size_t) {
  cudaSetDevice(*static_cast<int*>(self));
  cudaFree(memory);
}

void leftOnDevice(void* self, size_t* free, size_t* total) {
  cudaSetDevice(*static_cast<int*>(self));
  if (cudaMemGetInfo(free, total) != cudaSuccess) cudaGetLastError();
}

Fault faultOf(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  return std::make_shared<const std::string>(std::string("[copy to the host] CUDA: ") + cudaGetErrorString(error) +
                                             "; the device may be unusable until the process is started anew");
}

}  // namespace

Queue::Queue(int device) : device_(device) {
  check(cudaSetDevice(device), "cudaSetDevice");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  context_.device = device;
  context_.capability = properties.major * 10 + properties.minor;
  context_.processors = properties.multiProcessorCount;
  context_.sharedMemoryPerBlock = static_cast<int>(properties.sharedMemPerBlockOptin);
  check(cudaStreamCreateWithFlags(&context_.stream, cudaStreamNonBlocking), "cudaStreamCreate");
  check(cudaMalloc(reinterpret_cast<void**>(&slots_), kFaultSlots * sizeof(FaultSlot)), "cudaMalloc");
  held_ = kFaultSlots * sizeof(FaultSlot);
  check(cudaMemsetAsync(slots_, 0, kFaultSlots * sizeof(FaultSlot), context_.stream), "cudaMemset");
  check(cudaMalloc(reinterpret_cast<void**>(&replay_), sizeof *replay_), "cudaMalloc");
  held_ += sizeof *replay_;
  completer_ = std::thread([this] { completionLoop(); });
}

Queue::~Queue() {
  finish();
  cudaSetDevice(device_);
  releaseGemm(context_.stream);
  freeRetired(nullptr);
  cudaFree(scratch_);
  cudaFree(slots_);
  cudaFree(replay_);
  for (cudaEvent_t event : events_) cudaEventDestroy(event);
  cudaStreamDestroy(context_.stream);
}

void Queue::finish() {
  if (!completer_.joinable()) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  completer_.join();
  cudaSetDevice(device_);
  cudaStreamSynchronize(context_.stream);
}

MemorySource Queue::memory() { return {acquireDevice, releaseDevice, leftOnDevice, &device_, kExactFrom}; }

void Queue::start(FaultHandler handler, Reclaim reclaim) {
  handler_ = std::move(handler);
  reclaim_ = std::move(reclaim);
  cudaSetDevice(device_);
}

void Queue::launching(KernelId id, uint32_t ticket) {
  context_.faults = {slots_, static_cast<int32_t>(id), ticket, capturing_ ? replay_ : nullptr};
}

void Queue::fill(char* data, int byte, size_t count) {
  check(cudaMemsetAsync(data, byte, count, context_.stream), "cudaMemset");
}

void* Queue::allocate(size_t bytes) {
  void* memory = acquireDevice(&device_, bytes);
  if (memory) held_ += bytes;
  return memory;
}

void* Queue::acquire(size_t bytes, const char* what) {
  void* memory = allocate(bytes);
  if (!memory) {
    check(cudaStreamSynchronize(context_.stream), "cudaStreamSynchronize");
    freeRetired(nullptr);
    reclaim_();
    memory = allocate(bytes);
  }
  if (!memory) throw OutOfMemory(bytes, what);
  return memory;
}

void* Queue::scratch(size_t bytes) {
  if (bytes <= scratchBytes_) return scratch_;
  if (capturing_) fail("expected scratch memory for what is captured, found too little");
  retire(scratch_, scratchBytes_);  // kernels still use the smaller block
  scratch_ = nullptr;
  scratchBytes_ = 0;
  const size_t size = (bytes + kScratchStep - 1) / kScratchStep * kScratchStep;
  scratch_ = acquire(size, "scratch for intermediate results");
  scratchBytes_ = size;
  return scratch_;
}

// Freed when the device has come to this point.
void Queue::retire(void* memory, size_t bytes) {
  if (!memory) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    retired_.emplace_back(memory, bytes);
  }
  complete(cudaSuccess, {}, [this, memory](const char*, cudaError_t) { freeRetired(memory); });
}

// One block, or all of them (null); nothing enqueued uses them any more.
void Queue::freeRetired(const void* which) {
  std::vector<std::pair<void*, size_t>> freed;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto kept = std::stable_partition(retired_.begin(), retired_.end(),
                                            [&](const auto& block) { return which && block.first != which; });
    freed.assign(kept, retired_.end());
    retired_.erase(kept, retired_.end());
  }
  for (const auto& [memory, bytes] : freed) {
    cudaFree(memory);
    held_ -= bytes;
  }
}

void Queue::upload(char* to, const void* bytes, size_t count) {
  for (size_t at = 0; at < count; at += PinnedPool::kLargest) {
    const size_t part = std::min(count - at, PinnedPool::kLargest);
    const PinnedBlock block = pinned_.take(part);
    memcpy(block.data, static_cast<const char*>(bytes) + at, part);
    const cudaError_t error = cudaMemcpyAsync(to + at, block.data, part, cudaMemcpyHostToDevice, context_.stream);
    complete(error, block, nullptr);
    check(error, "a copy to the device");
  }
}

void Queue::download(void* to, const char* from, size_t count, Done done) {
  constexpr size_t room = PinnedPool::kLargest - kFaultSlots * sizeof(FaultSlot), part = PinnedPool::kLargest / 2;
  auto shared = std::make_shared<Done>(std::move(done));
  size_t at = 0;
  try {
    for (; count - at > room; at += part) copyOut(static_cast<char*>(to) + at, from + at, part);
    lastCopyOut(static_cast<char*>(to) + at, from + at, count - at, shared);
  } catch (const std::exception& e) {  // no pinned memory; parts may be on their way, so `done` takes its turn
    auto fault = std::make_shared<const std::string>(std::string("[copy to the host] ") + e.what());
    complete(cudaErrorMemoryAllocation, {}, [shared, fault](const char*, cudaError_t) { (*shared)(fault); });
  }
}

// A part of a long copy. An error of the device shows again at the last part.
void Queue::copyOut(void* to, const char* from, size_t count) {
  const PinnedBlock block = pinned_.take(count);
  const cudaError_t error = cudaMemcpyAsync(block.data, from, count, cudaMemcpyDeviceToHost, context_.stream);
  complete(error, block, [to, count](const char* pinned, cudaError_t state) {
    if (state == cudaSuccess) memcpy(to, pinned, count);
  });
}

// The fault slots come along, and are read before `done` is told.
void Queue::lastCopyOut(void* to, const char* from, size_t count, std::shared_ptr<Done> done) {
  constexpr size_t slotBytes = kFaultSlots * sizeof(FaultSlot);
  const PinnedBlock block = pinned_.take(slotBytes + count);
  cudaError_t error = cudaMemcpyAsync(block.data, slots_, slotBytes, cudaMemcpyDeviceToHost, context_.stream);
  if (error == cudaSuccess && count)
    error = cudaMemcpyAsync(block.data + slotBytes, from, count, cudaMemcpyDeviceToHost, context_.stream);
  complete(error, block, [this, to, count, done](const char* pinned, cudaError_t state) {
    if (state == cudaSuccess) {
      readFaults(reinterpret_cast<const FaultSlot*>(pinned));
      if (count) memcpy(to, pinned + slotBytes, count);
    }
    (*done)(faultOf(state));
  });
}

void Queue::readFaults(const FaultSlot* slots) {
  std::lock_guard<std::mutex> lock(capture_);  // what another thread enqueues meanwhile would be captured
  for (uint32_t i = 0; i < kFaultSlots; i++) {
    if (slots[i].ticket == 0 || slots[i].ticket == reported_[i]) continue;
    reported_[i] = slots[i].ticket;
    handler_(static_cast<uint32_t>(slots[i].ticket), faultText(slots[i]));
    cudaMemsetAsync(slots_ + i, 0, sizeof(FaultSlot), context_.stream);
  }
}

// Calls `then` and gives the block back once the device has come to this point, or has refused to.
void Queue::complete(cudaError_t error, PinnedBlock block, Then then) {
  cudaEvent_t event = nullptr;
  if (error == cudaSuccess) error = takeEvent(&event);
  if (error == cudaSuccess) error = cudaEventRecord(event, context_.stream);
  if (error != cudaSuccess) cudaGetLastError();  // not the next launch's
  {
    std::lock_guard<std::mutex> lock(mutex_);
    completions_.push_back({event, error, block, std::move(then)});
  }
  wake_.notify_one();
}

cudaError_t Queue::takeEvent(cudaEvent_t* event) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!events_.empty()) {
      *event = events_.back();
      events_.pop_back();
      return cudaSuccess;
    }
  }
  return cudaEventCreateWithFlags(event, cudaEventDisableTiming | cudaEventBlockingSync);
}

void Queue::giveEvent(cudaEvent_t event) {
  std::lock_guard<std::mutex> lock(mutex_);
  events_.push_back(event);
}

// A short read is not worth a sleep; a long one is not worth a core.
cudaError_t Queue::await(cudaEvent_t event) const {
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    const cudaError_t state = cudaEventQuery(event);
    if (state != cudaErrorNotReady) return state;
  } while (std::chrono::steady_clock::now() < until);
  return cudaEventSynchronize(event);
}

void Queue::completionLoop() {
  cudaSetDevice(device_);
  for (;;) {
    Completion next;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return stop_ || !completions_.empty(); });
      if (completions_.empty()) return;
      next = std::move(completions_.front());
      completions_.pop_front();
    }
    const cudaError_t state = next.error == cudaSuccess ? await(next.event) : next.error;
    if (next.then) next.then(next.block.data, state);
    if (next.block.data) pinned_.give(next.block);
    if (next.event) giveEvent(next.event);
  }
}

std::unique_ptr<DeviceQueue> makeQueue(int index) { return std::make_unique<Queue>(index); }

}  // namespace kg::cuda
