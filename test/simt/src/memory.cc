#include "memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>

#include "report.h"
#include "sanitizers.h"
#include "settings.h"

namespace simt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kGap = 8 * kPage;  // without rights, after each allocation
constexpr size_t kAlignment = 256;  // as cudaMalloc's
constexpr int kUnknown = 0xff;      // NaN as float, bfloat16 and double; -1 as an integer
constexpr size_t kZone = size_t{64} << 30;
constexpr size_t kRange = 2 * kZone;
// Changing the rights of so many pages at every wait would cost more than all kernels: large allocations stay open.
constexpr size_t kLarge = size_t{1} << 20;
constexpr size_t kRemembered = 1024;  // freed allocations that messages still know

// Between allocations lies a file of no bytes: whoever goes there gets SIGBUS whatever the rights, so that one call can
// change the rights of all device memory.
struct Allocation {
  char *region, *begin, *end, *regionEnd;  // region: whole pages; [begin, end): what was asked for
  size_t serial;
};

// Addresses are used again only after all others of the window, so that pointers into freed memory stay bad for long.
// A window that is full grows; a small one is quick to change the rights of.
struct Zone {
  char *begin, *next;
  size_t window;
};

size_t roundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Never destroyed: threads of the process may outlive static objects.
struct Device {
  std::mutex mutex;
  char* base = nullptr;
  Zone zones[2];                     // small and large allocations
  std::map<char*, Allocation> live;  // by region
  std::deque<Allocation> freed;
  std::map<char*, size_t> pinned;
  size_t inUse = 0, serial = 0;
  int open = 0;
};
Device& device() {
  static Device& d = *new Device;
  return d;
}

int emptyFile() {
  static const int file = memfd_create("keelgrad-simt-nothing", MFD_CLOEXEC);
  return file;
}

void reserveRange(Device& d) {
  int flags = MAP_SHARED | MAP_NORESERVE;
  void* wanted = nullptr;
  if (kRaceDetector) {  // the race detector knows a few ranges only
    wanted = reinterpret_cast<void*>(uint64_t{64} << 30);
    flags |= MAP_FIXED_NOREPLACE;
  }
  void* memory = mmap(wanted, kRange, PROT_NONE, flags, emptyFile(), 0);
  if (memory == MAP_FAILED) finding("no address space for device memory");
  d.base = static_cast<char*>(memory);
  d.zones[0] = {d.base, d.base + kGap, size_t{64} << 20};
  d.zones[1] = {d.base + kZone, d.base + kZone + kGap, kZone};
  watchFaults();
}

char* place(Device& d, Zone& zone, size_t bytes) {
  char* at = zone.next;
  for (int laps = 0;;) {
    if (at + bytes > zone.begin + zone.window) {
      if (++laps > 1) {
        if (zone.window == kZone) return nullptr;
        zone.window *= 2;
      }
      at = zone.begin + kGap;
    }
    auto after = d.live.lower_bound(at + bytes);
    if (after == d.live.begin()) return at;
    const Allocation& before = std::prev(after)->second;
    if (before.regionEnd + kGap <= at) return at;
    at = before.regionEnd + kGap;
  }
}

constexpr int kOpen = PROT_READ | PROT_WRITE;

void populate(const Allocation& a) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(a.region, static_cast<size_t>(a.regionEnd - a.region), kOpen, flags, -1, 0) == MAP_FAILED)
    finding("the host has no memory for an allocation of the device");
}

void abandon(Device& d, const Allocation& a) {
  mmap(a.region, static_cast<size_t>(a.regionEnd - a.region), PROT_NONE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED,
       emptyFile(), a.region - d.base);
}

// Of the small allocations.
void setAllRights(const Device& d, int rights) {
  const auto end = d.live.lower_bound(d.base + kZone);
  if (end == d.live.begin()) return;
  char* from = d.live.begin()->second.region;
  mprotect(from, static_cast<size_t>(std::prev(end)->second.regionEnd - from), rights);
}

// The live allocation whose region holds `at`, or the nearest below it.
const Allocation* liveAt(Device& d, const char* at) {
  auto after = d.live.upper_bound(const_cast<char*>(at));
  return after == d.live.begin() ? nullptr : &std::prev(after)->second;
}

bool untouched(const char* from, const char* to) {
  for (; from + 8 <= to; from += 8) {
    uint64_t word;
    __builtin_memcpy(&word, from, 8);
    if (word != ~uint64_t{0}) return false;
  }
  for (; from < to; from++)
    if (static_cast<unsigned char>(*from) != kUnknown) return false;
  return true;
}

}  // namespace

