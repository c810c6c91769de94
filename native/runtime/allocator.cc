#include "runtime/allocator.h"

#include <sys/mman.h>

namespace kg {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t kSmallLimit = 4096;        // up to here: classes of 64 bytes, carved from chunks, never split
constexpr size_t kSmallChunk = 256 * 1024;  // a chunk is an ordinary large block
constexpr size_t kSegment = 32u << 20;      // the least that is asked of the source
constexpr size_t kHugePage = 2u << 20;

size_t roundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

void* acquireHost(void*, size_t bytes) {
  // Over-reserve by one huge page to align, then give the ends back: only aligned ranges get huge pages.
  size_t total = bytes + kHugePage;
  char* raw = static_cast<char*>(mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (raw == MAP_FAILED) return nullptr;
  char* begin = reinterpret_cast<char*>(roundUp(reinterpret_cast<uintptr_t>(raw), kHugePage));
  if (begin > raw) munmap(raw, begin - raw);
  size_t tail = raw + total - (begin + bytes);
  if (tail) munmap(begin + bytes, tail);
#ifdef MADV_HUGEPAGE
  madvise(begin, bytes, MADV_HUGEPAGE);
#endif
  return begin;
}

void releaseHost(void*, void* memory, size_t bytes) { munmap(memory, bytes); }

}  // namespace

MemorySource hostMemory() { return {acquireHost, releaseHost, nullptr, nullptr, kSegment}; }

CachingAllocator::~CachingAllocator() {
  for (auto& [begin, size] : segments_) source_.release(source_.self, begin, size);
}

void* CachingAllocator::allocate(size_t bytes) {
  if (bytes <= kSmallLimit) return allocateSmall(static_cast<int>((bytes - 1) / kAlign));
  return allocateLarge(roundUp(bytes, kAlign));
}

void* CachingAllocator::allocateSmall(int sizeClass) {
  auto& list = smallFree_[sizeClass];
  if (list.empty()) {
    char* chunk = static_cast<char*>(allocateLarge(kSmallChunk));
    if (!chunk) return nullptr;
    size_t size = (sizeClass + 1) * kAlign;
    for (size_t at = kSmallChunk / size; at-- > 0;) list.push_back(chunk + at * size);
  }
  char* block = list.back();
  list.pop_back();
  return block;
}

void* CachingAllocator::allocateLarge(size_t bytes) {
  auto found = free_.lower_bound({bytes, nullptr});
  if (found == free_.end()) {
    size_t size = bytes < source_.exactFrom ? kSegment : roundUp(bytes, kHugePage);
    char* segment = static_cast<char*>(source_.acquire(source_.self, size));
    if (!segment && size > roundUp(bytes, kHugePage))
      segment = static_cast<char*>(source_.acquire(source_.self, size = roundUp(bytes, kHugePage)));
    if (!segment) return nullptr;
    reserved_ += size;
    segments_[segment] = size;
    blocks_[segment] = {segment, size, true, 0, nullptr, nullptr, segment};
    found = free_.insert({size, segment}).first;
  }
  char* begin = found->second;
  free_.erase(found);
  Block& block = blocks_[begin];
  block.free = false;
  if (block.size - bytes >= kSmallLimit) {
    char* rest = begin + bytes;
    Block remainder{rest, block.size - bytes, true, block.position, begin, block.next, block.segment};
    if (block.next) blocks_[block.next].previous = rest;
    block.next = rest;
    block.size = bytes;
    free_.insert({remainder.size, rest});
    blocks_[rest] = remainder;  // may rehash: `block` is dead from here on
  }
  return begin;
}

void CachingAllocator::release(void* memory, size_t bytes, uint64_t position) {
  char* begin = static_cast<char*>(memory);
  if (bytes <= kSmallLimit)
    smallFree_[(bytes - 1) / kAlign].push_back(begin);
  else
    releaseLarge(begin, position);
}

void CachingAllocator::releaseLarge(char* begin, uint64_t position) {
  Block block = blocks_[begin];
  block.free = true;
  block.position = position;  // the latest: neighbours were freed before
  if (block.next && blocks_[block.next].free) {
    Block next = blocks_[block.next];
    free_.erase({next.size, next.begin});
    blocks_.erase(next.begin);
    block.size += next.size;
    block.next = next.next;
    if (block.next) blocks_[block.next].previous = block.begin;
  }
  if (block.previous && blocks_[block.previous].free) {
    Block previous = blocks_[block.previous];
    free_.erase({previous.size, previous.begin});
    blocks_.erase(block.begin);
    previous.size += block.size;
    previous.position = position;
    previous.next = block.next;
    if (previous.next) blocks_[previous.next].previous = previous.begin;
    block = previous;
  }
  blocks_[block.begin] = block;
  free_.insert({block.size, block.begin});
}

size_t CachingAllocator::trim(uint64_t position) {
  size_t bytes = 0;
  for (auto it = segments_.begin(); it != segments_.end();) {
    auto [begin, size] = *it;
    Block& block = blocks_[begin];
    if (block.free && block.size == size && block.position <= position) {
      free_.erase({size, begin});
      blocks_.erase(begin);
      source_.release(source_.self, begin, size);
      bytes += size;
      it = segments_.erase(it);
    } else {
      ++it;
    }
  }
  reserved_ -= bytes;
  return bytes;
}

}  // namespace kg
