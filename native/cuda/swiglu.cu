// SwiGLU, silu(gate) * up, forward, backward and the tangent of backward: one pack of 16 bytes a thread.
//
// Contract: kernels.def, swiglu, swigluBackward, swigluTangent. Every tensor is [R, F] with unit stride on F and any
// stride on R, so gate and up may be halves of one product. Elementwise. The sigmoid is exact to rounding in float32
// and float64, and within 4 ulp of float32 where the result is rounded to bfloat16.
//
// H100 (3.35 TB/s), bfloat16, 8192 x 4864:
//   forward   gate, up, y              239 MB  71 us at full rate,  84 us at 85 %   (two special functions an element:
//                                              16 a clock and multiprocessor make 21 us)
//   backward  dy, gate, up, dgate, dup 398 MB 119 us at full rate, 140 us at 85 %
//   tangent   eight tensors            638 MB 190 us at full rate, 224 us at 85 %
#include "cuda/packs.h"

namespace kg::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostUnits = int64_t(1) << 30;  // of a launch, so that a thread divides in 32 bits

template <class T>
KG_DEVICE compute_t<T> sigmoid(compute_t<T> x) {
  using C = compute_t<T>;
  if constexpr (sizeof(T) == 2) return fastReciprocal(1.0f + fastExp2(-1.44269504f * x));
  return C(1) / (C(1) + std::exp(-x));
}

// Rows of a tensor.
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  static Rows of(const TensorView& v, int64_t firstRow) { return {v.ptr<T>() + firstRow * v.stride(0), v.stride(0)}; }
  KG_DEVICE T* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// Thread -> (row, pack): rows * packs threads.
struct Place {
  uint32_t row, pack;

  KG_DEVICE static Place ofThread(uint32_t packs) {
    const uint32_t unit = blockIdx.x * kThreads + threadIdx.x;
    const uint32_t row = unit / packs;
    return {row, unit - row * packs};
  }
};

template <class T, int N>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kThreads)
    swigluKernel(Rows<T> y, Rows<T> gate, Rows<T> up, uint32_t rows, uint32_t packs) {
  const Place at = Place::ofThread(packs);
  if (at.row >= rows) return;
  const int64_t column = static_cast<int64_t>(at.pack) * N;
  const auto g = widen(loadPack<T, N>(gate.at(at.row, column)));
  auto u = widen(loadPack<T, N>(up.at(at.row, column)));
  KG_UNROLL for (int i = 0; i < N; i++) u.v[i] *= g.v[i] * sigmoid<T>(g.v[i]);
  storePack<T, N>(y.at(at.row, column), narrow<T>(u));
}

template <class T>
struct Gradient {
  Rows<T> dgate, dup, dy;
  Rows<T> gate, up;  // primal rows
  RowMap rowMap;
  FaultSink faults;
};

// With s = sigmoid(gate): dup = dy * gate * s, dgate = dy * up * s * (1 + gate * (1 - s)).
template <class T, int N>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kThreads)
    swigluBackwardKernel(Gradient<T> b, int64_t firstRow, uint32_t rows, uint32_t packs) {
  using C = compute_t<T>;
  const Place at = Place::ofThread(packs);
  if (at.row >= rows) return;
  const int64_t row = firstRow + at.row, column = static_cast<int64_t>(at.pack) * N;
  const int64_t primal = b.rowMap(row, b.faults);
  if (primal < 0) return;
  const auto d = widen(loadPack<T, N>(b.dy.at(row, column)));
  auto g = widen(loadPack<T, N>(b.gate.at(primal, column)));
  auto u = widen(loadPack<T, N>(b.up.at(primal, column)));
  KG_UNROLL for (int i = 0; i < N; i++) {
    const C x = g.v[i], s = sigmoid<T>(x), ds = d.v[i] * s;
    g.v[i] = ds * u.v[i] * (C(1) + x * (C(1) - s));
    u.v[i] = ds * x;
  }
  storePack<T, N>(b.dgate.at(row, column), narrow<T>(g));
  storePack<T, N>(b.dup.at(row, column), narrow<T>(u));
}

template <class T>
struct Tangent {
  Rows<T> gDot, dgate, dup;
  Rows<T> dgateDot, dupDot, dy;
  Rows<T> gate, up;  // primal rows
  RowMap rowMap;
  FaultSink faults;
};

