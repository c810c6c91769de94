// The comparisons of elementwise.def: bool from two tensors of one dtype, or from a tensor and a number.
//
// Roofline (H100, 3.35 TB/s): two accesses of the dtype and one byte. 64 Mi elements in bfloat16 move 335 MB: 100 us.
#include "cuda/elementwise.h"

namespace kg::cuda {
namespace {

// The type a number is compared in: an integer against 0.5 must not compare against 0.
template <class T>
using Number = std::conditional_t<std::is_same_v<T, float> || std::is_same_v<T, bf16>, float, double>;

template <class T>
KG_DEVICE auto widenElement(T x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return static_cast<float>(x);
  } else {
    return x;
  }
}

template <class Row, class T, int V>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void compareKernel(Layout<3> layout, Number<T> number) {
  forItems<V>(layout, [&](const int64_t (&at)[3], int count) {
    T a[V], b[V];
    uint8_t y[V];
    loadItem<V>(reinterpret_cast<const T*>(layout.data[1]) + at[1], layout.splat(1), count, a);
    if (layout.data[2] == nullptr) {
      KG_UNROLL for (int i = 0; i < V; i++) y[i] = Row::apply(static_cast<Number<T>>(widenElement(a[i])), number);
    } else {
      loadItem<V>(reinterpret_cast<const T*>(layout.data[2]) + at[2], layout.splat(2), count, b);
      KG_UNROLL for (int i = 0; i < V; i++) y[i] = Row::apply(widenElement(a[i]), widenElement(b[i]));
    }
    storeItem<V>(reinterpret_cast<uint8_t*>(layout.data[0]) + at[0], count, y);
  });
}

template <class Row, class T>
void compareTyped(const Call& call) {
  constexpr int V = kItem<T>;
  const TensorView absent = numberView(call[0], call[1].dtype);
  const TensorView* views[] = {&call[0], &call[1], call[2].present() ? &call[2] : &absent};
  const Number<T> number = static_cast<Number<T>>(call.attr(0));
  forPieces(makeWalk(views, 3), [&](Walk piece) {
    if (!call[2].present()) piece.data[2] = nullptr;
    if (V > 1 && packable(piece, V))
      return launchItems(call, makeLayout<3>(piece, V), compareKernel<Row, T, V>, number);
    launchItems(call, makeLayout<3>(piece, 1), compareKernel<Row, T, 1>, number);
  });
}

template <class Row>
void compare(const Call& call) {
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

}  // namespace kg::cuda
