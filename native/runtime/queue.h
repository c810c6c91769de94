// What a stream asks of its device: copies, fills, scratch, and word of when the device is done. One queue a stream.
// Knows no Node, no kernel and no storage.
//
// Everything is called on the executor's thread unless it says otherwise. What a queue is asked for happens in the
// order of asking; a deferred queue (a GPU's) returns before it has happened.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "ops/backend.h"
#include "runtime/allocator.h"

namespace kg {

// Why a result is not valid: "[op] expected ..."; null where it is.
using Fault = std::shared_ptr<const std::string>;

// Launches that a device runs as one.
class DeviceGraph {
 public:
  virtual ~DeviceGraph() = default;
};

class DeviceQueue {
 public:
  // A kernel met a fault in its data; `ticket` is that of its launch. Called on the thread that calls `done`, before
  // it.
  using FaultHandler = std::function<void(uint32_t ticket, const std::string& reason)>;
  // Null, or why the copy failed. On the executor's thread or, deferred, on one thread of the queue; in order of
  // asking.
  using Done = std::function<void(Fault)>;
  // Gives cached memory back to the device that nothing executed so far, all of it done, uses; whether there was any.
  using Reclaim = std::function<bool()>;

  virtual ~DeviceQueue() = default;

  // Any thread; valid as long as the queue is.
  virtual MemorySource memory() = 0;
  // Whether work may still run after the call that asked for it has returned. Any thread.
  virtual bool deferred() const = 0;
  // Once, before anything else.
  virtual void start(FaultHandler, Reclaim) {}
  // Kernel `id` is about to be called.
  virtual void launching(KernelId, uint32_t /*ticket*/) {}
  // The bytes are taken before this returns.
  virtual void upload(char* to, const void* bytes, size_t count) = 0;
  // `to` must stay valid until done has been called. Calls done in any case, and throws nothing.
  virtual void download(void* to, const char* from, size_t count, Done done) = 0;
  virtual void fill(char* data, int byte, size_t count) = 0;
  // Grows only; the same block for every call.
  virtual void* scratch(size_t bytes) = 0;
  // Bytes of the device's memory that are outside of all storages: scratch, workspaces. Any thread.
  virtual size_t held() const = 0;
  // Makes a graph of what `launches` enqueues, which does not run, unless `graph` still is one of it. False where the
  // device has no such thing, or does not take these.
  virtual bool prepare(std::unique_ptr<DeviceGraph>& /*graph*/, const std::function<void()>& /*launches*/) {
    return false;
  }
  // Runs it. `ticket` is that of its first launch; the others follow.
  virtual void replay(DeviceGraph&, uint32_t /*ticket*/) {}
  // Waits for the device, and for every `done`. After the executor has ended; throws nothing.
  virtual void finish() {}
};

// The CPU's queue: everything has happened when a call returns.
std::unique_ptr<DeviceQueue> makeHostQueue();

}  // namespace kg
