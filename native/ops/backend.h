// THE kernel contract. Every kernel of keelgrad is named once, in kernels.def (fused kernels, with their arguments) or
// elementwise.def (rows of elementwise and reduction functors); each backend implements all of them, or does not link.
//
// A kernel receives views of device memory and plain numbers. It may not read device memory on the host, wait for the
// device, allocate tensors, or keep anything after it returns: outputs are allocated by the caller. On the CPU it runs
// on the executor's thread and may use parallelFor; on CUDA it enqueues on `call.stream`. It reports a fault in the
// data (an index out of range) with kg::fail (CPU) or through the stream's error slot (CUDA).
//
// Unless its comment says otherwise, a kernel takes float32, float64 and bfloat16; all floating tensors of one call
// have one dtype; bfloat16 accumulates in float32; the value of an output row depends only on its own input row (one
// summation order, whatever the batch, the packing and the number of threads).
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/dtype.h"

namespace kg {

constexpr int kMaxDims = 8;

// A strided view of device memory. Strides are in elements, 0 where an axis is broadcast.
struct TensorView {
  void* data;
  DType dtype;  // None: the optional argument is absent
  int32_t ndim;
  int64_t shape[kMaxDims];
  int64_t strides[kMaxDims];

  KG_INLINE bool present() const { return dtype != DType::None; }
  KG_INLINE int64_t size(int axis) const { return shape[axis < 0 ? axis + ndim : axis]; }
  KG_INLINE int64_t stride(int axis) const { return strides[axis < 0 ? axis + ndim : axis]; }
  KG_INLINE int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; i++) n *= shape[i];
    return n;
  }
  KG_INLINE bool contiguous() const {
    int64_t expect = 1;
    for (int i = ndim - 1; i >= 0; i--) {
      if (shape[i] != 1 && strides[i] != expect) return false;
      expect *= shape[i];
    }
    return true;
  }
  template <class T>
  KG_INLINE T* ptr() const {
    return static_cast<T*>(data);
  }
};

// Of attention's kernels: D of q, k and v.
constexpr int64_t kMostHeadDimension = 256;

class Stream;  // one queue of a device; opaque to the contract

// One kernel invocation. Tensors stand in the order of kernels.def: outputs first, then inputs; attributes likewise.
struct Call {
  const TensorView* tensors;
  int32_t tensorCount;
  const double* attributes;
  int32_t attributeCount;
  Stream* stream;

  KG_INLINE const TensorView& operator[](int i) const { return tensors[i]; }
  KG_INLINE double attr(int i) const { return attributes[i]; }
  KG_INLINE int64_t intAttr(int i) const { return static_cast<int64_t>(attributes[i]); }
};

// Temporary device memory of at least `bytes`, 64-byte aligned, valid until the kernel returns (CPU) or until the work
// that it enqueued is done (CUDA). One live block a call: a second request in the same call invalidates the first.
void* scratch(const Call& call, size_t bytes);

using Kernel = void (*)(const Call&);

enum class KernelId : int32_t {
#define KG_KERNEL(name, outputs, inputs, attributes) name,
#define KG_UNARY(name, ...) name,
#define KG_BINARY(name, ...) name,
#define KG_COMPARE(name, ...) name,
#define KG_REDUCE(name, ...) name,
#include "ops/all.def"
  count
};

// What a backend is to everything above it.
struct KernelTable {
  const char* name;  // "avx512", "cuda", ...
  Kernel kernels[static_cast<int>(KernelId::count)];
};

}  // namespace kg
