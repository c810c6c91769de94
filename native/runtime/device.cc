#include "runtime/device.h"

#include <cstdlib>
#include <cstring>

#include "cpu/cpu.h"
#ifdef KG_CUDA
#include "cuda/backend.h"
#endif
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

bool hasCuda() {
#ifdef KG_CUDA
  return true;
#else
  return false;
#endif
}

CudaStatus cudaStatus() {
#ifdef KG_CUDA
  CudaStatus status = cuda::status();
  status.unplannedProducts = cuda::unplannedProducts();
  return status;
#else
  CudaStatus none;
  none.available = false;
  none.reason = "this build of keelgrad has no CUDA backend";
  none.remedy = "install the CUDA compiler (nvcc) and build again (npm run build:native), or use --device cpu";
  return none;
#endif
}

namespace {

bool isOne(const char* variable) {
  const char* value = getenv(variable);
  return value && strcmp(value, "1") == 0;
}

[[noreturn]] void notAvailable(const std::string& device, const std::string& reason, const std::string& remedy) {
  fail("device %s is not available: %s; %s", device.c_str(), reason.c_str(), remedy.c_str());
}

// "cuda" and "cuda:0" are 0; -1 for what is no CUDA device's name.
int cudaIndex(const std::string& device) {
  if (device == "cuda") return 0;
  if (device.rfind("cuda:", 0) != 0 || device.size() == 5) return -1;
  char* end;
  const long index = strtol(device.c_str() + 5, &end, 10);
  return *end || index < 0 || index > 255 ? -1 : static_cast<int>(index);
}

#ifdef KG_CUDA
std::unique_ptr<Stream> makeCudaStream(const std::string& device, int index, Allocation mode) {
  const CudaStatus status = cuda::status();
  if (!status.available) notAvailable(device, status.reason, status.remedy);
  if (index >= static_cast<int>(status.devices.size()))
    notAvailable(device, "this machine has " + std::to_string(status.devices.size()) + " usable GPU(s)",
                 "use cuda:0, or look at CUDA_VISIBLE_DEVICES");
  mode.shared = true;
  const CudaDevice& found = status.devices[index];
  if (!found.reason.empty()) notAvailable(device, found.reason, "use another GPU (see keelgrad info), or --device cpu");
  return std::make_unique<Stream>(cuda::kernels(), kernelInfos(), cuda::makeQueue(index), mode);
}
#endif

}  // namespace

std::unique_ptr<Stream> makeStream(const std::string& device) {
  Allocation mode;
  mode.guards = isOne("KEELGRAD_GUARDS");
  mode.direct = isOne("KEELGRAD_DIRECT_ALLOCATION");
  if (device == "cpu") return std::make_unique<Stream>(cpuKernels(), kernelInfos(), makeHostQueue(), mode);
  const int index = cudaIndex(device);
  if (index < 0) fail("expected the device cpu, cuda or cuda:<number>, found %s", device.c_str());
#ifdef KG_CUDA
  return makeCudaStream(device, index, mode);
#else
  const CudaStatus cuda = cudaStatus();
  notAvailable(device, cuda.reason, cuda.remedy);
#endif
}

}  // namespace kg
