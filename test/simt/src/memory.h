// Device memory: allocations with guard gaps in an address range of their own, without rights for the host unless the
// device works; pinned host memory; the shared memory of the running block.
#pragma once

#include <cstddef>
#include <string>

namespace simt {

void* allocateDevice(size_t bytes);  // nullptr: out of memory
bool freeDevice(void* memory);       // false: not an allocation
void* allocatePinned(size_t bytes);
bool freePinned(void* memory);
bool isPinned(const void* memory);
bool inDeviceRange(const void* address);
// Is [at, at + bytes) within one live allocation?
bool isDeviceMemory(const void* at, size_t bytes);
size_t deviceMemoryInUse();
// Finds writes outside of allocations that no page fault caught; `after` is who may have done it.
void checkGuards(const char* after);
// What is known of an address in the device's range: "24 bytes after an allocation of 64 bytes"...
std::string describeAddress(const void* address);

// Between open and close the device works: its memory can be accessed.
class DeviceAccess {
 public:
  DeviceAccess() = default;
  DeviceAccess(const DeviceAccess&) = delete;
  ~DeviceAccess() { close(); }
  void open();
  void close();

 private:
  bool open_ = false;
};

// ---- shared memory of the one block that runs
// Bytes that a launch of the kernel may ask for in its stead, from now on; false beyond what a block can have.
bool allowDynamicShared(const void* kernel, size_t bytes);
// The most that a launch of the kernel may ask for, as far as is known before it runs.
size_t dynamicSharedLimit(const void* kernel);
// Of the kernel's static arrays: a bound, raised by what launches were seen to use.
size_t staticSharedBound(const void* kernel);
void beginShared(const void* kernel, size_t dynamicBytes);  // for a launch
void resetShared();                                         // for a block of it: contents unknown (NaN), guards whole
void checkShared();                                         // after a block
unsigned char* dynamicShared();
void* staticShared(const void* tag, size_t bytes);
bool inSharedRange(const void* address);

}  // namespace simt
