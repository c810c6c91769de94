#include "stream.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "errors.h"
#include "memory.h"
#include "report.h"
#include "settings.h"
#include "simt/runtime.h"

struct CUstream_st {
  bool blocking = true;  // waits for the default stream
  std::deque<simt::Work> queue;
  uint64_t enqueued = 0, done = 0, polled = 0;
  bool capturing = false, broken = false;  // broken: something in between cannot be captured
  std::thread::id capturer;
  std::vector<simt::Work> captured;
};
struct CUevent_st {
  std::shared_ptr<simt::Mark> mark;  // of the last recording
};
struct CUgraph_st {
  std::vector<simt::Work> works;
};
struct CUgraphExec_st {
  std::vector<simt::Work> works;
};

namespace simt {

struct Mark {
  cudaStream_t stream;
  uint64_t position;
  bool done = false, polled = false;
  std::chrono::steady_clock::time_point time;
};

namespace {

// Never destroyed: threads of the process may outlive static objects.
struct Queues {
  std::recursive_mutex running;  // held by whoever runs work, long
  std::mutex state;              // guards everything below, short; taken after `running`
  std::set<cudaStream_t> streams;
  std::set<cudaEvent_t> events;
  std::condition_variable helpWanted;
  std::deque<std::pair<cudaStream_t, uint64_t>> hostWork;  // streams to run up to a host function
  bool helping = false;
};
Queues& queues() {
  static Queues& q = *new Queues;
  return q;
}

using Lock = std::unique_lock<std::mutex>;

cudaStream_t defaultStream() {
  static cudaStream_t stream = [] {
    auto* s = new CUstream_st;
    queues().streams.insert(s);
    return s;
  }();
  return stream;
}

cudaStream_t resolve(cudaStream_t stream) { return stream ? stream : defaultStream(); }

bool takeWork(cudaStream_t stream, uint64_t position, Work* work) {
  Queues& q = queues();
  Lock lock(q.state);
  if (stream->done >= position || stream->queue.empty()) return false;
  *work = std::move(stream->queue.front());
  stream->queue.pop_front();
  return true;
}

void finish(cudaStream_t stream, const Work& work) {
  Queues& q = queues();
  Lock lock(q.state);
  stream->done++;
  if (work.kind != Work::Kind::Record) return;
  work.mark->done = true;
  work.mark->time = std::chrono::steady_clock::now();
}

bool isDone(const Mark& mark) {
  Lock lock(queues().state);
  return mark.done;
}

// Runs a stream's work up to a position, and that of other streams where it waits for them. `running` is held.
void drain(cudaStream_t stream, uint64_t position, DeviceAccess& access, bool* worked) {
  Work work{};
  while (takeWork(stream, position, &work)) {
    switch (work.kind) {
      case Work::Kind::Device:
        access.open();
        *worked = true;
        work.run();
        break;
      case Work::Kind::Host:
        access.close();
        work.run();
        break;
      case Work::Kind::Record:
        break;
      case Work::Kind::Wait:
        if (!isDone(*work.mark)) drain(work.mark->stream, work.mark->position, access, worked);
        break;
    }
    finish(stream, work);
  }
}

void runUpTo(cudaStream_t stream, uint64_t position) {
  std::lock_guard<std::recursive_mutex> lock(queues().running);
  DeviceAccess access;
  bool worked = false;
  drain(stream, position, access, &worked);
  if (!worked) return;
  access.open();
  checkGuards("a library or a copy");
}

uint64_t enqueuedOf(cudaStream_t stream) {
  Lock lock(queues().state);
  return stream->enqueued;
}

std::vector<cudaStream_t> allStreams(bool blockingOnly) {
  defaultStream();
  Lock lock(queues().state);
  std::vector<cudaStream_t> all;
  for (cudaStream_t s : queues().streams)
    if (s->blocking || !blockingOnly) all.push_back(s);
  return all;
}

bool known(cudaStream_t stream) {
  Lock lock(queues().state);
  return queues().streams.count(stream) > 0;
}

// Nobody need wait for a host function: somebody may wait for what it does.
void help() {
  Queues& q = queues();
  for (;;) {
    Lock lock(q.state);
    q.helpWanted.wait(lock, [&] { return !q.hostWork.empty(); });
    const auto [stream, position] = q.hostWork.front();
    q.hostWork.pop_front();
    const bool alive = q.streams.count(stream) > 0;
    lock.unlock();
    if (alive) runUpTo(stream, position);
  }
}

void callHelp(cudaStream_t stream, uint64_t position) {
  Queues& q = queues();
  q.hostWork.emplace_back(stream, position);
  if (!q.helping) std::thread(help).detach();
  q.helping = true;
  q.helpWanted.notify_one();
}

}  // namespace

bool enqueue(cudaStream_t handle, Work work) {
  cudaStream_t stream = resolve(handle);
  if (!known(stream)) return false;
  if (!handle)  // the default stream waits for all blocking ones
    for (cudaStream_t s : allStreams(true)) runUpTo(s, enqueuedOf(s));
  Queues& q = queues();
  uint64_t position = 0;
  {
    Lock lock(q.state);
    if (stream->capturing) {
      if (stream->capturer != std::this_thread::get_id()) finding("work of another thread went into a capture");
      stream->captured.push_back(std::move(work));
      return true;
    }
    const bool host = work.kind == Work::Kind::Host;
    stream->queue.push_back(std::move(work));
    position = ++stream->enqueued;
    if (host && settings().lazy) callHelp(stream, position);
  }
  if (!handle || !settings().lazy) runUpTo(stream, position);
  return true;
}

bool synchronizeStream(cudaStream_t handle) {
  cudaStream_t stream = resolve(handle);
  if (!known(stream)) return false;
  runUpTo(stream, enqueuedOf(stream));
  return true;
}

void synchronizeDevice() {
  for (cudaStream_t s : allStreams(false)) runUpTo(s, enqueuedOf(s));
}

}  // namespace simt

