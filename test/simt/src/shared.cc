// The shared memory of the running block: static arrays with guards between them, then the dynamic part, which ends at
// a page without rights. And what each kernel may have of it: static and dynamic bytes together 48 KiB, unless its
// limit for dynamic ones was raised; then what a block can have. Static arrays are known when a kernel asks for them,
// so an excess of both together is found while it runs, where a GPU refuses the launch.
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "memory.h"
#include "report.h"
#include "sanitizers.h"
#include "settings.h"

namespace simt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStaticZone = 128 * 1024;
constexpr size_t kDynamicZone = 256 * 1024;
constexpr size_t kArena = kPage + kStaticZone + kDynamicZone + kPage;
constexpr size_t kGuard = 64;
constexpr size_t kAssumedStatic = 1024;  // of a kernel that has not run
constexpr int kUnknown = 0xff;
// The race detector must not see two blocks at one shared address: each block has fresh memory there.
constexpr int kArenas = kRaceDetector ? 128 : 1;

struct StaticArray {
  const void* tag;
  size_t offset, bytes;
};

struct KernelShared {
  size_t allowed = 0;  // dynamic bytes; 0: not raised
  size_t seen = 0;     // static bytes
};
// Never destroyed: threads of the process may outlive static objects.
struct KernelTable {
  std::mutex mutex;
  std::map<const void*, KernelShared> kernels;
};
KernelTable& kernelTable() {
  static KernelTable& table = *new KernelTable;
  return table;
}
KernelShared sharedOf(const void* kernel) {
  KernelTable& table = kernelTable();
  const std::lock_guard<std::mutex> lock(table.mutex);
  return table.kernels[kernel];
}

char* arenas = nullptr;
char* arena = nullptr;
int arenaIndex = 0;
std::vector<StaticArray>& arrays = *new std::vector<StaticArray>;
size_t dynamicBytes = 0, staticBytes = 0, staticEnd = 0;
const void* kernelNow = nullptr;
bool raised = false;  // the limit of kernelNow

size_t roundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

void mapArenas() {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (arenas ? MAP_FIXED : 0);
  void* memory = mmap(arenas, kArena * kArenas, PROT_NONE, flags, -1, 0);
  if (memory == MAP_FAILED) finding("no address space for shared memory");
  arenas = static_cast<char*>(memory);
  for (int i = 0; i < kArenas; i++)
    mprotect(arenas + i * kArena + kPage, kStaticZone + kDynamicZone, PROT_READ | PROT_WRITE);
}

char* dynamicEnd() { return arena + kPage + kStaticZone + kDynamicZone; }
char* dynamicBegin() { return dynamicEnd() - roundUp(dynamicBytes, 128); }

// [at, at + bytes) becomes a guard: never a part of an array.
void guard(char* at, size_t bytes) {
  fill(at, kUnknown, bytes);
  poison(at, bytes);
}

bool untouched(char* at, size_t bytes) {
  unpoison(at, bytes);
  for (size_t i = 0; i < bytes; i++)
    if (static_cast<unsigned char>(at[i]) != kUnknown) return false;
  return true;
}

void prepareStatic(const StaticArray& a) {
  fill(arena + a.offset, kUnknown, a.bytes);
  guard(arena + a.offset + a.bytes, kGuard);
}

void checkTogether() {
  const size_t limit = raised ? sharedOptinLimit() : kStaticSharedLimit;
  if (staticBytes + dynamicBytes <= limit) return;
  if (raised)
    finding("too much shared memory: %zu bytes of static arrays and %zu dynamic ones, %zu are the limit together",
            staticBytes, dynamicBytes, limit);
  finding(
      "too much shared memory without opt-in: %zu bytes of static arrays and %zu dynamic ones, %zu are the limit "
      "together; cudaFuncSetAttribute raises it",
      staticBytes, dynamicBytes, limit);
}

void noteStatic() {
  KernelTable& table = kernelTable();
  const std::lock_guard<std::mutex> lock(table.mutex);
  KernelShared& kernel = table.kernels[kernelNow];
  if (kernel.seen < staticBytes) kernel.seen = staticBytes;
}

}  // namespace

bool allowDynamicShared(const void* kernel, size_t bytes) {
  if (bytes + sharedOf(kernel).seen > sharedOptinLimit()) return false;
  KernelTable& table = kernelTable();
  const std::lock_guard<std::mutex> lock(table.mutex);
  table.kernels[kernel].allowed = bytes;
  return true;
}

size_t dynamicSharedLimit(const void* kernel) {
  const KernelShared shared = sharedOf(kernel);
  return shared.allowed ? shared.allowed : kStaticSharedLimit - shared.seen;
}

size_t staticSharedBound(const void* kernel) {
  const size_t seen = sharedOf(kernel).seen;
  return seen > kAssumedStatic ? seen : kAssumedStatic;
}

void beginShared(const void* kernel, size_t bytes) {
  if (!arenas) {
    mapArenas();
    arena = arenas;
  }
  unpoison(arenas, kArena * kArenas);
  arrays.clear();
  dynamicBytes = bytes;
  kernelNow = kernel;
  raised = sharedOf(kernel).allowed > 0;
  staticBytes = 0;
  staticEnd = kPage + kGuard;
}

void resetShared() {
  if (kRaceDetector) {
    arenaIndex = (arenaIndex + 1) % kArenas;
    if (arenaIndex == 0) mapArenas();
    arena = arenas + arenaIndex * kArena;
  }
  fill(dynamicBegin(), kUnknown, dynamicBytes);
  guard(dynamicBegin() - kGuard, kGuard);
  guard(dynamicBegin() + dynamicBytes, static_cast<size_t>(dynamicEnd() - dynamicBegin()) - dynamicBytes);
  guard(arena + kPage, kGuard);
  for (const StaticArray& a : arrays) prepareStatic(a);
}

void checkShared() {
  bool whole = untouched(arena + kPage, kGuard) && untouched(dynamicBegin() - kGuard, kGuard);
  char* end = dynamicBegin() + dynamicBytes;
  whole = whole && untouched(end, static_cast<size_t>(dynamicEnd() - end));
  for (const StaticArray& a : arrays) {
    if (untouched(arena + a.offset + a.bytes, kGuard)) continue;
    finding("out of bounds: the block wrote past a static shared array of %zu bytes", a.bytes);
  }
  if (!whole) finding("out of bounds: the block wrote outside of its %zu bytes of dynamic shared memory", dynamicBytes);
}

unsigned char* dynamicShared() { return reinterpret_cast<unsigned char*>(dynamicBegin()); }

void* staticShared(const void* tag, size_t bytes) {
  for (const StaticArray& a : arrays)
    if (a.tag == tag) return arena + a.offset;
  const StaticArray a{tag, staticEnd, bytes};
  staticBytes += roundUp(bytes, 16);
  staticEnd += roundUp(bytes + kGuard, 16);
  if (staticBytes > kStaticSharedLimit)
    finding("too much shared memory: %zu bytes of static arrays, %zu are the limit", staticBytes, kStaticSharedLimit);
  checkTogether();
  noteStatic();
  arrays.push_back(a);
  prepareStatic(a);
  return arena + a.offset;
}

bool inSharedRange(const void* address) {
  const char* at = static_cast<const char*>(address);
  return arenas && at >= arenas && at < arenas + kArena * kArenas;
}

}  // namespace simt
