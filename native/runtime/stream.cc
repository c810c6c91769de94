#include "runtime/stream.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "runtime/command.h"
#include "runtime/error.h"
#include "runtime/graph.h"

namespace kg {
namespace {

constexpr uint64_t kRingBytes = 8u << 20;
constexpr int kSpins = 3000;
// Kernels need the cores: whoever meets a full ring sleeps until half of it is done, not for every command.
constexpr std::chrono::milliseconds kRingPause(5);
constexpr uint64_t kLaunchesPerCheck = 1 << 14;  // a deferred queue is asked for faults this often, read or not
constexpr unsigned char kGuardByte = 0xcb;       // as float32 about -2.7e7, never a plausible value

KG_INLINE void cpuRelax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

size_t roundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

Fault faultOf(const KernelInfo& info, const std::string& reason) {
  return std::make_shared<const std::string>(std::string("[") + info.name + "] " + reason);
}

// " (float32[2,3], none, int32[4])"
std::string shapesOf(const TensorView* tensors, int count) {
  std::string text;
  for (int i = 0; i < count; i++) {
    text += std::string(i ? ", " : " (") + dtypeName(tensors[i].dtype);
    if (!tensors[i].present()) continue;
    for (int axis = 0; axis < tensors[i].ndim; axis++)
      text += (axis ? "," : "[") + std::to_string(tensors[i].shape[axis]);
    text += tensors[i].ndim ? "]" : "[]";
  }
  return text + ")";
}

}  // namespace

// Bytes on their way from another stream.
struct Stream::Transfer {
  explicit Transfer(size_t count) : bytes(new (std::nothrow) char[count]) {
    if (!bytes) fail("out of host memory: %zu bytes between two devices", count);
  }
  void arrive(Fault found) {
    std::lock_guard<std::mutex> lock(mutex);
    fault = std::move(found);
    arrived = true;
    wake.notify_all();
  }
  Fault await() {
    std::unique_lock<std::mutex> lock(mutex);
    wake.wait(lock, [&] { return arrived; });
    return fault;
  }