void* allocateDevice(size_t bytes) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  if (!d.base) reserveRange(d);
  if (bytes > settings().memory || d.inUse + bytes > settings().memory) return nullptr;
  const size_t padded = roundUp(bytes, kAlignment), pages = roundUp(padded, kPage);
  const bool large = bytes >= kLarge;
  Zone& zone = d.zones[large];
  char* region = place(d, zone, pages + kGap);
  if (!region) return nullptr;
  char* begin = region + pages - padded;  // the end against the gap
  const Allocation a{region, begin, begin + bytes, region + pages, d.serial++};
  populate(a);
  unpoison(region, pages);
  fill(region, kUnknown, pages);
  poison(region, static_cast<size_t>(begin - region));
  poison(a.end, static_cast<size_t>(a.regionEnd - a.end));
  if (settings().protect && d.open == 0 && !large) mprotect(region, pages, PROT_NONE);
  d.live.emplace(region, a);
  zone.next = a.regionEnd + kGap;
  d.inUse += bytes;
  return begin;
}

bool freeDevice(void* memory) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  const Allocation* found = liveAt(d, static_cast<char*>(memory));
  if (!found || found->begin != memory) return false;
  const Allocation a = *found;
  d.live.erase(a.region);
  abandon(d, a);
  poison(a.region, static_cast<size_t>(a.regionEnd - a.region));
  d.inUse -= static_cast<size_t>(a.end - a.begin);
  d.freed.push_back(a);
  if (d.freed.size() > kRemembered) d.freed.pop_front();
  return true;
}

void* allocatePinned(size_t bytes) {
  void* memory = aligned_alloc(kAlignment, roundUp(bytes ? bytes : 1, kAlignment));
  if (!memory) return nullptr;
  fill(memory, kUnknown, bytes);
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  d.pinned.emplace(static_cast<char*>(memory), bytes);
  return memory;
}

bool freePinned(void* memory) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  if (d.pinned.erase(static_cast<char*>(memory)) == 0) return false;
  free(memory);
  return true;
}

bool isPinned(const void* memory) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  auto after = d.pinned.upper_bound(static_cast<char*>(const_cast<void*>(memory)));
  if (after == d.pinned.begin()) return false;
  --after;
  return static_cast<const char*>(memory) <= after->first + after->second;
}

bool inDeviceRange(const void* address) {
  const Device& d = device();
  const char* at = static_cast<const char*>(address);
  return d.base && at >= d.base && at < d.base + kRange;
}

bool isDeviceMemory(const void* at, size_t bytes) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  const char* from = static_cast<const char*>(at);
  const Allocation* a = liveAt(d, from);
  return a && from >= a->begin && from + bytes <= a->end;
}

size_t deviceMemoryInUse() {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  return d.inUse;
}

void checkGuards(const char* after) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  for (const auto& entry : d.live) {
    const Allocation& a = entry.second;
    unpoison(a.region, static_cast<size_t>(a.begin - a.region));
    unpoison(a.end, static_cast<size_t>(a.regionEnd - a.end));
    const bool whole = untouched(a.region, a.begin) && untouched(a.end, a.regionEnd);
    poison(a.region, static_cast<size_t>(a.begin - a.region));
    poison(a.end, static_cast<size_t>(a.regionEnd - a.end));
    if (!whole)
      finding("out of bounds: %s wrote just before or after allocation %zu of %zu bytes", after, a.serial,
              static_cast<size_t>(a.end - a.begin));
  }
}

std::string describeAddress(const void* address) {
  Device& d = device();
  std::unique_lock<std::mutex> lock(d.mutex, std::try_to_lock);  // called from a signal handler as well
  const char* at = static_cast<const char*>(address);
  char text[160];
  const Allocation* a = liveAt(d, at);
  const bool isLive = a && at < a->regionEnd;
  for (auto f = d.freed.rbegin(); f != d.freed.rend() && !isLive; ++f)
    if (at >= f->region && at < f->regionEnd) {
      snprintf(text, sizeof text, "byte %td of allocation %zu of %td bytes, which was freed", at - f->begin, f->serial,
               f->end - f->begin);
      return text;
    }
  if (!a) return "before any allocation";
  const char* where = at < a->begin ? "before" : at < a->end ? "inside" : "after the end of";
  const ptrdiff_t distance = at < a->begin ? a->begin - at : at < a->end ? at - a->begin : at - a->end;
  snprintf(text, sizeof text, "%td bytes %s allocation %zu of %td bytes", distance, where, a->serial,
           a->end - a->begin);
  return text;
}

void DeviceAccess::open() {
  if (open_) return;
  open_ = true;
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  if (d.open++ == 0 && settings().protect) setAllRights(d, kOpen);
}

void DeviceAccess::close() {
  if (!open_) return;
  open_ = false;
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  if (--d.open == 0 && settings().protect) setAllRights(d, PROT_NONE);
}

}  // namespace simt