using simt::Lock;
using simt::queues;
using simt::setError;

namespace {

bool isStream(cudaStream_t stream) { return simt::known(simt::resolve(stream)); }
// Waiting for a stream that captures is an error, and ends the capture.
bool breaksCapture(cudaStream_t stream) {
  Lock lock(queues().state);
  return stream && stream->capturing && (stream->broken = true);
}
bool isEvent(cudaEvent_t event) {
  Lock lock(queues().state);
  return queues().events.count(event) > 0;
}
std::shared_ptr<simt::Mark> markOf(cudaEvent_t event) {
  Lock lock(queues().state);
  return event->mark;
}

}  // namespace

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = new CUstream_st;
  (*stream)->blocking = !(flags & cudaStreamNonBlocking);
  Lock lock(queues().state);
  queues().streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  simt::waits("cudaStreamDestroy");
  if (!stream || !simt::synchronizeStream(stream)) return setError(cudaErrorInvalidResourceHandle);
  Lock lock(queues().state);
  queues().streams.erase(stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  simt::waits("cudaStreamSynchronize");
  if (isStream(stream) && breaksCapture(stream)) return setError(cudaErrorStreamCaptureUnsupported);
  return simt::synchronizeStream(stream) ? cudaSuccess : setError(cudaErrorInvalidResourceHandle);
}
// Whoever polls hears "not ready" first, and has waited with the second call.
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  cudaStream_t stream = simt::resolve(handle);
  if (!isStream(stream)) return setError(cudaErrorInvalidResourceHandle);
  if (breaksCapture(stream)) return setError(cudaErrorStreamCaptureUnsupported);
  uint64_t position = 0;
  {
    Lock lock(queues().state);
    position = stream->enqueued;
    if (stream->done == position) return cudaSuccess;
    const bool first = stream->polled != position;
    stream->polled = position;
    if (first) return cudaErrorNotReady;
  }
  simt::runUpTo(stream, position);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  simt::waits("cudaDeviceSynchronize");
  simt::synchronizeDevice();
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  simt::Work work{simt::Work::Kind::Host, [=] { function(data); }, nullptr};
  return simt::enqueue(stream, std::move(work)) ? cudaSuccess : setError(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  Lock lock(queues().state);
  queues().events.insert(*event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (!isEvent(event)) return setError(cudaErrorInvalidResourceHandle);
  Lock lock(queues().state);
  queues().events.erase(event);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  cudaStream_t stream = simt::resolve(handle);
  if (!isEvent(event) || !isStream(stream)) return setError(cudaErrorInvalidResourceHandle);
  auto mark = std::make_shared<simt::Mark>();
  mark->stream = stream;
  {
    Lock lock(queues().state);
    mark->position = stream->enqueued + 1;
    event->mark = mark;
  }
  simt::enqueue(handle, {simt::Work::Kind::Record, nullptr, mark});
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (!isEvent(event) || !isStream(stream)) return setError(cudaErrorInvalidResourceHandle);
  if (auto mark = markOf(event)) simt::enqueue(stream, {simt::Work::Kind::Wait, nullptr, mark});
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  // Other threads are there to wait for events.
  if (syscall(SYS_gettid) == getpid()) simt::waits("cudaEventSynchronize");
  if (!isEvent(event)) return setError(cudaErrorInvalidResourceHandle);
  auto mark = markOf(event);
  if (mark && !simt::isDone(*mark)) simt::runUpTo(mark->stream, mark->position);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (!isEvent(event)) return setError(cudaErrorInvalidResourceHandle);
  auto mark = markOf(event);
  if (!mark || simt::isDone(*mark)) return cudaSuccess;
  {
    Lock lock(queues().state);
    const bool first = !mark->polled;
    mark->polled = true;
    if (first) return cudaErrorNotReady;
  }
  simt::runUpTo(mark->stream, mark->position);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (!isEvent(start) || !isEvent(end)) return setError(cudaErrorInvalidResourceHandle);
  auto from = markOf(start), to = markOf(end);
  if (!from || !to) return setError(cudaErrorInvalidResourceHandle);
  if (!simt::isDone(*from) || !simt::isDone(*to)) return setError(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream || !isStream(stream)) return setError(cudaErrorStreamCaptureUnsupported);
  Lock lock(queues().state);
  if (stream->capturing) return setError(cudaErrorIllegalState);
  stream->capturing = true;
  stream->broken = false;
  stream->capturer = std::this_thread::get_id();
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (!isStream(stream)) return setError(cudaErrorInvalidResourceHandle);
  Lock lock(queues().state);
  *status = stream && stream->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!stream || !isStream(stream)) return setError(cudaErrorInvalidResourceHandle);
  Lock lock(queues().state);
  if (!stream->capturing) return setError(cudaErrorIllegalState);
  stream->capturing = false;
  auto works = std::exchange(stream->captured, {});
  *graph = stream->broken ? nullptr : new CUgraph_st{std::move(works)};
  return stream->broken ? setError(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new CUgraphExec_st{graph->works};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  for (const simt::Work& work : executable->works)
    if (!simt::enqueue(stream, work)) return setError(cudaErrorInvalidResourceHandle);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

void simtEnqueue(cudaStream_t stream, void (*function)(void*), void* data, const char*) {
  if (!simt::enqueue(stream, {simt::Work::Kind::Device, [=] { function(data); }, nullptr}))
    setError(cudaErrorInvalidResourceHandle);
}
}
