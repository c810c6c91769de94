#include "runtime/device.h"

#include <cstdlib>
#include <cstring>

#include "cpu/cpu.h"
#include "runtime/error.h"

namespace kg {
namespace {

const KernelSignature kSignatures[] = {
#define KG_UNARY(name, ...) {#name, "out", "x", ""},
#define KG_BINARY(name, ...) {#name, "out", "a b?", "scalar"},
#define KG_COMPARE(name, ...) {#name, "out", "a b?", "scalar"},
#define KG_REDUCE(name, ...) {#name, "out", "x", "reducedAxes"},
#define KG_KERNEL(name, outputs, inputs, attributes) {#name, outputs, inputs, attributes},
#include "ops/all.def"
};

KernelInfo infoOf(const KernelSignature& s) {
  KernelInfo info{s.name, 0, 0, false};
  for (const char* p = s.outputs; *p;) {
    const char* end = strchr(p, ' ');
    size_t length = end ? end - p : strlen(p);
    if (p[length - 1] == '+') info.accumulates |= 1u << info.outputs;
    info.outputs++;
    p += length + (end ? 1 : 0);
  }
  info.inPlace = info.outputs == 0;
  return info;
}

}  // namespace

const KernelSignature* kernelSignatures() { return kSignatures; }

const KernelInfo* kernelInfos() {
  static const std::vector<KernelInfo> infos = [] {
    std::vector<KernelInfo> all;
    for (const auto& s : kSignatures) all.push_back(infoOf(s));
    return all;
  }();
  return infos.data();
}

CudaStatus cudaStatus() { return {false, "this build of keelgrad has no CUDA backend", "use --device cpu"}; }

std::unique_ptr<Stream> makeStream(const std::string& device) {
  if (device == "cpu") {
    const char* guards = getenv("KEELGRAD_GUARDS");
    return std::make_unique<Stream>(cpuKernels(), kernelInfos(), hostMemory(), guards && *guards == '1');
  }
  CudaStatus cuda = cudaStatus();
  fail("device %s is not available: %s; %s", device.c_str(), cuda.reason.c_str(), cuda.remedy.c_str());
}

}  // namespace kg
