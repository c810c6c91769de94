// Page-locked host memory for copies, in blocks that are used again: locking pages costs more than most copies. Blocks
// are taken on the executor's thread and given back on the completion thread; when all is in use, taking waits.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <map>
#include <mutex>
#include <vector>

namespace kg::cuda {

struct PinnedBlock {
  char* data = nullptr;
  size_t size = 0;
};

class PinnedPool {
 public:
  static constexpr size_t kLargest = size_t(4) << 20;    // of a block
  static constexpr size_t kCapacity = size_t(32) << 20;  // of all blocks in use

  ~PinnedPool();
  // bytes <= kLargest. Throws when the host has no memory to lock.
  PinnedBlock take(size_t bytes);
  void give(PinnedBlock block);

 private:
  char* lock(size_t bytes);
  void releaseLarge();

  std::mutex mutex_;
  std::condition_variable given_;
  std::map<size_t, std::vector<char*>> free_;  // by size, a power of two
  std::vector<char*> slabs_;                   // small blocks are cut from these
  size_t large_ = 0, inUse_ = 0;               // bytes of blocks that are no slab's; of blocks handed out
};

}  // namespace kg::cuda
