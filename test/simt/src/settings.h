// What the environment says about this process' SIMT layer; read once, at its first use.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

enum class Order { Fifo, Ascending, Descending, Random };  // which thread of a block runs next
enum class Copies { Early, Late, Random };                 // when an asynchronous copy lands

struct Settings {
  Order order = Order::Ascending;
  uint64_t seed = 1;
  Copies copies = Copies::Late;
  bool lazy = true;     // streams run when somebody waits, not when they are given work
  bool protect = true;  // host code may not touch device memory
  size_t memory = size_t{4096} << 20;
  size_t pinned = size_t{4096} << 20;  // at once
  int capability = 86;
  int processors = 4;
  int oldDevices = 0;           // GPUs of capability 7.5, before the one that works
  const char* waits = nullptr;  // file for the calls for which a host waits
};
const Settings& settings();

size_t sharedOptinLimit();  // dynamic shared memory a block may ask for
constexpr size_t kStaticSharedLimit = 48 * 1024;

// splitmix64: small, and the same everywhere.
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
};

}  // namespace simt
