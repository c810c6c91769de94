// What a stream has recorded, to be run again: launches at fixed addresses, with everything that keeps those addresses
// theirs. JavaScript's thread owns it and drops it once the stream is done with it; what the executor needs is marked.
#pragma once

#include <atomic>
#include <memory>
#include <unordered_set>
#include <vector>

#include "runtime/command.h"

namespace kg {

class Graph {
 public:
  explicit Graph(std::shared_ptr<Pool> memory) : pool(std::move(memory)) {}

  void add(const Stream::Header& command) {
    const char* bytes = reinterpret_cast<const char*>(&command);
    commands_.insert(commands_.end(), bytes, bytes + command.bytes);
    launches_ += command.kind == Kind::Launch;
    others_ += command.kind != Kind::Launch;
  }
  // Whether the storage is from outside and was not known before: the graph then needs a reference to it.
  bool needs(Storage* storage) { return storage->pool != pool && held_.insert(storage).second; }

  template <class F>
  void forEach(F f) {
    for (size_t at = 0; at < commands_.size();) {
      auto* command = reinterpret_cast<Stream::Header*>(commands_.data() + at);
      f(command);
      at += command->bytes;
    }
  }

  uint32_t launches() const { return launches_; }
  // Otherwise guard zones are filled in between, by the host.
  bool launchesOnly() const { return others_ == 0; }
  const std::unordered_set<Storage*>& held() const { return held_; }

  std::shared_ptr<Pool> pool;           // of what was made while recording
  const char* refused = nullptr;        // what was asked for in between and cannot be recorded
  std::unique_ptr<DeviceGraph> device;  // the executor's
  int failures = 0;                     // to make that one; the executor's
  std::atomic<uint64_t> runs{0}, deviceRuns{0};

 private:
  std::vector<char> commands_;  // as they stood in the ring
  std::unordered_set<Storage*> held_;
  uint32_t launches_ = 0, others_ = 0;
};

}  // namespace kg
