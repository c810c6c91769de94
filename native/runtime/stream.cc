#include "runtime/stream.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "runtime/error.h"

namespace kg {
namespace {

constexpr uint64_t kRingBytes = 8u << 20;
constexpr int kSpins = 3000;
constexpr unsigned char kGuardByte = 0xcb;  // as float32 about -2.7e7, never a plausible value

enum class Kind : uint32_t { Launch, Upload, Download, Fill, Check, Wrap };

KG_INLINE void cpuRelax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

size_t roundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

// A storage as a command saw it when it was enqueued: by the time it runs, the slot may have another tenant.
struct Stream::Owner {
  Storage* storage;  // nullptr when absent
  uint32_t generation;
  bool whole;  // the command covers all of its bytes

  bool valid() const { return storage != nullptr; }
  Fault fault() const { return valid() && storage->faultGeneration == generation ? storage->fault : nullptr; }
  void mark(Fault fault) const {
    storage->fault = std::move(fault);
    storage->faultGeneration = generation;
  }
  // After a command has written what it covers.
  void heal() const {
    if (whole && storage->fault && storage->faultGeneration == generation) storage->fault.reset();
  }
  static Owner of(Storage* storage, size_t bytes) {
    if (!storage) return {nullptr, 0, false};
    return {storage, storage->generation, bytes == storage->bytes};
  }
};

// A command in the ring: this header, then (Launch) tensors, owners, attributes; (Upload) a heap block or the bytes.
struct Stream::Header {
  uint64_t bytes;
  Kind kind;
  KernelId kernel;
  int32_t tensorCount, attributeCount;
  Owner owner;
  char* data;
  void* host;
  uint64_t count;
  std::function<void(Fault)>* done;

  TensorView* tensors() { return reinterpret_cast<TensorView*>(this + 1); }
  Owner* owners() { return reinterpret_cast<Owner*>(tensors() + tensorCount); }
  double* attributes() { return reinterpret_cast<double*>(owners() + tensorCount); }
};

Stream::Stream(const KernelTable& kernels, const KernelInfo* infos, MemorySource source, bool guards)
    : kernels_(kernels), infos_(infos), storages_(source, *this, guards), ring_(new char[kRingBytes]) {
  executor_ = std::thread([this] { executorLoop(); });
}

Stream::~Stream() {
  stop_.store(true);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  executor_.join();
  free(scratch_);
}

Stream::Header* Stream::reserve(size_t bytes) {
  bytes = roundUp(bytes, 64);
  if (bytes > kRingBytes / 2) fail("a command of %zu bytes does not fit the queue", bytes);
  uint64_t at = written_.load(std::memory_order_relaxed);
  uint64_t room = kRingBytes - at % kRingBytes;
  auto waitFor = [&](uint64_t end) {  // the ring pushes back
    for (int spins = 0; end - consumed_.load(std::memory_order_acquire) > kRingBytes; spins++)
      spins < kSpins ? cpuRelax() : std::this_thread::yield();
  };
  if (room < bytes) {
    waitFor(at + room);
    auto* wrap = reinterpret_cast<Header*>(ring_.get() + at % kRingBytes);
    wrap->kind = Kind::Wrap;
    wrap->bytes = room;
    publish(wrap);
    at += room;
  }
  waitFor(at + bytes);
  auto* header = reinterpret_cast<Header*>(ring_.get() + at % kRingBytes);
  header->bytes = bytes;
  return header;
}

void Stream::publish(Header* header) {
  written_.fetch_add(header->bytes, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst)) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_one();
  }
}

void Stream::launch(KernelId id, const TensorView* tensors, Storage* const* owners, int tensorCount,
                    const double* attributes, int attributeCount) {
  Header* h =
      reserve(sizeof(Header) + tensorCount * (sizeof(TensorView) + sizeof(Owner)) + attributeCount * sizeof(double));
  h->kind = Kind::Launch;
  h->kernel = id;
  h->tensorCount = tensorCount;
  h->attributeCount = attributeCount;
  memcpy(h->tensors(), tensors, tensorCount * sizeof(TensorView));
  for (int i = 0; i < tensorCount; i++)
    h->owners()[i] = Owner::of(owners[i], tensors[i].numel() * dtypeSize(tensors[i].dtype));
  memcpy(h->attributes(), attributes, attributeCount * sizeof(double));
  publish(h);
  if (!synchronous_) return;
  synchronize();
  if (Fault fault = takeFault()) fail("%s", fault->c_str());
}

void Stream::upload(Storage* to, size_t offset, const void* bytes, size_t count) {
  bool inlined = count <= 4096;
  Header* h = reserve(sizeof(Header) + (inlined ? count : 0));
  h->kind = Kind::Upload;
  h->owner = Owner::of(to, count);
  h->data = to->data + offset;
  h->count = count;
  h->host = inlined ? nullptr : malloc(count);
  if (!inlined && !h->host) fail("out of host memory: %zu bytes to stage an upload", count);
  memcpy(inlined ? static_cast<void*>(h + 1) : h->host, bytes, count);
  publish(h);
}

