// For programs that run a kernel on the device "cuda" and on the CPU and compare: random inputs, views, the largest
// deviation. A program ends with the digest of all bits that came from the device, which must not depend on the
// schedule.
#pragma once

#include <cmath>
#include <cstdio>
#include <functional>

#include "run.h"

namespace simt {

class Comparison {
 public:
  Device cuda{"cuda:0"}, cpu{"cpu"};

  // Uniform in [-1, 1), the same in every run.
  double random() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state_ >> 11) * 0x1p-52 - 1;
  }
  int64_t below(int64_t limit) { return static_cast<int64_t>((random() + 1) / 2 * static_cast<double>(limit)); }

  template <class T>
  std::vector<T> values(int64_t count) {
    std::vector<T> v(static_cast<size_t>(count));
    for (T& x : v) x = static_cast<T>(random());
    return v;
  }

  // |cuda - cpu| <= tolerance * (|cpu| + 1), NaN where the other is; adds the bits to the digest.
  template <class T>
  void equal(const std::string& what, const Tensor& onCuda, const Tensor& onCpu, double tolerance) {
    const std::vector<T> found = cuda.download<T>(onCuda), expected = cpu.download<T>(onCpu);
    add(found);
    checks_++;
    for (size_t i = 0; i < expected.size(); i++) {
      const double f = static_cast<double>(found[i]), e = static_cast<double>(expected[i]);
      const bool fits = std::isnan(e) ? std::isnan(f) : std::abs(f - e) <= tolerance * (std::abs(e) + 1);
      if (fits) continue;
      printf("%s: element %zu of %zu: expected %.9g, found %.9g\n", what.c_str(), i, expected.size(), e, f);
      failures_++;
      return;
    }
  }

  void expect(bool condition, const std::string& what) {
    checks_++;
    if (condition) return;
    printf("%s\n", what.c_str());
    failures_++;
  }

  // The message of the fault that a device reports next, or nothing.
  static std::string fault(Device& device) {
    try {
      device.synchronize();
    } catch (const std::exception& e) {
      return e.what();
    }
    return "";
  }

  int finish() {
    printf("%d checks, %d failed, digest %016llx\n", checks_, failures_, static_cast<unsigned long long>(digest_));
    return failures_ ? 1 : 0;
  }

 private:
  template <class T>
  void add(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); i++) digest_ = (digest_ ^ bytes[i]) * 0x100000001b3u;
  }

  uint64_t state_ = 1, digest_ = 0xcbf29ce484222325u;
  int checks_ = 0, failures_ = 0;
};

}  // namespace simt
