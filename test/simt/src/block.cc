#include "block.h"

#include <pthread.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "report.h"
#include "sanitizers.h"
#include "settings.h"
#include "tensor_core.h"

namespace simt {

uint3 threadIndex{}, blockIndex{};
dim3 blockShape, gridShape;

namespace {

constexpr int kMaxThreads = 1024, kLanes = 32;

// A stack and what the sanitizers call it.
struct Flow {
  Context context;
  char* bottom = nullptr;  // nullptr: not started
  int stack = -1;
  void* fakeStack = nullptr;  // address sanitizer's
  void* race = nullptr;       // race detector's thread
};

enum class State : uint8_t { Ready, AtBarrier, AtCollective, Exited };
enum class Collective : uint8_t { Barrier, Exchange, Vote, LoadMatrices, MultiplyAccumulate };
const char* const kCollectiveNames[] = {"warp barrier", "shuffle", "vote", "matrix load", "mma"};

struct CopyQueue {
  std::vector<PendingCopy> copies;
  std::vector<size_t> groupEnds;
  size_t done = 0;
  void clear() {
    copies.clear();
    groupEnds.clear();
    done = 0;
  }
};

struct Thread {
  Flow flow;
  State state = State::Ready;
  int position = 0;  // in the order of the schedule
  Site site{nullptr, 0};
  // What it brought to the collective that it waits in, and what it takes away.
  Collective collective = Collective::Barrier;
  uint64_t bits = 0;
  int lane = 0;
  LaneOperands operands;
  CopyQueue copies;
};

struct Warp {
  int arrived = 0;
  uint32_t round = 0;
  char keys[2];  // for the race detector: two, so that a late leaver does not see the next round's arrivals
};

struct Block {
  const LaunchConfiguration* launch = nullptr;
  const std::function<void()>* body = nullptr;
  int threadCount = 0, exited = 0, waiting = 0;
  uint32_t round = 0;
  char keys[2], startKey, endKey, fenceKey;
  Thread threads[kMaxThreads];
  Warp warps[kMaxThreads / kLanes];
  int order[kMaxThreads];            // thread of each position
  uint64_t ready[kMaxThreads / 64];  // by position
  int cursor = 0;                    // first in, first out: the position after the last
  std::vector<int> freeStacks;
  int parity = 0;  // of the block, for the race detector
  void* races[2][kMaxThreads] = {};
  Thread* current = nullptr;
  Flow host;
  size_t hostStackBytes = 0;
  Random random{1};
  uint64_t launches = 0;
};

Block& block = *new Block;
bool running = false;
pthread_t runner;

// ---- switching
// -------------------------------------------------------------------------------------------------------
void transfer(Flow& from, Flow& to, bool forGood) {
#if defined(SIMT_ASAN)
  const size_t bytes = &to == &block.host ? block.hostStackBytes : kStackBytes;
  __sanitizer_start_switch_fiber(forGood ? nullptr : &from.fakeStack, to.bottom, bytes);
#elif defined(SIMT_TSAN)
  __tsan_switch_to_fiber(to.race, __tsan_switch_to_fiber_no_sync);
#endif
  (void)forGood;
  switchContext(from.context, to.context);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from.fakeStack, nullptr, nullptr);
#endif
}

void setReady(Thread& t) {
  t.state = State::Ready;
  block.ready[t.position >> 6] |= uint64_t{1} << (t.position & 63);
}
void setWaiting(Thread& t, State state, Site site) {
  t.state = state;
  t.site = site;
  block.ready[t.position >> 6] &= ~(uint64_t{1} << (t.position & 63));
}

int firstReady(int from) {
  const int words = (block.threadCount + 63) / 64;
  int w = from >> 6;
  if (w >= words) return -1;
  uint64_t bits = block.ready[w] & (~uint64_t{0} << (from & 63));
  while (!bits) {
    if (++w >= words) return -1;
    bits = block.ready[w];
  }
  return w * 64 + __builtin_ctzll(bits);
}

Thread* nextReady() {
  int position = -1;
  if (settings().order == Order::Fifo) {
    position = firstReady(block.cursor);
    if (position < 0) position = firstReady(0);
    block.cursor = position + 1;
  } else {
    position = firstReady(0);
  }
  return position < 0 ? nullptr : &block.threads[block.order[position]];
}

int indexOf(const Thread& t) { return static_cast<int>(&t - block.threads); }

void become(Thread& t) {
  block.current = &t;
  threadIndex.x = static_cast<unsigned>(indexOf(t));
}

void threadMain();

void takeStack(Thread& t) {
  if (kRaceDetector) {
    t.flow.stack = block.parity * kMaxThreads + indexOf(t);
    t.flow.race = block.races[block.parity][indexOf(t)];
  } else {
    t.flow.stack = block.freeStacks.back();
    block.freeStacks.pop_back();
  }
  t.flow.bottom = stackBottom(t.flow.stack);
  // Tops at different offsets of a page: at the same one, all threads would fight for a few lines of the caches.
  const size_t shift = static_cast<size_t>(t.flow.stack % 64) * 320 % 4096;
  prepareContext(t.flow.context, t.flow.bottom, kStackBytes - shift, threadMain);
}

void giveStack(Thread& t) {
  if (!kRaceDetector) block.freeStacks.push_back(t.flow.stack);
  t.flow.bottom = nullptr;
}

void start(Flow& from, Thread& t, bool forGood) {
  if (!t.flow.bottom) takeStack(t);
  become(t);
  transfer(from, t.flow, forGood);
}

// ---- what threads wait for
// -------------------------------------------------------------------------------------------
std::string describe(const Thread& t) {
  const int index = indexOf(t);
  char text[320];
  switch (t.state) {
    case State::AtBarrier:
      snprintf(text, sizeof text, "at the barrier %s:%d", t.site.file, t.site.line);
      break;
    case State::AtCollective:
      snprintf(text, sizeof text, "at the %s %s:%d of warp %d", kCollectiveNames[static_cast<int>(t.collective)],
               t.site.file, t.site.line, index / kLanes);
      break;
    case State::Exited:
      return "gone";
    case State::Ready:
      return "running";
  }
  return text;
}

// "threads 0-31 at the barrier a.cu:7; threads 32-63 gone"
std::string describeThreads() {
  std::string all;
  for (int from = 0; from < block.threadCount;) {
    const std::string what = describe(block.threads[from]);
    int to = from;
    while (to + 1 < block.threadCount && describe(block.threads[to + 1]) == what) to++;
    if (!all.empty()) all += "; ";
    all +=
        (from == to ? "thread " + std::to_string(from) : "threads " + std::to_string(from) + "-" + std::to_string(to)) +
        " " + what;
    from = to + 1;
  }
  return all;
}

bool sameSite(Site a, Site b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

void yield() {
  Thread& me = *block.current;
  Thread* next = nextReady();
  if (!next) finding("deadlock: %s", describeThreads().c_str());
  if (next != &me) start(me.flow, *next, false);
}

void exitThread(Thread& me) {
  happensBefore(&block.endKey);
  setWaiting(me, State::Exited, {nullptr, 0});
  me.copies.clear();
  block.exited++;
  if (block.waiting > 0) finding("a thread left while others wait at a barrier: %s", describeThreads().c_str());
}

// The life of a stack: one thread after the other.
void threadMain() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    Thread& me = *block.current;
    happensAfter(&block.startKey);
    (*block.body)();
    exitThread(me);
    Thread* next = nextReady();
    if (!next) {
      if (block.exited < block.threadCount) finding("deadlock: %s", describeThreads().c_str());
      giveStack(me);
      transfer(me.flow, block.host, true);
    } else if (next->flow.bottom || kRaceDetector) {
      giveStack(me);
      start(me.flow, *next, true);
    } else {  // no switch at all
      next->flow.stack = me.flow.stack;
      next->flow.bottom = me.flow.bottom;
      me.flow.bottom = nullptr;
      become(*next);
    }
  }
}

