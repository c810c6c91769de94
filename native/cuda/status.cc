// Whether CUDA can run here: the driver, the devices, cuBLAS. Each thing that can be missing has a reason and a remedy.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda/backend.h"
#include "cuda/cublas.h"

namespace kg::cuda {
namespace {

constexpr int kLeastCapability = 80;

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

CudaStatus refused(CudaStatus status, std::string reason, std::string remedy) {
  status.available = false;
  status.reason = std::move(reason);
  status.remedy = std::move(remedy);
  return status;
}

// Minor versions are compatible: any driver of the runtime's major version will do.
CudaStatus withoutDriver(CudaStatus status) {
  const std::string major = std::to_string(status.runtime / 1000);
  const std::string remedy =
      "install NVIDIA's driver for CUDA " + major + (major == "13" ? " (580 or later)" : "") + ", or use --device cpu";
  if (status.driver == 0) return refused(status, "no NVIDIA driver was found (libcuda.so.1)", remedy);
  return refused(
      status,
      "the NVIDIA driver is too old: it supports CUDA " + version(status.driver) + ", this build needs " + major + ".0",
      remedy);
}

CudaDevice describe(int index) {
  cudaDeviceProp properties;
  CudaDevice device{"GPU " + std::to_string(index), 0, 0, ""};
  const cudaError_t error = cudaGetDeviceProperties(&properties, index);
  if (error != cudaSuccess) {
    cudaGetLastError();
    device.reason = cudaGetErrorString(error);
    return device;
  }
  device.name = properties.name;
  device.memory = properties.totalGlobalMem;
  device.capability = properties.major * 10 + properties.minor;
  if (device.capability < kLeastCapability)
    device.reason = device.name + " has compute capability " + std::to_string(properties.major) + "." +
                    std::to_string(properties.minor) + ", expected 8.0 (Ampere) or later";
  return device;
}

}  // namespace

CudaStatus status() {
  CudaStatus status{true, "", "", {}, 0, 0, ""};
  cudaRuntimeGetVersion(&status.runtime);
  cudaDriverGetVersion(&status.driver);
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // not the next call's
  if (status.driver == 0 || error == cudaErrorInsufficientDriver) return withoutDriver(status);
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0))
    return refused(status, "the NVIDIA driver sees no GPU",
                   "look at nvidia-smi and CUDA_VISIBLE_DEVICES (in a container: --gpus all), or use --device cpu");
  if (error != cudaSuccess)
    return refused(status, std::string("the NVIDIA driver does not start: ") + cudaGetErrorString(error),
                   "look at nvidia-smi and the system's log, or use --device cpu");
  for (int i = 0; i < count; i++) status.devices.push_back(describe(i));
  const auto usable = [](const CudaDevice& device) { return device.reason.empty(); };
  if (std::none_of(status.devices.begin(), status.devices.end(), usable))
    return refused(status, status.devices[0].reason, "use --device cpu");
  const CublasStatus& cublas = cublasStatus();
  if (!cublas.available) return refused(status, cublas.reason, cublas.remedy);
  status.cublas = cublas.path;
  return status;
}

}  // namespace kg::cuda
