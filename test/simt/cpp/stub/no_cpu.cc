// In place of the CPU backend where only the device cuda is asked for: its kernels are half of a build.
#include "runtime/device.h"
#include "runtime/error.h"

namespace kg {

const KernelTable& cpuKernels() { fail("this build has no CPU kernels"); }
std::vector<std::string> cpuFeatures() { return {}; }

}  // namespace kg