void Stream::download(Storage* from, size_t offset, void* to, size_t count, std::function<void(Fault)> done) {
  Header* h = reserve(sizeof(Header));
  h->kind = Kind::Download;
  h->owner = Owner::of(from, count);
  h->data = from ? from->data + offset : nullptr;
  h->count = count;
  h->host = to;
  h->done = new std::function<void(Fault)>(std::move(done));
  publish(h);
}

void Stream::filled(char* data, size_t bytes) {
  Header* h = reserve(sizeof(Header));
  h->kind = Kind::Fill;
  h->data = data;
  h->count = bytes;
  publish(h);
}

void Stream::check(char* data, size_t bytes) {
  Header* h = reserve(sizeof(Header));
  h->kind = Kind::Check;
  h->data = data;
  h->count = bytes;
  publish(h);
}

void Stream::synchronize() {
  uint64_t target = written_.load(std::memory_order_relaxed);
  for (int spins = 0; spins < kSpins; spins++) {
    if (consumed_.load(std::memory_order_acquire) >= target) return;
    cpuRelax();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  idle_.wait(lock, [&] { return consumed_.load(std::memory_order_acquire) >= target; });
}

Fault Stream::takeFault() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::move(pendingFault_);
}

void Stream::report(Fault fault) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!pendingFault_) pendingFault_ = std::move(fault);
}

void Stream::executorLoop() {
  for (;;) {
    uint64_t at = consumed_.load(std::memory_order_relaxed);
    for (int spins = 0; written_.load(std::memory_order_acquire) == at && spins < kSpins; spins++) cpuRelax();
    if (written_.load(std::memory_order_acquire) == at) {
      std::unique_lock<std::mutex> lock(mutex_);
      idle_.notify_all();
      sleeping_.store(true, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return stop_ || written_.load(std::memory_order_seq_cst) != at; });
      sleeping_.store(false, std::memory_order_relaxed);
      if (stop_ && written_.load() == at) return;
    }
    auto* header = reinterpret_cast<Header*>(ring_.get() + at % kRingBytes);
    uint64_t bytes = header->bytes;
    bool awaited = header->kind == Kind::Download;
    execute(header);
    consumed_.store(at + bytes, std::memory_order_release);
    if (awaited || written_.load(std::memory_order_acquire) == at + bytes) {
      std::lock_guard<std::mutex> lock(mutex_);
      idle_.notify_all();
    }
  }
}

void Stream::execute(Header* h) {
  switch (h->kind) {
    case Kind::Wrap:
      return;
    case Kind::Launch:
      if (!stop_) executeKernel(h);
      return;
    case Kind::Upload:
      memcpy(h->data, h->host ? h->host : static_cast<void*>(h + 1), h->count);
      free(h->host);
      h->owner.heal();
      return;
    case Kind::Download: {
      Fault earlier = takeFault();
      Fault fault = h->owner.fault();
      if (!fault) fault = earlier;
      if (!fault && h->count) memcpy(h->host, h->data, h->count);
      (*h->done)(fault);
      delete h->done;
      return;
    }
    case Kind::Fill:
      memset(h->data, kGuardByte, h->count);
      return;
    case Kind::Check:
      for (size_t i = 0; i < StorageTable::kGuard; i++) {
        unsigned char before = h->data[i], after = h->data[h->count - 1 - i];
        if (before == kGuardByte && after == kGuardByte) continue;
        report(std::make_shared<const std::string>("[memory] a kernel wrote outside of a buffer of " +
                                                   std::to_string(h->count - 2 * StorageTable::kGuard) + " bytes"));
        return;
      }
      return;
  }
}

void Stream::executeKernel(Header* h) {
  const KernelInfo& info = infos_[static_cast<int>(h->kernel)];
  const Owner* owners = h->owners();
  Fault fault;
  for (int i = 0; i < h->tensorCount && !fault; i++)
    if (i >= info.outputs || (info.accumulates >> i & 1)) fault = owners[i].fault();
  bool ran = false;
  if (!fault) {
    try {
      Call call{h->tensors(), h->tensorCount, h->attributes(), h->attributeCount, this};
      kernels_.kernels[static_cast<int>(h->kernel)](call);
      ran = true;
    } catch (const std::exception& e) {
      fault = std::make_shared<const std::string>(std::string("[") + info.name + "] " + e.what());
      report(fault);
    }
  }
  if (info.inPlace) return;
  for (int i = 0; i < info.outputs; i++) {
    if (!owners[i].valid()) continue;
    if (ran)
      owners[i].heal();
    else
      owners[i].mark(fault);
  }
}

void* Stream::scratch(size_t bytes) {
  if (bytes > scratchBytes_) {
    free(scratch_);
    size_t size = roundUp(bytes, 2u << 20);
    scratch_ = aligned_alloc(2u << 20, size);
    scratchBytes_ = scratch_ ? size : 0;
    if (!scratch_) fail("out of host memory: %zu bytes of scratch", bytes);
#ifdef MADV_HUGEPAGE
    madvise(scratch_, size, MADV_HUGEPAGE);
#endif
  }
  return scratch_;
}

void* scratch(const Call& call, size_t bytes) { return call.stream->scratch(bytes); }

}  // namespace kg