// ---- blocks
// ----------------------------------------------------------------------------------------------------------
void shuffleInts(int* begin, int count) {
  for (int i = count - 1; i > 0; i--) std::swap(begin[i], begin[block.random.below(static_cast<uint32_t>(i + 1))]);
}

// Random: whole warps in some order, lanes of each in some order: one warp runs as far as it can.
void orderThreads() {
  const int n = block.threadCount;
  for (int i = 0; i < n; i++) block.order[i] = settings().order == Order::Descending ? n - 1 - i : i;
  if (settings().order == Order::Random) {
    int warps[kMaxThreads / kLanes];
    for (int i = 0; i < n / kLanes; i++) warps[i] = i;
    shuffleInts(warps, n / kLanes);
    for (int i = 0; i < n; i++) block.order[i] = warps[i / kLanes] * kLanes + i % kLanes;
    for (int i = 0; i < n; i += kLanes) shuffleInts(block.order + i, kLanes);
  }
  for (int i = 0; i < n; i++) block.threads[block.order[i]].position = i;
}

void resetBlock() {
  block.exited = block.waiting = 0;
  block.cursor = 0;
  block.parity ^= 1;
  memset(block.ready, 0, sizeof block.ready);
  for (int i = 0; i < block.threadCount; i++) {
    Thread& t = block.threads[i];
    t.flow.bottom = nullptr;
    setReady(t);
#if defined(SIMT_TSAN)
    if (!block.races[block.parity][i]) block.races[block.parity][i] = __tsan_create_fiber(0);
#endif
  }
  for (Warp& w : block.warps) w.arrived = 0;
}

