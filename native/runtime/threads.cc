#include "runtime/threads.h"

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace kg {
namespace {

KG_INLINE void cpuRelax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Long enough to bridge the gap between two kernels of a step, short enough not to burn a core.
constexpr int kSpins = 4000;

thread_local int currentWorker = -1;  // >= 0 while inside a parallel region

int defaultThreads() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

// One parallel region at a time. Threads join an open region by advancing its ticket and are waited for; a thread that
// wakes too late finds it closed and goes back to sleep, so a region never waits for a sleeper.
class Pool {
 public:
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleepMutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& t : threads_) t.join();
  }

  int size() const { return size_.load(std::memory_order_relaxed); }

  void resize(int n) {
    std::lock_guard<std::mutex> lock(region_);
    size_.store(n < 1 ? 1 : n > 256 ? 256 : n);
    while (static_cast<int>(threads_.size()) < size() - 1) {
      int worker = static_cast<int>(threads_.size()) + 1;
      threads_.emplace_back([this, worker] { work(worker); });
    }
  }

  void run(int64_t n, int64_t grain, RangeFn fn, void* context) {
    int threads = size();
    if (grain < 1) grain = 1;
    if (currentWorker >= 0 || threads == 1 || n <= grain || !region_.try_lock()) {
      int saved = currentWorker;
      if (saved < 0) currentWorker = 0;
      struct Restore {
        int saved;
        ~Restore() { currentWorker = saved; }
      } restore{saved};
      fn(context, 0, n, currentWorker);
      return;
    }
    std::lock_guard<std::mutex> lock(region_, std::adopt_lock);
    fn_ = fn;
    context_ = context;
    n_ = n;
    // Up to an eighth of a thread's share, which the others may have to wait for at the end; few ranges go one by one.
    int64_t most = n / (threads * 8);
    chunk_ = most > grain ? most : grain;
    limit_.store(threads - 1, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    error_ = nullptr;
    if (threads_.empty()) spawn();
    uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(epoch << 32, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> sleepLock(sleepMutex_);
      wake_.notify_all();
    }
    drain(0);
    uint64_t closed = ticket_.fetch_or(kClosed, std::memory_order_acq_rel);
    int joined = static_cast<int>(closed & kCount);
    for (int spins = 0; finished_.load(std::memory_order_acquire) < joined; spins++) {
      if (spins < kSpins)
        cpuRelax();
      else
        std::this_thread::yield();
    }
    if (error_) std::rethrow_exception(error_);
  }

  Pool() { size_.store(defaultThreads() < 1 ? 1 : defaultThreads()); }

 private:
  static constexpr uint64_t kClosed = 1ull << 31;
  static constexpr uint64_t kCount = kClosed - 1;

  void spawn() {
    for (int worker = 1; worker < size(); worker++) threads_.emplace_back([this, worker] { work(worker); });
  }

  void drain(int worker) {
    currentWorker = worker;
    try {
      for (;;) {
        int64_t begin = next_.fetch_add(chunk_, std::memory_order_relaxed);
        if (begin >= n_) break;
        fn_(context_, begin, begin + chunk_ < n_ ? begin + chunk_ : n_, worker);
      }
    } catch (...) {
      next_.store(n_, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(errorMutex_);
      if (!error_) error_ = std::current_exception();
    }
    currentWorker = -1;
  }

  bool join(uint64_t seen) {
    uint64_t t = seen;
    while ((t >> 32) == (seen >> 32) && !(t & kClosed) &&
           static_cast<int>(t & kCount) < limit_.load(std::memory_order_relaxed))
      if (ticket_.compare_exchange_weak(t, t + 1, std::memory_order_acq_rel)) return true;
    return false;
  }

  void work(int worker) {
    uint64_t seenEpoch = 0;
    for (;;) {
      uint64_t t = ticket_.load(std::memory_order_acquire);
      for (int spins = 0; (t >> 32) == seenEpoch && spins < kSpins; spins++) {
        cpuRelax();
        t = ticket_.load(std::memory_order_acquire);
      }
      if ((t >> 32) == seenEpoch) {
        std::unique_lock<std::mutex> lock(sleepMutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return stop_ || (ticket_.load(std::memory_order_seq_cst) >> 32) != seenEpoch; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        if (stop_) return;
        t = ticket_.load(std::memory_order_acquire);
      }
      seenEpoch = t >> 32;
      if (worker < size() && join(t)) {
        drain(worker);
        finished_.fetch_add(1, std::memory_order_acq_rel);
      }
    }
  }

  std::mutex region_, sleepMutex_, errorMutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::atomic<int> size_{1}, finished_{0}, sleepers_{0}, limit_{0};
  std::atomic<uint64_t> ticket_{kClosed};  // epoch in the upper half, closed bit, number of joined threads
  std::atomic<int64_t> next_{0};
  RangeFn fn_ = nullptr;
  void* context_ = nullptr;
  int64_t n_ = 0, chunk_ = 1;
  std::exception_ptr error_;
  bool stop_ = false;
};

// Never destroyed: kernels of another environment may still run while the process exits.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

int threadCount() { return pool().size(); }
void setThreadCount(int n) { pool().resize(n); }

void parallelForRaw(int64_t n, int64_t grain, RangeFn fn, void* context) {
  if (n > 0) pool().run(n, grain, fn, context);
}

}  // namespace kg
