// What kernels of several families share: warp and block reductions in a fixed order, dtype dispatch, grid arithmetic.
#pragma once

#include "cuda/context.h"

namespace kg::cuda {

// ---- reductions: every lane receives the result; butterflies, so the order is fixed
// ------------------------------------
template <class C, class F>
KG_DEVICE C warpReduce(C v, F combine) {
  for (int mask = 16; mask > 0; mask >>= 1) v = combine(v, shuffleXor(v, mask));
  return v;
}
template <class C>
KG_DEVICE C warpSum(C v) {
  return warpReduce(v, [](C a, C b) { return a + b; });
}
template <class C>
KG_DEVICE C warpMax(C v) {
  return warpReduce(v, [](C a, C b) { return a > b ? a : b; });
}

// Over all threads of the block (a multiple of 32, at most 1024); every thread receives the result. `shared` holds 32
// values and may be used again at once: the function begins and ends with a barrier.
template <class C, class F>
KG_DEVICE C blockReduce(C v, C initial, C* shared, F combine) {
  v = warpReduce(v, combine);
  syncThreads();
  if (laneId() == 0) shared[warpId()] = v;
  syncThreads();
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  v = laneId() < warps ? shared[laneId()] : initial;
  v = warpReduce(v, combine);
  syncThreads();
  return v;
}
template <class C>
KG_DEVICE C blockSum(C v, C* shared) {
  return blockReduce(v, C(0), shared, [](C a, C b) { return a + b; });
}

// ---- host helpers --------------------------------------------------------------------------------------------------
inline int64_t ceilDiv(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t roundUp(int64_t n, int64_t to) { return ceilDiv(n, to) * to; }
inline dim3 gridOf(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

// Pieces of the one scratch block of a call: reserve all, allocate, then get.
class Workspace {
 public:
  template <class T>
  size_t reserve(int64_t count) {
    const size_t offset = bytes_;
    bytes_ += roundUp(count * static_cast<int64_t>(sizeof(T)), 64);
    return offset;
  }
  void allocate(const Call& call) { base_ = static_cast<char*>(scratch(call, bytes_ > 0 ? bytes_ : 64)); }
  template <class T>
  T* get(size_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  size_t bytes_ = 0;
  char* base_ = nullptr;
};

template <class T>
struct TypeTag {
  using type = T;
};

// f(TypeTag<float | double | bf16>{}) for the dtype; throws for others. `using T = typename decltype(tag)::type;`
template <class F>
void dispatchFloat(DType dtype, F f) {
  switch (dtype) {
    case DType::F32:
      return f(TypeTag<float>{});
    case DType::F64:
      return f(TypeTag<double>{});
    case DType::BF16:
      return f(TypeTag<bf16>{});
    default:
      fail("expected float32, float64 or bfloat16, found %s", dtypeName(dtype));
  }
}

}  // namespace kg::cuda
