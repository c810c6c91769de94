// Launches as one graph of the device. They have run before, one by one: what kernels need beside their tensors
// (scratch memory, cuBLAS's workspace and plans) is there. What is not makes the capture fail, and they run one by one
// again.
#include "cuda/queue.h"

namespace kg::cuda {
namespace {

class CapturedGraph final : public DeviceGraph {
 public:
  CapturedGraph(int device, cudaGraphExec_t executable, const void* scratch, size_t bytes)
      : device_(device), executable_(executable), scratch_(scratch), bytes_(bytes) {}
  ~CapturedGraph() override {
    cudaSetDevice(device_);
    cudaGraphExecDestroy(executable_);
  }
  // Its kernels know the queue's scratch memory by its address.
  bool fits(const void* scratch, size_t bytes) const { return scratch_ == scratch && bytes_ <= bytes; }
  cudaGraphExec_t executable() const { return executable_; }

 private:
  int device_;
  cudaGraphExec_t executable_;
  const void* scratch_;
  size_t bytes_;
};

}  // namespace

bool Queue::prepare(std::unique_ptr<DeviceGraph>& graph, const std::function<void()>& launches) {
  if (graph && static_cast<CapturedGraph&>(*graph).fits(scratch_, scratchBytes_)) return true;
  graph.reset();
  cudaGraph_t captured = capture(launches);
  if (!captured) return false;
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, captured, 0);
  cudaGraphDestroy(captured);
  if (error != cudaSuccess) {
    cudaGetLastError();  // not the next launch's
    return false;
  }
  graph = std::make_unique<CapturedGraph>(device_, executable, scratch_, scratchBytes_);
  return true;
}

// Null where something in between cannot be captured.
cudaGraph_t Queue::capture(const std::function<void()>& launches) {
  std::lock_guard<std::mutex> lock(capture_);
  cudaGraph_t graph = nullptr;
  bool taken = cudaStreamBeginCapture(context_.stream, cudaStreamCaptureModeRelaxed) == cudaSuccess;
  if (taken) {
    capturing_ = true;
    try {
      launches();
    } catch (const std::exception&) {  // it comes again when they run one by one
      taken = false;
    }
    capturing_ = false;
    taken = cudaStreamEndCapture(context_.stream, &graph) == cudaSuccess && taken;
  }
  if (taken) return graph;
  cudaGetLastError();  // not the next launch's
  if (graph) cudaGraphDestroy(graph);
  return nullptr;
}

void Queue::replay(DeviceGraph& graph, uint32_t ticket) {
  upload(reinterpret_cast<char*>(replay_), &ticket, sizeof ticket);
  check(cudaGraphLaunch(static_cast<CapturedGraph&>(graph).executable(), context_.stream), "cudaGraphLaunch");
}

}  // namespace kg::cuda
