// Prints what kg::cuda::status() says here: available, reason, remedy, the driver's and the runtime's version, a line
// each.
#include <cstdio>

#include "cuda/backend.h"

int main() {
  const kg::CudaStatus status = kg::cuda::status();
  printf("%d\n%s\n%s\n%d\n%d\n", status.available, status.reason.c_str(), status.remedy.c_str(), status.driver,
         status.runtime);
}
