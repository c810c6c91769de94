// The CPU as a device: its memory is the host's, and its work is done when a call returns.
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "runtime/error.h"
#include "runtime/queue.h"

namespace kg {
namespace {

constexpr size_t kHugePage = 2u << 20;

class HostQueue final : public DeviceQueue {
 public:
  ~HostQueue() override { free(scratch_); }

  MemorySource memory() override { return hostMemory(); }
  bool deferred() const override { return false; }
  void upload(char* to, const void* bytes, size_t count) override { memcpy(to, bytes, count); }
  void download(void* to, const char* from, size_t count, Done done) override {
    if (count) memcpy(to, from, count);
    done(nullptr);
  }
  void fill(char* data, int byte, size_t count) override { memset(data, byte, count); }

  void* scratch(size_t bytes) override {
    if (bytes <= scratchBytes_) return scratch_;
    free(scratch_);
    scratchBytes_ = 0;
    const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    scratch_ = aligned_alloc(kHugePage, size);
    scratchBytes_ = scratch_ ? size : 0;
    if (!scratch_) throw OutOfMemory(size, "scratch for intermediate results");
#ifdef MADV_HUGEPAGE
    madvise(scratch_, size, MADV_HUGEPAGE);
#endif
    return scratch_;
  }
  size_t held() const override { return scratchBytes_; }

 private:
  void* scratch_ = nullptr;
  std::atomic<size_t> scratchBytes_{0};
};

}  // namespace

std::unique_ptr<DeviceQueue> makeHostQueue() { return std::make_unique<HostQueue>(); }

}  // namespace kg
