// One queue of a device: commands are enqueued by one thread and run in order by another, so that JavaScript never
// waits for arithmetic. A command that fails marks its outputs as faulty; what depends on them is skipped and marked
// too, and the next read reports the first fault with its op's name. What runs on a device, and how bytes get there and
// back, is its DeviceQueue's business.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "runtime/fault_log.h"
#include "runtime/queue.h"
#include "runtime/storage.h"

namespace kg {

class Graph;
struct GraphCounts {
  uint64_t launches, runs, deviceRuns;  // in a run; runs after the recording; of them as a graph of the device
};

class Stream : public StreamHooks {
 public:
  struct Header;  // a command; command.h

  Stream(const KernelTable& kernels, const KernelInfo* infos, std::unique_ptr<DeviceQueue> queue, Allocation mode);
  ~Stream();  // drops what has not started, waits for what has

  StorageTable& storages() { return storages_; }

  // Enqueues a kernel. `owners[i]` is the storage behind tensors[i] (nullptr when absent).
  void launch(KernelId id, const TensorView* tensors, Storage* const* owners, int tensorCount, const double* attributes,
              int attributeCount);
  // Copies host bytes into a storage; the bytes are taken before this returns.
  void upload(Storage* to, size_t offset, const void* bytes, size_t count);
  // Copies out of a storage into host memory that stays valid until `done` has been called, on a thread of the stream.
  void download(Storage* from, size_t offset, void* to, size_t count, std::function<void(Fault)> done);
  // The same, blocking; returns the fault.
  Fault read(Storage* from, size_t offset, void* to, size_t count);
  // As upload, out of a mapped file, which stays mapped until it is done.
  void uploadMapped(Storage* to, size_t offset, std::shared_ptr<const Mapping> file, size_t fileOffset, size_t count);
  // The whole of a storage from another stream's: enqueued on both, and blocking neither's caller.
  void transfer(Storage* to, Stream& source, Storage* from, size_t fromOffset);
  // Blocks until everything enqueued so far has run, on the device too.
  void synchronize() override;
  // Takes (and clears) the first unreported fault; null when there is none. Call after synchronize().
  Fault takeFault();
  // Runs every command before launch returns and throws its fault there.
  void setSynchronous(bool on) { synchronous_ = on; }

  // What is enqueued between begin and end runs as ever and is recorded: kernels alone, anything else is refused.
  void beginGraph();
  uint32_t endGraph();
  void abandonGraph();
  // Enqueues it all again, with the storages that it had: their contents are what they are by then.
  void replay(uint32_t graph);
  // Waits for the stream.
  void dropGraph(uint32_t graph);
  GraphCounts graphCounts(uint32_t graph);

  DeviceQueue& queue() { return *queue_; }  // for kernels, on the executor's thread

  void filled(char* data, size_t bytes) override;
  void check(char* data, size_t bytes) override;
  void outOfMemory() override;
  size_t scratch() override { return queue_->held(); }
  uint64_t position() override { return written_.load(std::memory_order_relaxed); }

 private:
  struct Transfer;
  Header* reserve(size_t bytes);
  Header* reserveUpload(Storage* to, size_t offset, void* host, size_t count, size_t inlined = 0);
  void publish(Header* header);
  void executorLoop();
  void execute(Header* header);
  void executeKernel(Header* header);
  void callKernel(Header* header);
  void markOutputs(Header* header, const Fault& fault);
  void countLaunches(uint64_t count);
  Fault enterKernel(const KernelInfo& info, Header* header);
  void executeUpload(Header* header);
  void executeDownload(Header* header);
  void executeCheck(Header* header);
  void fence(std::shared_ptr<std::function<void(Fault)>> done);
  std::shared_ptr<FaultLog::Read> enterRead(const Owner& owner);
  Fault leaveRead(const FaultLog::Read& read);
  void deviceFault(uint32_t ticket, const std::string& reason);
  void report(Fault fault);
  void reportDeviceFault(Fault fault);
  Fault takeDeviceFault();
  void awaitIdle(const std::function<bool()>& done);
  void wakeWaiters();
  void settle();
  void record(Header* header, Storage* const* owners);
  void refuseInGraph(const char* what);
  [[noreturn]] static void failForGraph(const char* what);
  std::unique_ptr<Graph>& graphOf(uint32_t id);
  void drop(Graph& graph);
  void executeReplay(Graph& graph);
  bool replayOnDevice(Graph& graph);
  bool enterGraph(Graph& graph, uint32_t* firstTicket);
  void spoil(Graph& graph, const Fault& fault);
  std::unique_lock<std::mutex> lockFaults();

  const KernelTable& kernels_;
  const KernelInfo* infos_;
  std::unique_ptr<DeviceQueue> queue_;
  const bool deferred_;
  StorageTable storages_;
  bool synchronous_ = false;
  std::map<uint32_t, std::unique_ptr<Graph>> graphs_;
  std::unique_ptr<Graph> recording_;
  uint32_t lastGraph_ = 0;

  std::unique_ptr<char[]> ring_;
  std::atomic<uint64_t> written_{0}, consumed_{0};  // byte positions, ever increasing
  std::atomic<bool> stop_{false};
  std::atomic<bool> sleeping_{false};
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  Fault pendingFault_, deviceFault_;  // of commands that were refused, found by the device; guarded by mutex_
  // A deferred queue's thread marks storages as well as the executor's: their faults and the log are under this lock.
  std::mutex faultMutex_;
  FaultLog log_;
  uint64_t launches_ = 0;
  std::thread executor_;
};

}  // namespace kg
