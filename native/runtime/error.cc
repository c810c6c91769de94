#include "runtime/error.h"

#include <cstdarg>
#include <cstdio>

namespace kg {

#define KG_FORMAT(text, format)               \
  char text[1024];                            \
  va_list args;                               \
  va_start(args, format);                     \
  vsnprintf(text, sizeof text, format, args); \
  va_end(args)

void fail(const char* format, ...) {
  KG_FORMAT(text, format);
  throw Error(text);
}

void failOutOfMemory(const char* format, ...) {
  KG_FORMAT(text, format);
  throw OutOfMemory(text);
}

}  // namespace kg
