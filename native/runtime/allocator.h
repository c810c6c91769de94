// A caching allocator for one stream. Freed memory is reused at once: commands run in the order in which they were
// enqueued, so whatever still reads the old contents runs before whatever writes the new ones. Memory therefore
// never goes back to the system while the stream may still use it: each free block knows the last command that may, and
// the caller waits for the device before trim(). Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <unordered_map>
#include <vector>

namespace kg {

// Where device memory comes from. acquire returns nullptr when there is none; `self` is handed to all.
struct MemorySource {
  void* (*acquire)(void* self, size_t bytes);
  void (*release)(void* self, void* memory, size_t bytes);
  // What the device has left, and has; may be null.
  void (*left)(void* self, size_t* free, size_t* total);
  void* self;
  // Requests from here on get a segment of just their size: where memory that is not touched is taken nevertheless, the
  // rest of a larger one would often lie idle.
  size_t exactFrom;
};

class CachingAllocator {
 public:
  explicit CachingAllocator(MemorySource source) : source_(source) {}
  ~CachingAllocator();
  CachingAllocator(const CachingAllocator&) = delete;

  // 64-byte aligned; nullptr when the source has no more. bytes > 0.
  void* allocate(size_t bytes);
  // bytes: as they were asked for. `position`: of the last command that may use the memory.
  void release(void* memory, size_t bytes, uint64_t position);
  // Gives segments back to the source that are wholly free since a command up to `position`; returns the number of
  // bytes.
  size_t trim(uint64_t position);
  size_t reserved() const { return reserved_; }

 private:
  struct Block {  // a piece of a segment; neighbours by address
    char* begin;
    size_t size;
    bool free;
    uint64_t position;      // since when it is free
    char *previous, *next;  // nullptr at the ends of the segment
    char* segment;
  };
  using FreeKey = std::pair<size_t, char*>;

  void* allocateLarge(size_t bytes);
  void releaseLarge(char* begin, uint64_t position);
  void* allocateSmall(int sizeClass);

  MemorySource source_;
  std::unordered_map<char*, Block> blocks_;
  std::set<FreeKey> free_;
  std::unordered_map<char*, size_t> segments_;
  std::vector<char*> smallFree_[64];
  size_t reserved_ = 0;
};

MemorySource hostMemory();

}  // namespace kg
