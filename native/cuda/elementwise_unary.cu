// The unary rows of elementwise.def: out[...] = f(x[...]), both strided.
//
// Roofline (H100, 3.35 TB/s): two accesses an element. 64 Mi elements in bfloat16 move 268 MB: 80 us; float32 160 us. A
// thread moves 16 bytes in and 16 out; a full multiprocessor (2,048 threads) has 32 KB of reads in flight, twice what
// latency (0.6 us) times bandwidth (25 GB/s a processor) asks for. Arithmetic: tanh in bfloat16, about 25 instructions
// an element, takes 64 Mi * 25 / 32 / (132 * 4 * 1.7e9) = 58 us, hidden behind memory.
#include "cuda/elementwise.h"

namespace kg::cuda {
namespace {

template <class Row, class T, int V>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void unaryKernel(Layout<2> layout) {
  using C = compute_t<T>;
  forItems<V>(layout, [&](const int64_t (&at)[2], int count) {
    T x[V];
    C y[V];
    loadItem<V>(reinterpret_cast<const T*>(layout.data[1]) + at[1], layout.splat(1), count, x);
    KG_UNROLL for (int i = 0; i < V; i++) y[i] = Row::template apply<C>(static_cast<C>(x[i]));
    roundItem<V>(y, x);
    storeItem<V>(reinterpret_cast<T*>(layout.data[0]) + at[0], count, x);
  });
}

template <class Row>
void unary(const Call& call) {
  if (call[0].dtype != call[1].dtype)
    fail("expected one dtype, found %s from %s", dtypeName(call[0].dtype), dtypeName(call[1].dtype));
  const TensorView* views[] = {&call[0], &call[1]};
  const Walk walk = makeWalk(views, 2);
  dispatchFloat(call[0].dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = kItem<T>;
    forPieces(walk, [&](const Walk& piece) {
      if (V > 1 && packable(piece, V)) return launchItems(call, makeLayout<2>(piece, V), unaryKernel<Row, T, V>);
      launchItems(call, makeLayout<2>(piece, 1), unaryKernel<Row, T, 1>);
    });
  });
}

}  // namespace

#define KG_UNARY(name, ...) \
  void kernel_##name(const Call& call) { unary<Row_##name>(call); }
#include "ops/all.def"

}  // namespace kg::cuda
