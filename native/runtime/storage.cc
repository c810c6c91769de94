#include "runtime/storage.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "runtime/error.h"

namespace kg {
namespace {
constexpr double kIndexSpace = 16777216.0;  // 2^24 slots

double generationOf(double handle) { return static_cast<double>(static_cast<uint64_t>(handle / kIndexSpace)); }
double indexOf(double handle) { return handle - generationOf(handle) * kIndexSpace; }

// Counters that another thread changes need not fit together.
size_t excess(size_t all, size_t part) { return all - std::min(all, part); }
}  // namespace

Mapping::~Mapping() {
  if (data) munmap(data, bytes);
}

Storage& StorageTable::newSlot(double* handle) {
  uint32_t index;
  if (freeSlots_.empty()) {
    index = static_cast<uint32_t>(slots_.size());
    if (index >= kIndexSpace) fail("more than 16,777,216 live tensors; dispose of tensors or use scope()");
    slots_.emplace_back();
  } else {
    index = freeSlots_.back();
    freeSlots_.pop_back();
  }
  Storage& s = slots_[index];
  s.generation = (s.generation + 1) & 0xfffffff;
  s.references = 1;
  s.readOnly = false;
  s.index = index;
  counters_.storages++;
  *handle = index + s.generation * kIndexSpace;
  return s;
}

std::unique_lock<std::mutex> StorageTable::lockAllocator() {
  return mode_.shared ? std::unique_lock<std::mutex>(mutex_) : std::unique_lock<std::mutex>();
}

// Segments of their own sizes: a graph seldom needs a large one, and keeps what it has.
Pool::Pool(MemorySource source, bool direct)
    : source_{source.acquire, source.release, source.left, source.self, 0}, direct_(direct), allocator_(source_) {}

Pool::~Pool() {
  for (auto [memory, bytes] : gone_) source_.release(source_.self, memory, bytes);
}

void* Pool::allocate(size_t bytes) {
  return direct_ ? source_.acquire(source_.self, bytes) : allocator_.allocate(bytes);
}

// In the order of commands, so that whoever gets the memory next gets it next time too.
void Pool::release(void* memory, size_t bytes) {
  if (!direct_) return allocator_.release(memory, bytes, 0);
  gone_.emplace_back(memory, bytes);
}

std::shared_ptr<Pool> StorageTable::beginPool() { return pool_ = std::make_shared<Pool>(source_, mode_.direct); }

void StorageTable::letGo(std::shared_ptr<Pool>& pool) {
  if (pool.use_count() == 1) {
    hooks_.synchronize();  // commands in flight may still use the memory
    poolsReserved_ -= pool->reserved();
    freeSlots_.insert(freeSlots_.end(), pool->slots.begin(), pool->slots.end());
  }
  pool.reset();
}

void* StorageTable::allocate(size_t bytes) {
  if (pool_) {
    const size_t before = pool_->reserved();
    void* memory = pool_->allocate(bytes);
    poolsReserved_ += pool_->reserved() - before;
    return memory;
  }
  if (mode_.direct) return source_.acquire(source_.self, bytes);
  auto lock = lockAllocator();
  return allocator_.allocate(bytes);
}

void StorageTable::giveBack(const Storage& s, void* memory, size_t bytes) {
  if (s.pool) return s.pool->release(memory, bytes);
  if (mode_.direct) {
    hooks_.synchronize();
    return source_.release(source_.self, memory, bytes);
  }
  auto lock = lockAllocator();
  allocator_.release(memory, bytes, hooks_.position());
}

void StorageTable::failFor(size_t bytes) {
  hooks_.outOfMemory();
  fail("%s", explain(bytes, nullptr).c_str());
}

std::string StorageTable::explain(size_t bytes, const char* what) {
  constexpr double mib = 1 << 20;
  const auto& t = counters_.byTag;
  char device[224] = "";
  if (source_.left) {
    size_t free = 0, total = 0;
    source_.left(source_.self, &free, &total);
    const size_t graphs = excess(poolsReserved_, pooled_);
    snprintf(
        device, sizeof device,
        ", by kernels as scratch %.1f, in the cache for reuse %.1f, kept for graphs %.1f; the device has %.1f of %.1f "
        "MiB left",
        scratch() / mib, excess(reserved(), counters_.allocated + graphs) / mib, graphs / mib, free / mib, total / mib);
  }
  char text[768];
  snprintf(text, sizeof text,
           "out of memory: %.1f MiB asked for%s%s; held: weights %.1f, gradients %.1f, optimizer %.1f, cache %.1f, "
           "activations %.1f MiB%s; try a smaller batch, a shorter max length, or LoRA in place of full training",
           bytes / mib, what ? " as " : "", what ? what : "", t[1] / mib, t[2] / mib, t[3] / mib, t[4] / mib,
           t[0] / mib, device);
  return text;
}

char* StorageTable::obtain(size_t bytes) {
  size_t padded = mode_.guards ? bytes + 2 * kGuard : bytes;
  void* memory = allocate(padded);
  if (!memory) {
    if (trim()) memory = allocate(padded);
  }
  if (!memory) failFor(bytes);
  char* data = static_cast<char*>(memory);
  if (!mode_.guards) return data;
  hooks_.filled(data, padded);
  return data + kGuard;
}

double StorageTable::create(size_t bytes, Tag tag) {
  char* data = bytes ? obtain(bytes) : nullptr;
  double handle;
  Storage& s = newSlot(&handle);
  s.data = data;
  s.bytes = bytes;
  s.tag = tag;
  s.pool = pool_;
  counters_.allocated += bytes;
  if (s.pool) pooled_ += bytes;
  counters_.byTag[static_cast<int>(tag)] += bytes;
  if (counters_.allocated > counters_.peak) counters_.peak = counters_.allocated;
  return handle;
}

double StorageTable::map(const char* path) {
  auto mapping = std::make_shared<Mapping>();
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  struct stat info;
  if (fd < 0 || fstat(fd, &info) != 0) {
    int error = errno;
    if (fd >= 0) close(fd);
    fail("cannot open %s: %s", path, strerror(error));
  }
  mapping->bytes = static_cast<size_t>(info.st_size);
  if (mapping->bytes) {
    void* data = mmap(nullptr, mapping->bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data != MAP_FAILED) mapping->data = data;
  }
  close(fd);
  if (mapping->bytes && !mapping->data) fail("cannot map %s: %s", path, strerror(errno));
  double handle;
  Storage& s = newSlot(&handle);
  s.data = static_cast<char*>(mapping->data);
  s.bytes = mapping->bytes;
  s.readOnly = true;
  s.mapping = std::move(mapping);
  return handle;
}

Storage& StorageTable::at(double handle) {
  if (!(handle >= 0)) fail("unknown storage handle %.0f", handle);
  double generation = generationOf(handle), index = indexOf(handle);
  if (index >= static_cast<double>(slots_.size())) fail("unknown storage handle %.0f", handle);
  Storage& s = slots_[static_cast<size_t>(index)];
  if (s.references == 0 || s.generation != static_cast<uint32_t>(generation))
    fail("a tensor was used after it was disposed of");
  return s;
}

void StorageTable::release(Storage& s) {
  if (--s.references > 0) return;
  if (s.mapping) {
    hooks_.synchronize();  // a command in flight may still read the file
    s.mapping.reset();
  } else if (s.data) {
    if (mode_.guards) {
      hooks_.check(s.data - kGuard, s.bytes + 2 * kGuard);
      giveBack(s, s.data - kGuard, s.bytes + 2 * kGuard);
    } else {
      giveBack(s, s.data, s.bytes);
    }
    counters_.allocated -= s.bytes;
    if (s.pool) pooled_ -= s.bytes;
    counters_.byTag[static_cast<int>(s.tag)] -= s.bytes;
  }
  s.data = nullptr;
  counters_.storages--;
  if (!s.pool) return freeSlots_.push_back(s.index);
  s.pool->slots.push_back(s.index);
  auto pool = std::move(s.pool);
  letGo(pool);
}

size_t StorageTable::trim() {
  hooks_.synchronize();
  return reclaim(hooks_.position());
}

size_t StorageTable::reclaim(uint64_t position) {
  auto lock = lockAllocator();
  return allocator_.trim(position);
}

size_t StorageTable::reserved() {
  if (mode_.direct) return counters_.allocated;
  auto lock = lockAllocator();
  return allocator_.reserved() + poolsReserved_;
}

}  // namespace kg
