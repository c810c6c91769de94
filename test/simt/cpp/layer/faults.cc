// Planted faults, one a run: `simt-faults <name>`. The layer must find each of them: by a finding, by an error code, or
// by a result that is not the right one or differs between schedules ("result <digest>", "right" where it is right).
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <thread>

#include "kit.h"

using namespace kg::cuda;
using kit::deviceBuffer;
using kit::hostCopy;
using kit::launch;

namespace {

constexpr int kThreads = 128;

// ---- memory
// ----------------------------------------------------------------------------------------------------------
KG_GLOBAL void writeAt(float* x, int64_t at) {
  if (threadIdx.x == 0) x[at] = 1;
}
KG_GLOBAL void readAt(const float* x, int64_t at, float* y) {
  if (threadIdx.x == 0) y[0] = x[at];
}
KG_GLOBAL void sharedWriteAt(int at, float* y) {
  float* s = reinterpret_cast<float*>(dynamicShared());
  s[threadIdx.x] = 1;
  if (threadIdx.x == 0) s[at] = 2;
  syncThreads();
  y[threadIdx.x] = s[threadIdx.x];
}
KG_GLOBAL void staticSharedWriteAt(int at, float* y) {
  KG_SHARED(float, s, kThreads);
  s[threadIdx.x] = 1;
  if (threadIdx.x == 0) s[at] = 2;
  syncThreads();
  y[threadIdx.x] = s[threadIdx.x];
}
KG_GLOBAL void tooManyStatics(float* y) {
  KG_SHARED(float, s, 12289);
  s[threadIdx.x] = y[threadIdx.x];
}
KG_GLOBAL void staticBesideDynamic(float* y) {  // 512 bytes
  KG_SHARED(float, s, kThreads);
  s[threadIdx.x] = 1;
  y[threadIdx.x] = s[threadIdx.x];
}
KG_GLOBAL void readUnwrittenShared(float* y) {
  KG_SHARED(float, s, kThreads);
  y[threadIdx.x] = s[threadIdx.x];
}
KG_GLOBAL void deepStack(float* y) {
  volatile float local[200000];
  for (int i = 0; i < 200000; i++) local[199999 - i] = 1;
  y[threadIdx.x] = local[threadIdx.x];
}

void reportRight(const std::vector<float>& values, float expected) {
  bool right = true;
  for (float v : values) right = right && v == expected;
  printf(right ? "right\n" : "wrong\n");
}

void overrun(int64_t count, int64_t at) {
  float* x = deviceBuffer<float>(static_cast<size_t>(count));
  launch(1, kThreads, 0, writeAt, x, at);
  kit::require(cudaDeviceSynchronize(), "synchronize");
}
void readUnwritten() {
  float *x = deviceBuffer<float>(16), *y = deviceBuffer<float>(1);
  launch(1, 32, 0, readAt, x, 3, y);
  reportRight(hostCopy(y, 1), 0);
}
void useAfterFree() {
  float *x = deviceBuffer<float>(64), *y = deviceBuffer<float>(1);
  kit::require(cudaFree(x), "cudaFree");
  launch(1, 32, 0, readAt, x, 3, y);
  cudaDeviceSynchronize();
}
void hostReadsDevice() {
  float* x = deviceBuffer(std::vector<float>(64, 1));
  printf("%g\n", static_cast<double>(x[5]));
}
void hostPointer() {
  std::vector<float> host(64);
  launch(1, 32, 0, readAt, host.data(), 3, deviceBuffer<float>(1));
}
void hiddenHostPointer() {  // where no argument shows it: a pointer in device memory
  struct Run {
    static KG_GLOBAL void follow(float* const* table, float* y) {
      if (threadIdx.x == 0) y[0] = table[0][1000000000000ll];
    }
  };
  float* host = nullptr;
  launch(1, 32, 0, Run::follow, deviceBuffer(std::vector<float*>{host}), deviceBuffer<float>(1));
  cudaDeviceSynchronize();
}

template <class... P, class... A>
void shared(size_t bytes, void (*kernel)(P...), A... arguments) {
  float* y = deviceBuffer<float>(kThreads);
  launch(1, kThreads, bytes, kernel, arguments..., y);
  reportRight(hostCopy(y, kThreads), 1);
}

// Dynamic bytes beside the 512 static ones of a kernel whose limit was raised to `allowed` (0: was not).
void sharedTogether(size_t allowed, size_t bytes) {
  if (allowed > 0)
    kit::require(cudaFuncSetAttribute(staticBesideDynamic, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(allowed)),
                 "cudaFuncSetAttribute");
  shared(bytes, staticBesideDynamic);
}

// ---- synchronization within a block
// ----------------------------------------------------------------------------------
enum class Missing { Nothing, AfterWrite, BeforeReuse };

// Each thread takes its mirror's value through shared memory, twice.
template <Missing missing>
KG_GLOBAL void mirror(const int* x, int* y) {
  KG_SHARED(int, s, kThreads);
  const int i = static_cast<int>(threadIdx.x);
  int sum = 0;
  for (int round = 0; round < 2; round++) {
    s[i] = x[round * kThreads + i];
    if (missing != Missing::AfterWrite) syncThreads();
    sum = 3 * sum + s[kThreads - 1 - i];
    if (missing != Missing::BeforeReuse) syncThreads();
  }
  y[i] = sum;
}
template <bool sound>
KG_GLOBAL void mirrorWarp(const int* x, int* y) {
  KG_SHARED(int, s, kThreads);
  const int i = static_cast<int>(threadIdx.x), other = i ^ 31;
  s[i] = x[i];
  if (sound) syncWarp();
  y[i] = s[other];
}
// A ring of two stages, filled asynchronously.
template <int inFlight, bool barrier>
KG_GLOBAL void copyRing(const int* x, int* y) {
  KG_SHARED(int, s, 2 * 4 * kThreads);
  const int i = static_cast<int>(threadIdx.x);
  for (int stage = 0; stage < 2; stage++) {
    copyAsync16(s + (stage * kThreads + i) * 4, x + (stage * kThreads + i) * 4);
    copyAsyncCommit();
  }
  copyAsyncWait<inFlight>();
  if (barrier) syncThreads();
  y[i] = s[(kThreads + (kThreads - 1 - i)) * 4 + 1];
}
// Blocks add to one sum without an atomic, and read each other's part.
template <bool sound>
KG_GLOBAL void sumBlocks(int* sum, int* y) {
  if (threadIdx.x == 0) {
    if (sound)
      atomicAddInt(sum, 1 << blockIdx.x);
    else
      y[blockIdx.x] = (*sum += 1 << blockIdx.x);
  }
}

template <class K>
void withInts(int blocks, K kernel) {
  std::vector<int> x(8 * kThreads);
  for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<int>(i * 7 + 1);
  int *from = deviceBuffer(x), *y = deviceBuffer(std::vector<int>(kThreads, 0));
  launch(blocks, kThreads, 0, kernel, from, y);
  printf("result %llx\n", static_cast<unsigned long long>(kit::digest(hostCopy(y, kThreads))));
}

KG_GLOBAL void divergentBarrier(float* y) {
  if (threadIdx.x < 64)
    syncThreads();
  else
    syncThreads();
  y[threadIdx.x] = 1;
}
KG_GLOBAL void barrierAfterExit(float* y) {
  if (threadIdx.x < 32) return;
  syncThreads();
  y[threadIdx.x] = 1;
}
KG_GLOBAL void unequalBarriers(float* y) {
  for (unsigned i = 0; i <= threadIdx.x / 64; i++) syncThreads();
  y[threadIdx.x] = 1;
}
KG_GLOBAL void missingLanes(float* y) {
  float v = 1;
  if (laneId() < 16) v = shuffleXor(v, 8);
  y[threadIdx.x] = v;
}
KG_GLOBAL void lanesAtBarrier(float* y) {
  float v = 1;
  if (laneId() < 16)
    v = shuffleXor(v, 8);
  else
    syncThreads();
  y[threadIdx.x] = v;
}
KG_GLOBAL void divergentCollective(float* y) {
  float v = 1;
  if (laneId() < 16)
    v = shuffleXor(v, 1);
  else
    v = shuffleXor(v, 1);
  y[threadIdx.x] = v;
}
KG_GLOBAL void misalignedCopy(const float* x, float* y) {
  copyAsync16(dynamicShared(), x + 1);
  y[threadIdx.x] = 1;
}
KG_GLOBAL void misalignedRow(float* y) {
  uint32_t r[4];
  loadMatrix4(r, dynamicShared() + laneId() * 16 + 2);
  y[threadIdx.x] = static_cast<float>(r[0]);
}

template <class K>
void run(K kernel) {
  launch(1, kThreads, 1024, kernel, deviceBuffer<float>(kThreads));
  cudaDeviceSynchronize();
}

// ---- streams
// -----------------------------------------------------------------------------------------------------------
KG_GLOBAL void fillOnes(float* x) { x[threadIdx.x] = 1; }
KG_GLOBAL void copyAll(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }

struct Streams {
  cudaStream_t a, b;
  cudaEvent_t event;
  float *x, *y, *pinned;
  Streams() {
    cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    x = deviceBuffer<float>(kThreads);
    y = deviceBuffer<float>(kThreads);
    cudaMallocHost(&pinned, kThreads * sizeof(float));
  }
};

void download(bool sound) {
  Streams s;
  simt::launch(1, kThreads, 0, s.a, fillOnes, s.x);
  cudaMemcpyAsync(s.pinned, s.x, kThreads * sizeof(float), cudaMemcpyDeviceToHost, s.a);
  if (sound) cudaStreamSynchronize(s.a);
  reportRight(std::vector<float>(s.pinned, s.pinned + kThreads), 1);
}
void upload(bool sound) {
  Streams s;
  for (int i = 0; i < kThreads; i++) s.pinned[i] = 1;
  cudaMemcpyAsync(s.x, s.pinned, kThreads * sizeof(float), cudaMemcpyHostToDevice, s.a);
  if (sound) cudaStreamSynchronize(s.a);
  memset(s.pinned, 0, kThreads * sizeof(float));
  cudaStreamSynchronize(s.a);
  reportRight(hostCopy(s.x, kThreads), 1);
}
void twoStreams(bool sound) {
  Streams s;
  simt::launch(1, kThreads, 0, s.a, fillOnes, s.x);
  cudaEventRecord(s.event, s.a);
  if (sound) cudaStreamWaitEvent(s.b, s.event, 0);
  simt::launch(1, kThreads, 0, s.b, copyAll, s.x, s.y);
  cudaStreamSynchronize(s.b);
  reportRight(hostCopy(s.y, kThreads), 1);
}

void foreignWork() {
  Streams s;
  cudaStreamBeginCapture(s.a, cudaStreamCaptureModeRelaxed);
  std::thread([&] { simt::launch(1, kThreads, 0, s.a, fillOnes, s.x); }).join();
}

// ---- error codes
// -------------------------------------------------------------------------------------------------------
void size(dim3 grid, int threads, size_t bytes) {
  kit::require(
      simt::launch(grid, dim3(static_cast<unsigned>(threads)), bytes, nullptr, fillOnes, deviceBuffer<float>(2048)),
      "launch");
}
void badCopy(size_t bytes, cudaMemcpyKind kind) {
  std::vector<float> host(1024);
  kit::require(cudaMemcpy(deviceBuffer<float>(64), host.data(), bytes, kind), "cudaMemcpy");
}
void doubleFree() {
  float* x = deviceBuffer<float>(64);
  kit::require(cudaFree(x), "cudaFree");
  kit::require(cudaFree(x), "cudaFree");
}
void outOfMemory() {
  for (;;) deviceBuffer<char>(100 << 20);
}

const std::map<std::string, std::function<void()>> kFaults = {
    {"write after a buffer", [] { overrun(1024, 1024); }},
    {"write just after a buffer", [] { overrun(1000, 1000); }},
    {"write before a buffer", [] { overrun(1024, -1); }},
    {"write far before a buffer", [] { overrun(1024, -5000); }},
    {"write after dynamic shared memory", [] { shared(512, sharedWriteAt, 128); }},
    {"write before dynamic shared memory", [] { shared(512, sharedWriteAt, -1); }},
    {"write just after dynamic shared memory", [] { shared(516, sharedWriteAt, 129); }},
    {"write after a shared array", [] { shared(0, staticSharedWriteAt, kThreads); }},
    {"use after free", useAfterFree},
    {"host reads device memory", hostReadsDevice},
    {"host pointer as an argument", hostPointer},
    {"wild pointer", hiddenHostPointer},
    {"unwritten device memory", readUnwritten},
    {"unwritten shared memory", [] { shared(0, readUnwrittenShared); }},
    {"local arrays too large", [] { shared(0, deepStack); }},
    {"barriers in place", [] { withInts(1, mirror<Missing::Nothing>); }},
    {"missing barrier after a write", [] { withInts(1, mirror<Missing::AfterWrite>); }},
    {"missing barrier before reuse", [] { withInts(1, mirror<Missing::BeforeReuse>); }},
    {"warp barrier in place", [] { withInts(1, mirrorWarp<true>); }},
    {"missing warp barrier", [] { withInts(1, mirrorWarp<false>); }},
    {"asynchronous copies awaited", [] { withInts(1, copyRing<0, true>); }},
    {"asynchronous copy not awaited", [] { withInts(1, copyRing<1, true>); }},
    {"asynchronous copy without a barrier", [] { withInts(1, copyRing<0, false>); }},
    {"atomic sum of blocks", [] { withInts(4, sumBlocks<true>); }},
    {"race between blocks", [] { withInts(4, sumBlocks<false>); }},
    {"divergent barrier", [] { run(divergentBarrier); }},
    {"barrier after threads left", [] { run(barrierAfterExit); }},
    {"unequal numbers of barriers", [] { run(unequalBarriers); }},
    {"warp collective with missing lanes", [] { run(missingLanes); }},
    {"warp collective beside a barrier", [] { run(lanesAtBarrier); }},
    {"divergent warp collective", [] { run(divergentCollective); }},
    {"misaligned asynchronous copy",
     [] { launch(1, 32, 1024, misalignedCopy, deviceBuffer<float>(64), deviceBuffer<float>(64)); }},
    {"misaligned matrix row", [] { run(misalignedRow); }},
    {"download awaited", [] { download(true); }},
    {"download not awaited", [] { download(false); }},
    {"upload's source kept", [] { upload(true); }},
    {"upload's source overwritten", [] { upload(false); }},
    {"streams joined by an event", [] { twoStreams(true); }},
    {"streams not joined", [] { twoStreams(false); }},
    {"another thread's work in a capture", foreignWork},
    {"too much dynamic shared memory", [] { size(1, 32, 100 * 1024); }},
    {"too much dynamic shared memory without opt-in", [] { size(1, 32, 48 * 1024 + 16); }},
    {"too much shared memory without opt-in", [] { sharedTogether(0, 48 * 1024 - 496); }},
    {"all the shared memory without opt-in", [] { sharedTogether(0, 48 * 1024 - 512); }},
    {"shared memory beyond its opt-in", [] { sharedTogether(64 * 1024, 64 * 1024 + 16); }},
    {"too much shared memory with opt-in", [] { sharedTogether(99 * 1024 - 496, 99 * 1024 - 496); }},
    {"all the shared memory with opt-in", [] { sharedTogether(99 * 1024 - 512, 99 * 1024 - 512); }},
    {"too much static shared memory", [] { run(tooManyStatics); }},
    {"too many threads", [] { size(1, 1056, 0); }},
    {"threads that are no whole warps", [] { size(1, 100, 0); }},
    {"an empty grid", [] { size(0, 32, 0); }},
    {"a grid too high", [] { size(dim3(1, 65536), 32, 0); }},
    {"a copy beyond a buffer", [] { badCopy(1024, cudaMemcpyHostToDevice); }},
    {"a copy of the wrong kind", [] { badCopy(64, cudaMemcpyDeviceToHost); }},
    {"memory freed twice", doubleFree},
    {"out of memory", outOfMemory},
};

}  // namespace

int main(int count, char** arguments) {
  const auto fault = kFaults.find(count > 1 ? arguments[1] : "");
  if (fault == kFaults.end()) {
    for (const auto& f : kFaults) printf("%s\n", f.first.c_str());
    return 2;
  }
  fault->second();
  cudaDeviceSynchronize();
}
