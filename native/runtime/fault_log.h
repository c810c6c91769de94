// Which storages a fault reaches that the device tells of late. A GPU finds an id out of range when JavaScript has long
// enqueued what depends on it: the log keeps what was enqueued since the last word from the device, and follows the
// fault through it, so that exactly the tensors are marked that the CPU would have marked.
//
// Holds no lock: the stream calls it under its own.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "runtime/queue.h"
#include "runtime/storage.h"

namespace kg {

struct KernelInfo {
  const char* name;
  int outputs;           // leading tensors that are written
  uint32_t accumulates;  // bit i: output i is read as well
  bool inPlace;          // writes among its inputs (optimizers); skipped by a fault, it leaves them valid

  bool reads(int tensor) const { return tensor >= outputs || (accumulates >> tensor & 1); }
};

// A storage as a command saw it when it was enqueued: by the time it runs, the slot may have another tenant.
struct Owner {
  Storage* storage;  // nullptr when absent
  uint32_t generation;
  bool whole;  // the command covers all of its bytes

  bool valid() const { return storage != nullptr; }
  Fault fault() const { return valid() && storage->faultGeneration == generation ? storage->fault : nullptr; }
  void mark(Fault fault) const {
    storage->fault = std::move(fault);
    storage->faultGeneration = generation;
  }
  // After a command has written what it covers.
  void heal() const {
    if (whole && storage->fault && storage->faultGeneration == generation) storage->fault.reset();
  }
  static Owner of(Storage* storage, size_t bytes) {
    if (!storage) return {nullptr, 0, false};
    return {storage, storage->generation, bytes == storage->bytes};
  }
};

class FaultLog {
 public:
  // A copy to the host on its way; `fault` is set when one reaches what it copies.
  struct Read {
    uint64_t sequence = 0;
    Fault fault;
  };

  // The next launch's ticket. Every launch, write and read of a deferred queue is entered when it is handed over.
  uint32_t launched(const KernelInfo& info, const Owner* owners, int count);
  void written(Owner owner);
  std::shared_ptr<Read> read(Owner owner);

  // The name of a launch's kernel; null when the log no longer has it.
  const char* kernelOf(uint32_t ticket) const;
  // Marks what the fault of a launch reaches: storages, and reads under way.
  void fail(uint32_t ticket, const Fault& fault);
  // The device is done with everything up to a read, and has told of its faults.
  void forget(uint64_t sequence);
  size_t size() const { return entries_.size(); }

 private:
  struct Entry {
    uint64_t sequence;
    const KernelInfo* info;      // null: a write or a read
    std::shared_ptr<Read> read;  // null: a launch or a write
    std::vector<Owner> owners;
  };
  class Taint;

  std::deque<Entry> entries_;
  uint64_t next_ = 1;
};

}  // namespace kg
