#include "settings.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace simt {
namespace {

[[noreturn]] void reject(const char* name, const char* value, const char* expected) {
  fprintf(stderr, "simt: expected %s=%s, found %s\n", name, expected, value);
  abort();
}

const char* variable(const char* name) {
  const char* value = getenv(name);
  return value && *value ? value : nullptr;
}

long number(const char* name, long otherwise) {
  const char* value = variable(name);
  if (!value) return otherwise;
  char* end = nullptr;
  const long n = strtol(value, &end, 10);
  if (*end || n < 0) reject(name, value, "a number");
  return n;
}

void readOrder(Settings& s) {
  const char* name = "KEELGRAD_SIMT_SCHEDULE";
  const char* value = variable(name);
  if (!value) return;
  if (strcmp(value, "fifo") == 0) {
    s.order = Order::Fifo;
  } else if (strcmp(value, "ascending") == 0) {
    s.order = Order::Ascending;
  } else if (strcmp(value, "descending") == 0) {
    s.order = Order::Descending;
  } else if (strncmp(value, "random:", 7) == 0) {
    s.order = Order::Random;
    s.copies = Copies::Random;
    s.seed = strtoull(value + 7, nullptr, 10);
  } else {
    reject(name, value, "fifo, ascending, descending or random:<seed>");
  }
}

void readCopies(Settings& s) {
  const char* name = "KEELGRAD_SIMT_COPIES";
  const char* value = variable(name);
  if (!value) return;
  if (strcmp(value, "early") == 0)
    s.copies = Copies::Early;
  else if (strcmp(value, "late") == 0)
    s.copies = Copies::Late;
  else if (strcmp(value, "random") == 0)
    s.copies = Copies::Random;
  else
    reject(name, value, "early, late or random");
}

void readStreams(Settings& s) {
  const char* name = "KEELGRAD_SIMT_STREAMS";
  const char* value = variable(name);
  if (!value) return;
  if (strcmp(value, "lazy") != 0 && strcmp(value, "eager") != 0) reject(name, value, "lazy or eager");
  s.lazy = strcmp(value, "lazy") == 0;
}

Settings read() {
  Settings s;
  readOrder(s);
  readCopies(s);
  readStreams(s);
  s.protect = number("KEELGRAD_SIMT_PROTECT", 1) != 0;
  s.memory = static_cast<size_t>(number("KEELGRAD_SIMT_MEMORY", 4096)) << 20;
  s.pinned = static_cast<size_t>(number("KEELGRAD_SIMT_PINNED", 4096)) << 20;
  s.capability = static_cast<int>(number("KEELGRAD_SIMT_CAPABILITY", s.capability));
  s.processors = static_cast<int>(number("KEELGRAD_SIMT_PROCESSORS", s.processors));
  s.oldDevices = static_cast<int>(number("KEELGRAD_SIMT_OLD_DEVICES", s.oldDevices));
  if (const char* file = variable("KEELGRAD_SIMT_WAITS")) s.waits = strdup(file);
  return s;
}

}  // namespace

const Settings& settings() {
  static const Settings s = read();
  return s;
}

size_t sharedOptinLimit() {
  switch (settings().capability) {
    case 80:
    case 87:
      return 163 * 1024;
    case 90:
    case 100:
      return 227 * 1024;
    default:
      return 99 * 1024;
  }
}

}  // namespace simt
