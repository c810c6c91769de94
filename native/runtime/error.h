// The one exception type of the native layer. A kernel throws it; the executor attaches the op's name and carries
// it to the next read.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace kg {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The device has no more memory for what a kernel needs beside its tensors: "workspace of ...". Who holds the rest, and
// what was being computed, is added where it is known (StorageTable::explain).
struct OutOfMemory : Error {
  OutOfMemory(size_t size, const char* use) : Error("out of memory"), bytes(size), purpose(use) {}
  size_t bytes;
  const char* purpose;  // a literal
};

// printf-style; never returns. Defined in error.cc so that no std code is emitted in ISA-specific files.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace kg
