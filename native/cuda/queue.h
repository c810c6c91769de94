// A CUDA stream as a device queue. The executor's thread launches kernels and copies and never waits for the device; a
// second thread waits for events, takes downloads out of pinned memory, and reads the fault slots that came with them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda/context.h"
#include "cuda/pinned.h"
#include "runtime/queue.h"

namespace kg::cuda {

// "expected ids[3] in [0, 8), found 9": the words of the CPU kernels.
std::string faultText(const FaultSlot& slot);

class Queue final : public DeviceQueue {
 public:
  explicit Queue(int device);
  ~Queue() override;

  MemorySource memory() override;
  bool deferred() const override { return true; }
  void start(FaultHandler handler, Reclaim reclaim) override;
  void launching(KernelId id, uint32_t ticket) override;
  void upload(char* to, const void* bytes, size_t count) override;
  void download(void* to, const char* from, size_t count, Done done) override;
  void fill(char* data, int byte, size_t count) override;
  void* scratch(size_t bytes) override;
  size_t held() const override { return held_.load(std::memory_order_relaxed); }
  bool prepare(std::unique_ptr<DeviceGraph>& graph, const std::function<void()>& launches) override;
  void replay(DeviceGraph& graph, uint32_t ticket) override;
  void finish() override;

  const Context& context() const { return context_; }
  // Memory of the device outside of any storage, kept to the end. What the cache holds is given back for it.
  // Throws OutOfMemory.
  void* acquire(size_t bytes, const char* what);

 private:
  // On the completion thread; may be empty.
  using Then = std::function<void(const char* pinned, cudaError_t)>;
  struct Completion {
    cudaEvent_t event;
    cudaError_t error;  // not success: there is nothing to wait for
    PinnedBlock block;
    Then then;
  };

  cudaGraph_t capture(const std::function<void()>& launches);
  void complete(cudaError_t error, PinnedBlock block, Then then);
  void copyOut(void* to, const char* from, size_t count);
  void lastCopyOut(void* to, const char* from, size_t count, std::shared_ptr<Done> done);
  void completionLoop();
  cudaError_t await(cudaEvent_t event) const;
  void readFaults(const FaultSlot* slots);
  cudaError_t takeEvent(cudaEvent_t* event);
  void giveEvent(cudaEvent_t event);
  void* allocate(size_t bytes);
  void retire(void* memory, size_t bytes);
  void freeRetired(const void* which);

  int device_;
  Context context_{};
  FaultSlot* slots_ = nullptr;          // on the device
  int32_t reported_[kFaultSlots] = {};  // tickets: a fault is read with every copy until its slot has been cleared
  bool capturing_ = false;              // the executor's
  uint32_t* replay_ = nullptr;          // FaultSink's, on the device
  std::mutex capture_;                  // while the stream captures
  FaultHandler handler_;
  Reclaim reclaim_;
  void* scratch_ = nullptr;
  size_t scratchBytes_ = 0;
  std::atomic<size_t> held_{0};
  PinnedPool pinned_;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Completion> completions_;  // guarded by mutex_
  std::vector<cudaEvent_t> events_;     // guarded by mutex_
  // Blocks of scratch that enqueued work may still use, and their sizes; guarded by mutex_.
  std::vector<std::pair<void*, size_t>> retired_;
  bool stop_ = false;  // guarded by mutex_
  std::thread completer_;
};

}  // namespace kg::cuda
