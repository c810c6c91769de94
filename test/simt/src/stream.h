// Streams, events and captured graphs as queues of host functions. Work runs in the thread that waits for it (lazy), so
// that whatever nobody waits for has not happened yet; host functions have a thread of their own behind them.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "cuda_runtime_api.h"

namespace simt {

struct Mark;  // one recording of an event

struct Work {
  enum class Kind { Device, Host, Record, Wait } kind;
  std::function<void()> run;   // Device: device memory is open; Host: it is not
  std::shared_ptr<Mark> mark;  // Record, Wait
};

// nullptr is the default stream. False: not a stream.
bool enqueue(cudaStream_t stream, Work work);
// Runs everything that was enqueued up to now.
bool synchronizeStream(cudaStream_t stream);
void synchronizeDevice();

}  // namespace simt