  std::unique_ptr<char[]> bytes;
  std::mutex mutex;
  std::condition_variable wake;
  bool arrived = false;
  Fault fault;
};

Stream::Stream(const KernelTable& kernels, const KernelInfo* infos, std::unique_ptr<DeviceQueue> queue, Allocation mode)
    : kernels_(kernels),
      infos_(infos),
      queue_(std::move(queue)),
      deferred_(queue_->deferred()),
      storages_(queue_->memory(), *this, mode),
      ring_(new char[kRingBytes]) {
  executor_ = std::thread([this] { executorLoop(); });
}

Stream::~Stream() {
  stop_.store(true);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  executor_.join();
  queue_->finish();  // nothing calls back from here on
}

Stream::Header* Stream::reserve(size_t bytes) {
  bytes = roundUp(bytes, 64);
  if (bytes > kRingBytes / 2) fail("a command of %zu bytes does not fit the queue", bytes);
  uint64_t at = written_.load(std::memory_order_relaxed);
  uint64_t room = kRingBytes - at % kRingBytes;
  auto waitFor = [&](uint64_t end) {  // the ring pushes back
    if (end - consumed_.load(std::memory_order_acquire) <= kRingBytes) return;
    while (end - consumed_.load(std::memory_order_acquire) > kRingBytes / 2) std::this_thread::sleep_for(kRingPause);
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
  record(h, owners);
  publish(h);
  settle();
}

void Stream::settle() {
  if (!synchronous_) return;
  synchronize();
  if (Fault fault = takeFault()) fail("%s", fault->c_str());
}

Stream::Header* Stream::reserveUpload(Storage* to, size_t offset, void* host, size_t count, size_t inlined) {
  refuseInGraph("data from the host");
  Header* h = reserve(sizeof(Header) + inlined);
  h->kind = Kind::Upload;
  h->owner = Owner::of(to, count);
  h->data = to->data + offset;
  h->count = count;
  h->host = host;
  h->file = nullptr;
  h->transfer = nullptr;
  return h;
}

void Stream::upload(Storage* to, size_t offset, const void* bytes, size_t count) {
  const bool inlined = count <= 4096;
  void* host = inlined ? nullptr : malloc(count);
  if (!inlined && !host) fail("out of host memory: %zu bytes to stage an upload", count);
  Header* h = reserveUpload(to, offset, host, count, inlined ? count : 0);
  memcpy(inlined ? static_cast<void*>(h + 1) : host, bytes, count);
  publish(h);
}

void Stream::uploadMapped(Storage* to, size_t offset, std::shared_ptr<const Mapping> file, size_t fileOffset,
                          size_t count) {
  Header* h = reserveUpload(to, offset, static_cast<char*>(file->data) + fileOffset, count);
  h->file = new std::shared_ptr<const Mapping>(std::move(file));
  publish(h);
}

void Stream::transfer(Storage* to, Stream& source, Storage* from, size_t fromOffset) {
  refuseInGraph("data from another device");
  auto way = std::make_shared<Transfer>(to->bytes);
  source.download(from, fromOffset, way->bytes.get(), to->bytes, [way](Fault fault) { way->arrive(std::move(fault)); });
  Header* h = reserveUpload(to, 0, way->bytes.get(), to->bytes);
  h->transfer = new std::shared_ptr<Transfer>(std::move(way));
  publish(h);
}

void Stream::download(Storage* from, size_t offset, void* to, size_t count, std::function<void(Fault)> done) {
  refuseInGraph("a read of data");
  Header* h = reserve(sizeof(Header));
  h->kind = Kind::Download;
  h->owner = Owner::of(from, count);
  h->data = from ? from->data + offset : nullptr;
  h->count = count;
  h->host = to;
  h->done = new std::function<void(Fault)>(std::move(done));
  publish(h);
}

Fault Stream::read(Storage* from, size_t offset, void* to, size_t count) {
  std::atomic<bool> arrived{false};
  Fault fault;
  download(from, offset, to, count, [&](Fault f) {
    fault = std::move(f);
    arrived.store(true, std::memory_order_release);
  });
  awaitIdle([&] { return arrived.load(std::memory_order_acquire); });
  return fault;
}

void Stream::filled(char* data, size_t bytes) {
  Header* h = reserve(sizeof(Header));
  h->kind = Kind::Fill;
  h->tensorCount = 0;
  h->data = data;
  h->count = bytes;
  record(h, nullptr);
  publish(h);
}

void Stream::check(char* data, size_t bytes) {
  Header* h = reserve(sizeof(Header));
  h->kind = Kind::Check;
  h->data = data;
  h->count = bytes;
  publish(h);
}

// Commands, when they have been executed, and reads, when they have arrived, end with wakeWaiters().
void Stream::awaitIdle(const std::function<bool()>& done) {
  for (int spins = 0; spins < kSpins; spins++) {
    if (done()) return;
    cpuRelax();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  idle_.wait(lock, done);
}

void Stream::wakeWaiters() {
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.notify_all();
}

void Stream::synchronize() {
  if (!deferred_) {
    const uint64_t target = written_.load(std::memory_order_relaxed);
    return awaitIdle([&] { return consumed_.load(std::memory_order_acquire) >= target; });
  }
  std::atomic<bool> arrived{false};
  Header* h = reserve(sizeof(Header));
  h->kind = Kind::Fence;
  h->done = new std::function<void(Fault)>([&](Fault) { arrived.store(true, std::memory_order_release); });
  publish(h);
  awaitIdle([&] { return arrived.load(std::memory_order_acquire); });
}

Fault Stream::takeFault() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::move(pendingFault_ ? pendingFault_ : deviceFault_);
}

// Those alone that a read has brought: pending ones may be of commands that came after it.
Fault Stream::takeDeviceFault() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::move(deviceFault_);
}

// The next read would report it after whoever caught the error has made room. What the op has not computed stays
// marked.
void Stream::outOfMemory() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (pendingFault_ && pendingFault_->find("] out of memory") != std::string::npos) pendingFault_.reset();
}

void Stream::report(Fault fault) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!pendingFault_) pendingFault_ = std::move(fault);
}

void Stream::reportDeviceFault(Fault fault) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!deviceFault_) deviceFault_ = std::move(fault);
}

std::unique_lock<std::mutex> Stream::lockFaults() {
  return deferred_ ? std::unique_lock<std::mutex>(faultMutex_) : std::unique_lock<std::mutex>();
}

void Stream::executorLoop() {
  queue_->start([this](uint32_t ticket, const std::string& reason) { deviceFault(ticket, reason); },
                [this] { return storages_.reclaim(consumed_.load(std::memory_order_relaxed)) > 0; });
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
    if (awaited || written_.load(std::memory_order_acquire) == at + bytes) wakeWaiters();
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
      return executeUpload(h);
    case Kind::Download:
    case Kind::Fence:
      return executeDownload(h);
    case Kind::Fill:
      return queue_->fill(h->data, kGuardByte, h->count);
    case Kind::Check:
      return executeCheck(h);
    case Kind::Replay:
      return executeReplay(*h->graph);
  }
}

void Stream::executeUpload(Header* h) {
  std::unique_ptr<std::shared_ptr<const Mapping>> file(h->file);
  std::unique_ptr<std::shared_ptr<Transfer>> transfer(h->transfer);
  Fault fault = transfer ? (*transfer)->await() : nullptr;
  if (!fault) {
    try {
      queue_->upload(h->data, h->host ? h->host : static_cast<void*>(h + 1), h->count);
    } catch (const std::exception& e) {
      fault = std::make_shared<const std::string>(std::string("[upload] ") + e.what());
      report(fault);
    }
  }
  if (!file && !transfer) free(h->host);
  auto lock = lockFaults();
  if (deferred_) log_.written(h->owner);
  fault ? h->owner.mark(fault) : h->owner.heal();
}

