// The one exception type of the native layer. A kernel throws it; the executor attaches the op's name and carries
// it to the next read.
#pragma once

#include <stdexcept>
#include <string>

namespace kg {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The device has no more memory; what was being computed is added where it is known.
struct OutOfMemory : Error {
  using Error::Error;
};

// printf-style; never returns. Defined in error.cc so that no std code is emitted in ISA-specific files.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

[[noreturn]] void failOutOfMemory(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace kg
