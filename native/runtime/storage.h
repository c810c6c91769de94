// Storages: blocks of device memory behind integer handles, with a reference count, a generation and a tag.
//
// A handle is index + generation * 2^24, so that a stale one is an error and not somebody else's memory. All methods
// are called on the thread that enqueues, but reclaim() and explain(); only `fault` belongs to the executor.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "runtime/allocator.h"

namespace kg {

// What an allocation is for; memory reports are by tag. The order is part of the boundary to JavaScript.
enum class Tag : uint8_t { Activation, Weight, Gradient, Optimizer, Cache, count };

// A file mapped read-only; unmapped when the last storage over it goes.
struct Mapping {
  void* data = nullptr;
  size_t bytes = 0;
  ~Mapping();
};

class Pool;

struct Storage {
  char* data = nullptr;
  size_t bytes = 0;
  uint32_t generation = 0;
  uint32_t references = 0;  // 0: the slot is free
  Tag tag = Tag::Activation;
  bool readOnly = false;
  std::shared_ptr<Mapping> mapping;
  uint32_t index = 0;          // of the slot
  std::shared_ptr<Pool> pool;  // whose memory it is; null: the table's
  // Why the contents are not valid, and of which tenant of the slot. The executor's (stream.h), not the table's.
  std::shared_ptr<const std::string> fault;
  uint32_t faultGeneration = 0;
};

// Counted by one thread; any may read it.
class Counter {
 public:
  operator size_t() const { return value_.load(std::memory_order_relaxed); }
  void operator+=(size_t n) { value_.store(*this + n, std::memory_order_relaxed); }
  void operator-=(size_t n) { value_.store(*this - n, std::memory_order_relaxed); }

 private:
  std::atomic<size_t> value_{0};
};

struct MemoryCounters {
  size_t storages = 0, peak = 0;
  Counter allocated, byTag[static_cast<int>(Tag::count)];
};

// What the table asks of its stream, in command order: fill and check guard zones.
struct StreamHooks {
  virtual void filled(char* data, size_t bytes) = 0;
  virtual void check(char* data, size_t bytes) = 0;
  virtual void synchronize() = 0;   // everything enqueued so far is done
  virtual uint64_t position() = 0;  // where the next command will be enqueued
  virtual void outOfMemory() = 0;   // an error is about to say so
  virtual size_t scratch() = 0;     // bytes that kernels hold, outside of the table
};

// How storages get memory.
struct Allocation {
  bool guards = false;  // zones around each, checked when it is freed
  bool direct = false;  // no cache: each storage is an allocation of the device's own, for memory checkers
  bool shared = false;  // reclaim() may be called
};

// Memory that commands use which are run again: nobody else gets it, nor the slots of its storages, until the pool
// goes.
class Pool {
 public:
  Pool(MemorySource source, bool direct);
  ~Pool();
  void* allocate(size_t bytes);
  void release(void* memory, size_t bytes);
  size_t reserved() const { return allocator_.reserved(); }

  std::vector<uint32_t> slots;  // of storages that are gone

 private:
  MemorySource source_;
  const bool direct_;
  CachingAllocator allocator_;
  std::vector<std::pair<void*, size_t>> gone_;  // direct ones: an address is not used twice
};

class StorageTable {
 public:
  StorageTable(MemorySource source, StreamHooks& hooks, Allocation mode)
      : source_(source), allocator_(source), hooks_(hooks), mode_(mode) {}

  // Throws Error("out of memory ...") with what is held by whom.
  double create(size_t bytes, Tag tag);
  double map(const char* path);
  void retain(double handle) { retain(at(handle)); }
  void release(double handle) { release(at(handle)); }
  void retain(Storage& s) { s.references++; }
  void release(Storage& s);
  // Storages made from here to endPool() are the pool's. It lives as long as they, or the caller, hold it.
  std::shared_ptr<Pool> beginPool();
  void endPool() { letGo(pool_); }
  void letGo(std::shared_ptr<Pool>& pool);
  // Throws on a stale or unknown handle.
  Storage& at(double handle);
  size_t trim();
  // For a kernel that finds no memory of its own: as trim(), of what only commands up to `position` may use. They are
  // done, on the device too. On any thread.
  size_t reclaim(uint64_t position);
  void resetPeak() { counters_.peak = counters_.allocated; }
  const MemoryCounters& counters() const { return counters_; }
  size_t reserved();
  size_t scratch() { return hooks_.scratch(); }

  // "out of memory: 8.0 MiB asked for as workspace of ...; held: ...": for tensors (what: null) and for kernels. On any
  // thread.
  std::string explain(size_t bytes, const char* what);

  static constexpr size_t kGuard = 64;  // bytes of guard zone on each side

 private:
  Storage& newSlot(double* handle);
  char* obtain(size_t bytes);
  [[noreturn]] void failFor(size_t bytes);
  void* allocate(size_t bytes);
  void giveBack(const Storage& s, void* memory, size_t bytes);

  std::unique_lock<std::mutex> lockAllocator();

  MemorySource source_;
  std::mutex mutex_;  // of the allocator, where reclaim() may be called
  CachingAllocator allocator_;
  std::shared_ptr<Pool> pool_;
  Counter pooled_, poolsReserved_;  // bytes of live storages in pools; of the pools
  StreamHooks& hooks_;
  Allocation mode_;
  std::deque<Storage> slots_;  // addresses are stable
  std::vector<uint32_t> freeSlots_;
  MemoryCounters counters_;
};

}  // namespace kg