// With s = sigmoid(gate), f' = s (1 + gate (1 - s)), f'' = s (1 - s) (2 + gate (1 - 2 s)), p and q the tangents of
// dgate and dup: gDot = p up f' + q gate s, dgate = dy (p up f'' + q f'), dup = dy p f'.
template <class T, int N>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kThreads)
    swigluTangentKernel(Tangent<T> b, int64_t firstRow, uint32_t rows, uint32_t packs) {
  using C = compute_t<T>;
  const Place at = Place::ofThread(packs);
  if (at.row >= rows) return;
  const int64_t row = firstRow + at.row, column = static_cast<int64_t>(at.pack) * N;
  const int64_t primal = b.rowMap(row, b.faults);
  if (primal < 0) return;
  auto p = widen(loadPack<T, N>(b.dgateDot.at(row, column)));
  auto q = widen(loadPack<T, N>(b.dupDot.at(row, column)));
  auto d = widen(loadPack<T, N>(b.dy.at(row, column)));
  const auto g = widen(loadPack<T, N>(b.gate.at(primal, column)));
  const auto u = widen(loadPack<T, N>(b.up.at(primal, column)));
  KG_UNROLL for (int i = 0; i < N; i++) {
    const C x = g.v[i], s = sigmoid<T>(x), forGate = p.v[i], forUp = q.v[i], dy = d.v[i];
    const C slope = s * (C(1) + x * (C(1) - s)), bend = s * (C(1) - s) * (C(2) + x * (C(1) - C(2) * s));
    p.v[i] = forGate * u.v[i] * slope + forUp * x * s;
    q.v[i] = dy * (forGate * u.v[i] * bend + forUp * slope);
    d.v[i] = dy * forGate * slope;
  }
  storePack<T, N>(b.gDot.at(row, column), narrow<T>(p));
  storePack<T, N>(b.dgate.at(row, column), narrow<T>(q));
  storePack<T, N>(b.dup.at(row, column), narrow<T>(d));
}

// f(pack size as Size<N>) by where the tensors and their rows lie.
template <int N>
struct Size {
  static constexpr int value = N;
};
template <class T, class F>
void dispatchPack(const Call& call, int tensors, int64_t width, F f) {
  bool aligned = width % kPack<T> == 0;
  for (int i = 0; i < tensors; i++) aligned = aligned && onPacks(call[i], call[i].stride(0));
  aligned ? f(Size<kPack<T>>{}) : f(Size<1>{});
}

// f(first row, rows) over launches of at most kMostUnits threads.
template <class F>
void forRows(int64_t rows, int64_t packs, F f) {
  const int64_t most = kMostUnits / packs;
  for (int64_t first = 0; first < rows; first += most) f(first, rows - first < most ? rows - first : most);
}

template <class T>
void swiglu(const Call& call) {
  const int64_t rows = call[0].size(0), width = call[0].size(1);
  dispatchPack<T>(call, 3, width, [&](auto size) {
    constexpr int N = decltype(size)::value;
    const int64_t packs = width / N;
    forRows(rows, packs, [&](int64_t first, int64_t count) {
      launch(call, {gridOf(ceilDiv(count * packs, kThreads)), kThreads}, swigluKernel<T, N>,
             Rows<T>::of(call[0], first), Rows<T>::of(call[1], first), Rows<T>::of(call[2], first), count, packs);
    });
  });
}

template <class T>
void swigluBackward(const Call& call) {
  const int64_t rows = call[2].size(0), width = call[2].size(1);
  const Gradient<T> b{Rows<T>::of(call[0], 0), Rows<T>::of(call[1], 0), Rows<T>::of(call[2], 0),
                      Rows<T>::of(call[3], 0), Rows<T>::of(call[4], 0), RowMap::of(call[5], call[3].size(0)),
                      context(call).faults};
  dispatchPack<T>(call, 5, width, [&](auto size) {
    constexpr int N = decltype(size)::value;
    const int64_t packs = width / N;
    forRows(rows, packs, [&](int64_t first, int64_t count) {
      launch(call, {gridOf(ceilDiv(count * packs, kThreads)), kThreads}, swigluBackwardKernel<T, N>, b, first, count,
             packs);
    });
  });
}

template <class T>
void swigluTangent(const Call& call) {
  const int64_t rows = call[5].size(0), width = call[5].size(1);
  auto all = [&](int i) { return Rows<T>::of(call[i], 0); };
  const Tangent<T> b{all(0),
                     all(1),
                     all(2),
                     all(3),
                     all(4),
                     all(5),
                     all(6),
                     all(7),
                     RowMap::of(call[8], call[6].size(0)),
                     context(call).faults};
  dispatchPack<T>(call, 8, width, [&](auto size) {
    constexpr int N = decltype(size)::value;
    const int64_t packs = width / N;
    forRows(rows, packs, [&](int64_t first, int64_t count) {
      launch(call, {gridOf(ceilDiv(count * packs, kThreads)), kThreads}, swigluTangentKernel<T, N>, b, first, count,
             packs);
    });
  });
}

}  // namespace

void kernel_swiglu(const Call& call) {
  if (call[0].numel() == 0) return;
  dispatchFloat(call[0].dtype, [&](auto tag) { swiglu<typename decltype(tag)::type>(call); });
}

void kernel_swigluBackward(const Call& call) {
  if (call[2].numel() == 0) return;
  dispatchFloat(call[2].dtype, [&](auto tag) { swigluBackward<typename decltype(tag)::type>(call); });
}

void kernel_swigluTangent(const Call& call) {
  if (call[5].numel() == 0) return;
  dispatchFloat(call[5].dtype, [&](auto tag) { swigluTangent<typename decltype(tag)::type>(call); });
}

}  // namespace kg::cuda
