// The devices of this process and what they can do. A device supplies a kernel table and a source of memory; streams
// are made over them. Knows no Node.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "runtime/stream.h"

namespace kg {

// Contract data that every backend shares: one entry a kernel, in the order of KernelId.
struct KernelSignature {
  const char *name, *outputs, *inputs, *attributes;
};
const KernelSignature* kernelSignatures();
const KernelInfo* kernelInfos();
constexpr int kKernelCount = static_cast<int>(KernelId::count);

// The best kernel table that this processor runs, or the one that KEELGRAD_ISA names (base, avx2, avx512).
const KernelTable& cpuKernels();
std::vector<std::string> cpuFeatures();

struct CudaDevice {
  std::string name;
  size_t memory;       // bytes
  int capability;      // 80, 90, ...
  std::string reason;  // why it cannot be used; empty when it can
};
struct CudaStatus {
  bool available = false;
  std::string reason, remedy;  // why not, and what to do about it
  std::vector<CudaDevice> devices;
  int driver = 0, runtime = 0;     // CUDA versions, 13000 for 13.0; 0: no driver, no CUDA in this build
  std::string cublas;              // where it was found
  uint64_t unplannedProducts = 0;  // so far, in this process: cuda/backend.h
};
CudaStatus cudaStatus();
bool hasCuda();  // whether this build contains the CUDA backend

// device: "cpu", "cuda:0"... Throws where the device is not available.
std::unique_ptr<Stream> makeStream(const std::string& device);

}  // namespace kg
