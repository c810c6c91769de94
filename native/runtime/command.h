// What stands in a stream's ring; for the files of Stream alone.
#pragma once

#include "runtime/stream.h"

namespace kg {

enum class Kind : uint32_t { Launch, Upload, Download, Fence, Fill, Check, Replay, Wrap };

// A command in the ring: this header, then (Launch) tensors, owners, attributes; (Upload) the bytes, unless they are in
// a heap block or a mapped file.
struct Stream::Header {
  uint64_t bytes;
  Kind kind;
  KernelId kernel;
  int32_t tensorCount, attributeCount;
  Owner owner;
  char* data;
  void* host;
  std::shared_ptr<const Mapping>* file;
  std::shared_ptr<Transfer>* transfer;
  uint64_t count;
  std::function<void(Fault)>* done;
  Graph* graph;

  TensorView* tensors() { return reinterpret_cast<TensorView*>(this + 1); }
  Owner* owners() { return reinterpret_cast<Owner*>(tensors() + tensorCount); }
  double* attributes() { return reinterpret_cast<double*>(owners() + tensorCount); }
};

}  // namespace kg
