// Graphs of a stream: recorded while they run for the first time, so that scratch memory, workspaces and plans exist
// when the device makes a graph of its own of them, which is at their first replay.
#include "runtime/graph.h"

#include <utility>

#include "runtime/error.h"

namespace kg {
namespace {
constexpr int kCaptureAttempts = 3;  // then the device does not take it
}

void Stream::beginGraph() {
  if (recording_) fail("expected no capture inside of a captured function");
  recording_ = std::make_unique<Graph>(storages_.beginPool());
}

uint32_t Stream::endGraph() {
  if (!recording_) fail("expected a capture to end, found none");
  if (const char* refused = recording_->refused) {
    abandonGraph();
    failForGraph(refused);
  }
  storages_.endPool();
  graphs_[++lastGraph_] = std::move(recording_);
  return lastGraph_;
}

void Stream::abandonGraph() {
  if (!recording_) return;
  storages_.endPool();
  drop(*std::exchange(recording_, nullptr));
}

void Stream::dropGraph(uint32_t id) {
  auto graph = std::move(graphOf(id));
  graphs_.erase(id);
  drop(*graph);
}

void Stream::drop(Graph& graph) {
  synchronize();
  for (Storage* s : graph.held()) storages_.release(*s);
  storages_.letGo(graph.pool);
}

std::unique_ptr<Graph>& Stream::graphOf(uint32_t id) {
  auto found = graphs_.find(id);
  if (found == graphs_.end()) fail("a graph was used after it was disposed of");
  return found->second;
}

GraphCounts Stream::graphCounts(uint32_t id) {
  const Graph& graph = *graphOf(id);
  return {graph.launches(), graph.runs, graph.deviceRuns};
}

void Stream::replay(uint32_t id) {
  Graph& graph = *graphOf(id);
  refuseInGraph("a replay");
  Header* h = reserve(sizeof(Header));
  h->kind = Kind::Replay;
  h->graph = &graph;
  publish(h);
  settle();
}

void Stream::failForGraph(const char* what) {
  fail("expected kernels alone in a captured function, found %s; do that before or after it", what);
}

// Remembered too: the error may be lost in a promise.
void Stream::refuseInGraph(const char* what) {
  if (!recording_) return;
  recording_->refused = what;
  failForGraph(what);
}

void Stream::record(Header* h, Storage* const* owners) {
  if (!recording_) return;
  for (int i = 0; i < h->tensorCount; i++)
    if (owners[i] && recording_->needs(owners[i])) storages_.retain(*owners[i]);
  recording_->add(*h);
}

void Stream::executeReplay(Graph& graph) {
  if (stop_) return;
  const bool onDevice = replayOnDevice(graph);
  if (!onDevice) graph.forEach([&](Header* h) { execute(h); });
  graph.runs++;
  graph.deviceRuns += onDevice;
}

// As one graph of the device, where it has such a thing and no fault is in the way: what a fault reaches, and what not,
// is decided launch by launch.
bool Stream::replayOnDevice(Graph& graph) {
  if (!deferred_ || !graph.launchesOnly() || graph.launches() == 0 || graph.failures >= kCaptureAttempts) return false;
  uint32_t at = 0;
  const bool ready = queue_->prepare(graph.device, [&] {
    graph.forEach([&](Header* h) {
      queue_->launching(h->kernel, at++);
      callKernel(h);
    });
  });
  graph.failures += !ready;
  uint32_t ticket = 0;
  if (!ready || !enterGraph(graph, &ticket)) return false;
  try {
    queue_->replay(*graph.device, ticket);
  } catch (const std::exception& e) {
    spoil(graph, std::make_shared<const std::string>(std::string("[graph] ") + e.what()));
  }
  countLaunches(graph.launches());
  return true;
}

// Whether no storage carries a fault. The launches are then entered in the log, with tickets from the first one's on.
bool Stream::enterGraph(Graph& graph, uint32_t* firstTicket) {
  auto lock = lockFaults();
  bool sound = true;
  graph.forEach([&](Header* h) {
    for (int i = 0; i < h->tensorCount && sound; i++) sound = !h->owners()[i].fault();
  });
  if (!sound) return false;
  uint32_t count = 0;
  graph.forEach([&](Header* h) {
    const KernelInfo& info = infos_[static_cast<int>(h->kernel)];
    *firstTicket = log_.launched(info, h->owners(), h->tensorCount) - count++;
  });
  return true;
}

void Stream::spoil(Graph& graph, const Fault& fault) {
  report(fault);
  auto lock = lockFaults();
  graph.forEach([&](Header* h) { markOutputs(h, fault); });
}

}  // namespace kg
