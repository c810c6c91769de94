// The binary rows of elementwise.def: tensor with tensor, broadcast by stride 0, or with a number.
//
// Roofline (H100, 3.35 TB/s): three accesses an element. 64 Mi elements in bfloat16 move 402 MB: 120 us; beside a row
// or a number, which stay in the caches, 268 MB: 80 us.
#include "cuda/elementwise.h"

namespace kg::cuda {
namespace {

template <class C>
struct BinaryArguments {
  C number;  // in place of b where b has no data; not rounded to the dtype
  FaultSink faults;
};

// What int32 arithmetic cannot answer.
template <class Row>
KG_DEVICE void checkIntegers(const FaultSink& faults, IntLane x, IntLane y) {
  constexpr bool divides = std::is_same_v<Row, Row_div>, dividesBy = std::is_same_v<Row, Row_rdiv>;
  if constexpr (divides || dividesBy) {
    if ((divides ? y.v : x.v) == 0) reportFault(faults, FaultKind::ZeroDivisor, 0, 0, 0);
  }
  if constexpr (std::is_same_v<Row, Row_pow>) {
    if (y.v < 0) reportFault(faults, FaultKind::NegativeExponent, y.v, 0, 0);
  }
}

template <class Row, class T, int V>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void binaryKernel(Layout<3> layout, BinaryArguments<row_compute_t<T>> with) {
  using C = row_compute_t<T>;
  forItems<V>(layout, [&](const int64_t (&at)[3], int count) {
    T a[V], b[V];
    C y[V];
    const bool number = layout.data[2] == nullptr;
    loadItem<V>(reinterpret_cast<const T*>(layout.data[1]) + at[1], layout.splat(1), count, a);
    if (!number) loadItem<V>(reinterpret_cast<const T*>(layout.data[2]) + at[2], layout.splat(2), count, b);
    KG_UNROLL for (int i = 0; i < V; i++) {
      const C left = static_cast<C>(a[i]), right = number ? with.number : static_cast<C>(b[i]);
      if constexpr (std::is_same_v<C, IntLane>) {
        if (i < count) checkIntegers<Row>(with.faults, left, right);
      }
      y[i] = Row::template apply<C>(left, right);
    }
    roundItem<V>(y, a);
    storeItem<V>(reinterpret_cast<T*>(layout.data[0]) + at[0], count, a);
  });
}

template <class Row, class T>
void binaryTyped(const Call& call) {
  using C = row_compute_t<T>;
  constexpr int V = kItem<T>;
  const TensorView number = numberView(call[0], call[0].dtype);
  const TensorView* views[] = {&call[0], &call[1], call[2].present() ? &call[2] : &number};
  const BinaryArguments<C> with{static_cast<C>(static_cast<compute_t<T>>(call.attr(0))), context(call).faults};
  forPieces(makeWalk(views, 3), [&](Walk piece) {
    if (!call[2].present()) piece.data[2] = nullptr;
    if (V > 1 && packable(piece, V)) return launchItems(call, makeLayout<3>(piece, V), binaryKernel<Row, T, V>, with);
    launchItems(call, makeLayout<3>(piece, 1), binaryKernel<Row, T, 1>, with);
  });
}

template <class Row>
void binary(const Call& call) {
  const DType dtype = call[0].dtype;
  if (call[1].dtype != dtype || (call[2].present() && call[2].dtype != dtype))
    fail("expected one dtype, found %s from %s and %s", dtypeName(dtype), dtypeName(call[1].dtype),
         dtypeName(call[2].dtype));
  if (dtype == DType::I32) return binaryTyped<Row, int32_t>(call);
  dispatchFloat(dtype, [&](auto tag) { binaryTyped<Row, typename decltype(tag)::type>(call); });
}

}  // namespace

#define KG_BINARY(name, ...) \
  void kernel_##name(const Call& call) { binary<Row_##name>(call); }
#include "ops/all.def"

}  // namespace kg::cuda
