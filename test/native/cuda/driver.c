// A driver (libcuda.so.1) that gets as far as the test wants: what it answers comes from the environment.
#include <stdlib.h>
#include <string.h>

static int given(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}

int cuDriverGetVersion(int* version) {
  *version = given("TEST_DRIVER_VERSION", 13000);
  return 0;
}
int cuInit(unsigned flags) {
  (void)flags;
  return given("TEST_DRIVER_INIT", 0);
}
static int refuse(void) { return 500; }  // CUDA_ERROR_NOT_FOUND
static int accept(void) { return 0; }

int cuGetProcAddress_v2(const char* symbol, void** function, int version, unsigned long long flags, int* status) {
  (void)version, (void)flags;
  if (status) *status = 0;
  if (!strcmp(symbol, "cuDriverGetVersion")) {
    *function = (void*)cuDriverGetVersion;
  } else if (!strcmp(symbol, "cuInit")) {
    *function = (void*)cuInit;
  } else if (!strcmp(symbol, "cuGetProcAddress")) {
    *function = (void*)cuGetProcAddress_v2;
  } else {
    *function = (void*)(strcmp(symbol, "cuGetExportTable") ? accept : refuse);
  }
  return 0;
}
int cuGetProcAddress(const char* symbol, void** function, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, 0);
}