void runBlock() {
  if (settings().order == Order::Random) orderThreads();
  resetBlock();
  resetShared();
  start(block.host, *nextReady(), false);
  checkShared();
}

uint3 blockAt(uint64_t i) {
  const uint64_t x = gridShape.x, y = gridShape.y;
  return {static_cast<unsigned>(i % x), static_cast<unsigned>(i / x % y), static_cast<unsigned>(i / (x * y))};
}

std::vector<uint32_t> blockOrder(uint64_t count) {
  std::vector<uint32_t> order(count);
  for (uint64_t i = 0; i < count; i++)
    order[i] = static_cast<uint32_t>(settings().order == Order::Descending ? count - 1 - i : i);
  if (settings().order == Order::Random)
    for (uint64_t i = count - 1; i > 0; i--)
      std::swap(order[i], order[block.random.below(static_cast<uint32_t>(i + 1))]);
  return order;
}

void findHostStack() {
#if defined(SIMT_ASAN)
  thread_local char* bottom = nullptr;
  thread_local size_t bytes = 0;
  if (!bottom) {
    pthread_attr_t attributes;
    void* at = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &at, &bytes);
    pthread_attr_destroy(&attributes);
    bottom = static_cast<char*>(at);
  }
  block.host.bottom = bottom;
  block.hostStackBytes = bytes;
#elif defined(SIMT_TSAN)
  block.host.race = __tsan_get_current_fiber();
#endif
}

void beginKernel(const LaunchConfiguration& launch, const std::function<void()>& body) {
  watchFaults();
  findHostStack();
  runner = pthread_self();
  running = true;
  block.launch = &launch;
  block.body = &body;
  block.threadCount = static_cast<int>(launch.block.x);
  blockShape = launch.block;
  gridShape = launch.grid;
  block.random.state = settings().seed + block.launches++;
  if (block.freeStacks.empty())
    for (int i = kMaxThreads - 1; i >= 0; i--) block.freeStacks.push_back(i);
  orderThreads();
  beginShared(launch.kernel, launch.shared);
  happensBefore(&block.startKey);
}

// ---- collectives
// -----------------------------------------------------------------------------------------------------
void completeWarp(int first) {
  Thread* lanes = &block.threads[first];
  for (int i = 1; i < kLanes; i++)
    if (lanes[i].collective != lanes[0].collective || !sameSite(lanes[i].site, lanes[0].site))
      finding("divergent warp collective: lane 0 is %s, lane %d is %s", describe(lanes[0]).c_str(), i,
              describe(lanes[i]).c_str());
  switch (lanes[0].collective) {
    case Collective::Barrier:
      break;
    case Collective::Exchange: {
      uint64_t brought[kLanes];
      for (int i = 0; i < kLanes; i++) brought[i] = lanes[i].bits;
      for (int i = 0; i < kLanes; i++) lanes[i].bits = brought[lanes[i].lane];
      break;
    }
    case Collective::Vote: {
      uint64_t mask = 0;
      for (int i = 0; i < kLanes; i++) mask |= lanes[i].bits << i;
      for (int i = 0; i < kLanes; i++) lanes[i].bits = mask;
      break;
    }
    default: {
      LaneOperands* operands[kLanes];
      for (int i = 0; i < kLanes; i++) operands[i] = &lanes[i].operands;
      if (lanes[0].collective == Collective::LoadMatrices)
        distributeMatrices(operands);
      else
        multiplyTile(operands);
    }
  }
}

