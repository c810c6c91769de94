// The comparisons of elementwise.def: bool from two tensors of one dtype, or from a tensor and a number. The loops are
// plain: the compiler vectorizes them.
#include "cpu/elementwise.h"

namespace kg::cpu::KG_ISA {
namespace {

// The type a number is compared in: an integer against 0.5 must not compare against 0.
template <class T>
using Number = std::conditional_t<std::is_same_v<T, float> || std::is_same_v<T, bf16>, float, double>;

template <class T>
KG_INLINE auto widen(T x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return static_cast<float>(x);
  } else {
    return x;
  }
}

template <class Row, class T>
void compareBlock(void* out, const void* const* in, int64_t n, int) {
  uint8_t* __restrict y = static_cast<uint8_t*>(out);
  const T* __restrict a = static_cast<const T*>(in[0]);
  const T* __restrict b = static_cast<const T*>(in[1]);
  for (int64_t i = 0; i < n; i++) y[i] = Row::apply(widen(a[i]), widen(b[i]));
}

template <class Row, class T>
void compareNumberBlock(void* out, const void* const* in, int64_t n, int) {
  using N = Number<T>;
  uint8_t* __restrict y = static_cast<uint8_t*>(out);
  const T* __restrict a = static_cast<const T*>(in[0]);
  const N s = static_cast<N>(*static_cast<const double*>(in[1]));
  for (int64_t i = 0; i < n; i++) y[i] = Row::apply(static_cast<N>(widen(a[i])), s);
}

template <class Row, class T>
KG_INLINE void compareTyped(const Call& call) {
  constexpr int64_t grain = 32768;
  if (call[2].present()) {
    const TensorView* views[] = {&call[0], &call[1], &call[2]};
    runBlocks(makeWalk(views, 3), compareBlock<Row, T>, grain, 0);
  } else {
    double number = call.attr(0);
    TensorView scalar = call[0];
    scalar.data = &number;
    scalar.dtype = DType::F64;
    for (int i = 0; i < scalar.ndim; i++) scalar.strides[i] = 0;
    const TensorView* views[] = {&call[0], &call[1], &scalar};
    runBlocks(makeWalk(views, 3), compareNumberBlock<Row, T>, grain, 2);
  }
}

template <class Row>
KG_INLINE void compare(const Call& call) {
  const DType dtype = call[1].dtype;
  if (call[0].dtype != DType::Bool) fail("expected a bool output, found %s", dtypeName(call[0].dtype));
  if (call[2].present() && call[2].dtype != dtype)
    fail("expected one dtype, found %s and %s", dtypeName(dtype), dtypeName(call[2].dtype));
  switch (dtype) {
    case DType::F32:
      return compareTyped<Row, float>(call);
    case DType::F64:
      return compareTyped<Row, double>(call);
    case DType::BF16:
      return compareTyped<Row, bf16>(call);
    case DType::I32:
      return compareTyped<Row, int32_t>(call);
    case DType::U8:
    case DType::Bool:
      return compareTyped<Row, uint8_t>(call);
    default:
      fail("expected any dtype but float16, found %s; try casting", dtypeName(dtype));
  }
}

}  // namespace

#define KG_COMPARE(name, ...) \
  void kernel_##name(const Call& call) { compare<Row_##name>(call); }
#include "ops/all.def"

}  // namespace kg::cpu::KG_ISA
