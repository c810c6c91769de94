// The shared memory of the running block: static arrays with guards between them, then the dynamic part, which ends at
// a page without rights.
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
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
constexpr int kUnknown = 0xff;
// The race detector must not see two blocks at one shared address: each block has fresh memory there.
constexpr int kArenas = kRaceDetector ? 128 : 1;

struct StaticArray {
  const void* tag;
  size_t offset, bytes;
};

char* arenas = nullptr;
char* arena = nullptr;
int arenaIndex = 0;
std::vector<StaticArray>& arrays = *new std::vector<StaticArray>;
size_t dynamicBytes = 0, staticBytes = 0, staticEnd = 0;

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

}  // namespace

void beginShared(size_t bytes) {
  if (!arenas) {
    mapArenas();
    arena = arenas;
  }
  unpoison(arenas, kArena * kArenas);
  arrays.clear();
  dynamicBytes = bytes;
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
  if (staticBytes + dynamicBytes > sharedOptinLimit())
    finding("too much shared memory: %zu bytes of static arrays and %zu dynamic ones, %zu are the limit together",
            staticBytes, dynamicBytes, sharedOptinLimit());
  arrays.push_back(a);
  prepareStatic(a);
  return arena + a.offset;
}

bool inSharedRange(const void* address) {
  const char* at = static_cast<const char*>(address);
  return arenas && at >= arenas && at < arenas + kArena * kArenas;
}

}  // namespace simt
