// What the runtime asks of the CUDA backend: whether it can run here, its kernel table, and a queue on a device. No
// CUDA header, so that the rest of the addon compiles without one.
#pragma once

#include <memory>

#include "runtime/device.h"
#include "runtime/queue.h"

namespace kg::cuda {

// Asks the driver anew; initializes nothing on a device. Never throws.
CudaStatus status();
const KernelTable& kernels();
// A stream of its own on device `index`. Throws where the driver refuses.
std::unique_ptr<DeviceQueue> makeQueue(int index);
// Shapes of products, in this process, that cuBLAS did not compute by the algorithm of their rows (gemm.h): their rows
// may have other bits than the same rows in a product of another M.
uint64_t unplannedProducts();

}  // namespace kg::cuda
