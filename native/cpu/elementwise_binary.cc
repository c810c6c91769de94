// The binary rows of elementwise.def: tensor with tensor, with a broadcast element, with a number.
#include "cpu/elementwise.h"

namespace kg::cpu::KG_ISA {
namespace {

template <class T>
KG_INLINE Vec<compute_t<T>> broadcastElement(const void* p) {
  return Vec<compute_t<T>>(static_cast<compute_t<T>>(*static_cast<const T*>(p)));
}

template <class Row, class T>
void binaryBlock(void* out, const void* const* in, int64_t n, int broadcast) {
  using C = compute_t<T>;
  using V = Vec<C>;
  T* y = static_cast<T*>(out);
  const T* a = static_cast<const T*>(in[0]);
  const T* b = static_cast<const T*>(in[1]);
  if (broadcast == 3) {
    const V r = Row::template apply<V>(broadcastElement<T>(a), broadcastElement<T>(b));
    forVectors<C>(n, [=](int64_t i, int count) KG_LAMBDA_INLINE { storeLanes(y + i, r, count); });
  } else if (broadcast == 2) {
    const V s = broadcastElement<T>(b);
    forVectors<C>(n, [=](int64_t i, int count) KG_LAMBDA_INLINE {
      storeLanes(y + i, Row::template apply<V>(loadLanes<C>(a + i, count), s), count);
    });
  } else if (broadcast == 1) {
    const V s = broadcastElement<T>(a);
    forVectors<C>(n, [=](int64_t i, int count) KG_LAMBDA_INLINE {
      storeLanes(y + i, Row::template apply<V>(s, loadLanes<C>(b + i, count)), count);
    });
  } else {
    forVectors<C>(n, [=](int64_t i, int count) KG_LAMBDA_INLINE {
      storeLanes(y + i, Row::template apply<V>(loadLanes<C>(a + i, count), loadLanes<C>(b + i, count)), count);
    });
  }
}

// in[1] is a number in the compute type: for bfloat16 it is not rounded to the dtype.
template <class Row, class T>
void scalarBlock(void* out, const void* const* in, int64_t n, int) {
  using C = compute_t<T>;
  T* y = static_cast<T*>(out);
  const T* a = static_cast<const T*>(in[0]);
  const Vec<C> s(*static_cast<const C*>(in[1]));
  forVectors<C>(n, [=](int64_t i, int count) KG_LAMBDA_INLINE {
    storeLanes(y + i, Row::template apply<Vec<C>>(loadLanes<C>(a + i, count), s), count);
  });
}

// A number as an operand of the walk: one element with stride 0 in every axis.
KG_INLINE TensorView numberView(const TensorView& out, void* number, DType dtype) {
  TensorView v = out;
  v.data = number;
  v.dtype = dtype;
  for (int i = 0; i < v.ndim; i++) v.strides[i] = 0;
  return v;
}

template <class Row, class T>
KG_INLINE void binaryTyped(const Call& call) {
  using C = compute_t<T>;
  constexpr int64_t grain = 32768;
  if (call[2].present()) {
    const TensorView* views[] = {&call[0], &call[1], &call[2]};
    runBlocks(makeWalk(views, 3), binaryBlock<Row, T>, grain, 3);
  } else {
    C number = static_cast<C>(call.attr(0));
    const TensorView scalar = numberView(call[0], &number, sizeof(C) == 8 ? DType::F64 : DType::F32);
    const TensorView* views[] = {&call[0], &call[1], &scalar};
    runBlocks(makeWalk(views, 3), scalarBlock<Row, T>, grain, 2);
  }
}

template <class Row>
KG_INLINE void binary(const Call& call) {
  const DType dtype = call[0].dtype;
  if (call[1].dtype != dtype || (call[2].present() && call[2].dtype != dtype))
    fail("expected one dtype, found %s from %s and %s", dtypeName(dtype), dtypeName(call[1].dtype),
         dtypeName(call[2].dtype));
  if (dtype == DType::I32) return binaryTyped<Row, int32_t>(call);
  dispatchFloating(dtype, [&](auto t) KG_LAMBDA_INLINE { binaryTyped<Row, decltype(t)>(call); });
}

}  // namespace

#define KG_BINARY(name, ...) \
  void kernel_##name(const Call& call) { binary<Row_##name>(call); }
#include "ops/all.def"

}  // namespace kg::cpu::KG_ISA
