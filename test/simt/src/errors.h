// The calling thread's last CUDA error.
#pragma once

#include "cuda_runtime_api.h"

namespace simt {

// Remembers it for cudaGetLastError, returns it.
cudaError_t setError(cudaError_t error);

}  // namespace simt
