#include "runtime/fault_log.h"

#include <unordered_map>

namespace kg {

// The storages that a fault has reached, at one place of the log.
class FaultLog::Taint {
 public:
  bool has(const Owner& owner) const {
    auto found = tainted_.find(owner.storage);
    return owner.valid() && found != tainted_.end() && found->second == owner.generation;
  }
  void add(const Owner& owner) {
    if (owner.valid()) tainted_[owner.storage] = owner.generation;
  }
  // A write ends it where it covers everything, or where the storage has a new tenant.
  void write(const Owner& owner) {
    if (owner.valid() && (owner.whole || !has(owner))) tainted_.erase(owner.storage);
  }
  void mark(const Fault& fault) const {
    for (auto [storage, generation] : tainted_) Owner{storage, generation, false}.mark(fault);
  }

 private:
  std::unordered_map<Storage*, uint32_t> tainted_;
};

uint32_t FaultLog::launched(const KernelInfo& info, const Owner* owners, int count) {
  entries_.push_back({next_, &info, nullptr, std::vector<Owner>(owners, owners + count)});
  return static_cast<uint32_t>(next_++);
}

void FaultLog::written(Owner owner) { entries_.push_back({next_++, nullptr, nullptr, {owner}}); }

std::shared_ptr<FaultLog::Read> FaultLog::read(Owner owner) {
  auto read = std::make_shared<Read>();
  read->sequence = next_;
  read->fault = owner.fault();
  entries_.push_back({next_++, nullptr, read, {owner}});
  return read;
}

const char* FaultLog::kernelOf(uint32_t ticket) const {
  for (const Entry& e : entries_)
    if (e.info && static_cast<uint32_t>(e.sequence) == ticket) return e.info->name;
  return nullptr;
}

void FaultLog::fail(uint32_t ticket, const Fault& fault) {
  Taint taint;
  bool found = false;
  for (const Entry& e : entries_) {
    if (!found && static_cast<uint32_t>(e.sequence) != ticket) continue;
    const int count = static_cast<int>(e.owners.size());
    if (e.read) {
      if (taint.has(e.owners[0]) && !e.read->fault) e.read->fault = fault;
    } else if (!e.info) {
      taint.write(e.owners[0]);
    } else {
      bool reached = !found;  // the launch itself
      for (int i = 0; i < count && !reached; i++) reached = e.info->reads(i) && taint.has(e.owners[i]);
      // An optimizer that ran on bad gradients has spoilt everything that it writes.
      const int outputs = e.info->inPlace ? (reached ? count : 0) : e.info->outputs;
      for (int i = 0; i < outputs; i++) reached ? taint.add(e.owners[i]) : taint.write(e.owners[i]);
    }
    found = true;
  }
  taint.mark(fault);
}

void FaultLog::forget(uint64_t sequence) {
  while (!entries_.empty() && entries_.front().sequence <= sequence) entries_.pop_front();
}

}  // namespace kg
