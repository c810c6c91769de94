// The unary rows of elementwise.def. One loop over contiguous elements a row and dtype; strides are strided.cc's
// matter.
#include "cpu/elementwise.h"

namespace kg::cpu::KG_ISA {
namespace {

template <class Row, class T>
void unaryBlock(void* out, const void* const* in, int64_t n, int) {
  using C = compute_t<T>;
  T* y = static_cast<T*>(out);
  const T* x = static_cast<const T*>(in[0]);
  forVectors<C>(n, [=](int64_t i, int count) KG_LAMBDA_INLINE {
    storeLanes(y + i, Row::template apply<Vec<C>>(loadLanes<C>(x + i, count)), count);
  });
}

template <class Row>
KG_INLINE void unary(const Call& call) {
  const TensorView* views[] = {&call[0], &call[1]};
  if (call[0].dtype != call[1].dtype)
    fail("expected one dtype, found %s from %s", dtypeName(call[0].dtype), dtypeName(call[1].dtype));
  constexpr int64_t grain = 16384;
  const Walk walk = makeWalk(views, 2);
  dispatchFloating(call[0].dtype,
                   [&](auto t) KG_LAMBDA_INLINE { runBlocks(walk, unaryBlock<Row, decltype(t)>, grain, 0); });
}

}  // namespace

#define KG_UNARY(name, ...) \
  void kernel_##name(const Call& call) { unary<Row_##name>(call); }
#include "ops/all.def"

}  // namespace kg::cpu::KG_ISA
