// Runs a kernel's blocks one after the other, the threads of a block as fibers. One thread of the process at a time may
// be in here.
#pragma once

#include <functional>
#include <string>

#include "simt/runtime.h"

namespace simt {

void runKernel(const LaunchConfiguration& configuration, const std::function<void()>& thread);
// Does the calling OS thread run a kernel now?
bool inKernel();
// " in <kernel>, block (x, y, z), thread (x, y, z)", or empty outside of kernels.
std::string whereNow();

}  // namespace simt
