// One queue of a device: commands are enqueued by one thread and run in order by another, so that JavaScript never
// waits for arithmetic. A command that fails marks its outputs as faulty; what depends on them is skipped and marked
// too, and the next read reports the first fault with its op's name.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "ops/backend.h"
#include "runtime/storage.h"

namespace kg {

struct KernelInfo {
  const char* name;
  int outputs;           // leading tensors that are written
  uint32_t accumulates;  // bit i: output i is read as well
  bool inPlace;          // writes among its inputs (optimizers); skipped by a fault, it leaves them valid
};

using Fault = std::shared_ptr<const std::string>;

class Stream : public StreamHooks {
 public:
  Stream(const KernelTable& kernels, const KernelInfo* infos, MemorySource source, bool guards);
  ~Stream();  // drops what has not started, waits for what has

  StorageTable& storages() { return storages_; }

  // Enqueues a kernel. `owners[i]` is the storage behind tensors[i] (nullptr when absent).
  void launch(KernelId id, const TensorView* tensors, Storage* const* owners, int tensorCount, const double* attributes,
              int attributeCount);
  // Copies host bytes into a storage; the bytes are taken before this returns.
  void upload(Storage* to, size_t offset, const void* bytes, size_t count);
  // Copies out of a storage into host memory that stays valid until `done` has been called on the executor's thread.
  void download(Storage* from, size_t offset, void* to, size_t count, std::function<void(Fault)> done);
  // Blocks until everything enqueued so far has run.
  void synchronize() override;
  // Takes (and clears) the first unreported fault; null when there is none. Call after synchronize().
  Fault takeFault();
  // Runs every command before launch returns and throws its fault there.
  void setSynchronous(bool on) { synchronous_ = on; }

  void* scratch(size_t bytes);  // executor's thread only

  void filled(char* data, size_t bytes) override;
  void check(char* data, size_t bytes) override;

 private:
  struct Owner;
  struct Header;
  Header* reserve(size_t bytes);
  void publish(Header* header);
  void executorLoop();
  void execute(Header* header);
  void executeKernel(Header* header);
  void report(Fault fault);

  const KernelTable& kernels_;
  const KernelInfo* infos_;
  StorageTable storages_;
  bool synchronous_ = false;

  std::unique_ptr<char[]> ring_;
  std::atomic<uint64_t> written_{0}, consumed_{0};  // byte positions, ever increasing
  std::atomic<bool> stop_{false};
  std::atomic<bool> sleeping_{false};
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  Fault pendingFault_;  // guarded by mutex_
  void* scratch_ = nullptr;
  size_t scratchBytes_ = 0;
  std::thread executor_;
};

}  // namespace kg