void Stream::executeDownload(Header* h) {
  std::shared_ptr<std::function<void(Fault)>> done(h->done);
  if (h->kind == Kind::Fence) return fence(std::move(done));
  Fault earlier = takeFault();
  if (!deferred_) {
    Fault fault = h->owner.fault();
    if (!fault) fault = earlier;
    return queue_->download(h->host, h->data, fault ? 0 : h->count, [&](Fault) { (*done)(fault); });
  }
  auto read = enterRead(h->owner);
  queue_->download(h->host, h->data, h->count, [this, read, earlier, done](Fault failure) {
    Fault fault = leaveRead(*read), found = takeDeviceFault();
    for (const Fault& other : {earlier, found, failure})
      if (!fault) fault = other;
    (*done)(fault);
    wakeWaiters();
  });
}

// A deferred queue has done, and told of the faults of, everything before.
void Stream::fence(std::shared_ptr<std::function<void(Fault)>> done) {
  auto read = enterRead({nullptr, 0, false});
  queue_->download(nullptr, nullptr, 0, [this, read, done](Fault failure) {
    if (Fault fault = leaveRead(*read); !fault && failure) report(failure);
    if (done) (*done)(nullptr);
    wakeWaiters();
  });
}

std::shared_ptr<FaultLog::Read> Stream::enterRead(const Owner& owner) {
  auto lock = lockFaults();
  return log_.read(owner);
}

Fault Stream::leaveRead(const FaultLog::Read& read) {
  auto lock = lockFaults();
  log_.forget(read.sequence);
  return read.fault;
}

// On the thread of a deferred queue, before the read that brought the news is done.
void Stream::deviceFault(uint32_t ticket, const std::string& reason) {
  auto lock = lockFaults();
  const char* op = log_.kernelOf(ticket);
  Fault fault = std::make_shared<const std::string>(op ? std::string("[") + op + "] " + reason : reason);
  log_.fail(ticket, fault);
  reportDeviceFault(fault);
}

void Stream::executeCheck(Header* h) {
  constexpr size_t zone = StorageTable::kGuard;
  auto zones = std::make_shared<std::array<unsigned char, 2 * zone>>();
  const size_t inner = h->count - 2 * zone;
  queue_->download(zones->data(), h->data, zone, [](Fault) {});
  queue_->download(zones->data() + zone, h->data + zone + inner, zone, [this, zones, inner](Fault failure) {
    if (failure || std::all_of(zones->begin(), zones->end(), [](unsigned char b) { return b == kGuardByte; })) return;
    reportDeviceFault(std::make_shared<const std::string>("[memory] a kernel wrote outside of a buffer of " +
                                                          std::to_string(inner) + " bytes"));
  });
}

void Stream::executeKernel(Header* h) {
  const KernelInfo& info = infos_[static_cast<int>(h->kernel)];
  Fault fault = enterKernel(info, h);
  if (!fault) {
    try {
      return callKernel(h);
    } catch (const OutOfMemory& e) {
      fault = faultOf(info, storages_.explain(e.bytes, e.purpose) + shapesOf(h->tensors(), h->tensorCount));
    } catch (const std::exception& e) {
      fault = faultOf(info, e.what());
    }
    report(fault);
  }
  auto lock = lockFaults();
  markOutputs(h, fault);
}

void Stream::callKernel(Header* h) {
  Call call{h->tensors(), h->tensorCount, h->attributes(), h->attributeCount, this};
  Kernel kernel = kernels_.kernels[static_cast<int>(h->kernel)];
  if (!kernel) fail("has no %s kernel in this build", kernels_.name);
  kernel(call);
}

void Stream::markOutputs(Header* h, const Fault& fault) {
  const KernelInfo& info = infos_[static_cast<int>(h->kernel)];
  if (info.inPlace) return;
  for (int i = 0; i < info.outputs; i++)
    if (h->owners()[i].valid()) h->owners()[i].mark(fault);
}

void Stream::countLaunches(uint64_t count) {
  const uint64_t before = std::exchange(launches_, launches_ + count);
  if (deferred_ && before / kLaunchesPerCheck != launches_ / kLaunchesPerCheck) fence(nullptr);
}

// The fault of what the kernel reads, if there is one; otherwise its outputs count as written.
Fault Stream::enterKernel(const KernelInfo& info, Header* h) {
  const Owner* owners = h->owners();
  countLaunches(1);
  auto lock = lockFaults();
  if (deferred_) queue_->launching(h->kernel, log_.launched(info, owners, h->tensorCount));
  for (int i = 0; i < h->tensorCount; i++)
    if (info.reads(i))
      if (Fault fault = owners[i].fault()) return fault;
  for (int i = 0; i < info.outputs; i++)
    if (owners[i].valid()) owners[i].heal();
  return nullptr;
}

void* scratch(const Call& call, size_t bytes) { return call.stream->queue().scratch(bytes); }

}  // namespace kg
