#include "runtime/error.h"

#include <cstdarg>
#include <cstdio>

namespace kg {

void fail(const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  throw Error(text);
}

}  // namespace kg