// Every lane of the warp comes by here; the last one does the work of all.
void collect(Collective collective, Site site) {
  Thread& me = *block.current;
  const int first = indexOf(me) & ~(kLanes - 1);
  Warp& warp = block.warps[first / kLanes];
  me.collective = collective;
  setWaiting(me, State::AtCollective, site);
  char* key = &warp.keys[warp.round & 1];
  if (collective == Collective::Barrier) happensBefore(key);
  if (++warp.arrived == kLanes) {
    completeWarp(first);
    warp.arrived = 0;
    warp.round++;
    for (int i = 0; i < kLanes; i++) setReady(block.threads[first + i]);
  }
  yield();
  if (collective == Collective::Barrier) happensAfter(key);
}

}  // namespace

void runKernel(const LaunchConfiguration& launch, const std::function<void()>& body) {
  beginKernel(launch, body);
  const uint64_t count = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  for (uint32_t i : blockOrder(count)) {
    blockIndex = blockAt(i);
    runBlock();
  }
  happensAfter(&block.endKey);
  checkGuards("this launch");
  running = false;
}

bool inKernel() { return running && pthread_equal(runner, pthread_self()); }

std::string whereNow() {
  if (!inKernel()) return "";
  char text[160];
  snprintf(text, sizeof text, ", block (%u, %u, %u), thread %u", blockIndex.x, blockIndex.y, blockIndex.z,
           threadIndex.x);
  return " in " + functionName(block.launch->kernel) + text;
}

void barrier(Site site) {
  Thread& me = *block.current;
  setWaiting(me, State::AtBarrier, site);
  block.waiting++;
  if (block.exited > 0) finding("a barrier after threads have left: %s", describeThreads().c_str());
  char* key = &block.keys[block.round & 1];
  happensBefore(key);
  if (block.waiting == block.threadCount) {
    for (int i = 0; i < block.threadCount; i++)
      if (!sameSite(block.threads[i].site, site)) finding("divergent barrier: %s", describeThreads().c_str());
    block.waiting = 0;
    block.round++;
    for (int i = 0; i < block.threadCount; i++) setReady(block.threads[i]);
  }
  yield();
  happensAfter(key);
}

void warpBarrier(Site site) { collect(Collective::Barrier, site); }

uint64_t exchange(uint64_t bits, int sourceLane, Site site) {
  Thread& me = *block.current;
  me.bits = bits;
  me.lane = sourceLane & (kLanes - 1);
  collect(Collective::Exchange, site);
  return me.bits;
}

uint32_t vote(bool predicate, Site site) {
  Thread& me = *block.current;
  me.bits = predicate ? 1 : 0;
  collect(Collective::Vote, site);
  return static_cast<uint32_t>(me.bits);
}

void loadMatrices(uint32_t* registers, const uint16_t* row, bool transposed, Site site) {
  Thread& me = *block.current;
  me.operands = {nullptr, registers, nullptr, row, transposed};
  collect(Collective::LoadMatrices, site);
}

void multiplyAccumulate(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  Thread& me = *block.current;
  me.operands = {d, const_cast<uint32_t*>(a), b, nullptr, false};
  collect(Collective::MultiplyAccumulate, site);
}

void fence() {
  happensBefore(&block.fenceKey);
  happensAfter(&block.fenceKey);
}

void* sharedArray(const void* tag, size_t bytes) { return staticShared(tag, bytes); }
unsigned char* dynamicSharedMemory() { return dynamicShared(); }

void checkAlignment(const void* address, size_t alignment, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % alignment == 0) return;
  finding("%s is not %zu-byte aligned: %p at %s:%d", what, alignment, address, site.file, site.line);
}

// ---- asynchronous copies
// ---------------------------------------------------------------------------------------------
bool deferCopy(const PendingCopy& copy) {
  if (settings().copies == Copies::Early) return false;
  if (settings().copies == Copies::Random && (block.random.next() & 1)) return false;
  block.current->copies.copies.push_back(copy);
  return true;
}

void commitCopies() {
  CopyQueue& queue = block.current->copies;
  queue.groupEnds.push_back(queue.copies.size());
}

bool takeCopy(int groupsInFlight, PendingCopy* copy) {
  CopyQueue& queue = block.current->copies;
  const int due = static_cast<int>(queue.groupEnds.size()) - groupsInFlight;
  if (due > 0 && queue.done < queue.groupEnds[static_cast<size_t>(due - 1)]) {
    *copy = queue.copies[queue.done++];
    return true;
  }
  if (queue.done == queue.copies.size() && groupsInFlight == 0) queue.clear();
  return false;
}

}  // namespace simt
