// The host twin of CUDA's C++ header: the runtime's calls; kernels take their vocabulary from cuda/gpu.h.
#pragma once

#include "cuda_runtime_api.h"
