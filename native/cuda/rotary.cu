// Rotary position embedding in two halves. A thread turns one pack of pairs (i, i + D/2) of several heads of one token,
// so that it reads its cosines and sines once; neighbouring threads have neighbouring packs.
//
// Contract: kernels.def, rotary. x is strided in its first two axes, y contiguous; inverse turns back. Elementwise: no
// order of summation; the products are joined by an explicit fma, so every layout gives the same bits.
//
// H100 (3.35 TB/s), bfloat16, 8192 tokens x 14 heads x 64: x, y 29.4 MB, 8.8 us at full rate, 10.3 us at 85 %; tables
// of 1024 positions are 256 KB of L2. 6 flops an element: 0.04 GFLOP.
#include "cuda/packs.h"

namespace kg::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 4;  // of a thread: loads in flight against reads of the table

template <class T>
struct Rotation {
  T* y;
  const T* x;
  const int32_t* positions;
  const compute_t<T>* table;  // [positions, 2 half]: cosines, then sines
  int64_t tokens, tokenStride, headStride, tableRows;
  int heads, half, packs, units;  // packs: of half a head; units: pieces of work a token
  compute_t<T> direction;
  FaultSink faults;
};

// Consecutive numbers, on 16 bytes where there are that many.
template <int N, class C>
KG_DEVICE Wide<C, N> loadAngles(const C* from) {
  constexpr int kStep = N % kPack<C> == 0 ? kPack<C> : 1;
  Wide<C, N> w;
  KG_UNROLL for (int i = 0; i < N; i += kStep) {
    const Pack<C, kStep> p = loadPack<C, kStep>(from + i);
    KG_UNROLL for (int j = 0; j < kStep; j++) w.v[i + j] = p.v[j];
  }
  return w;
}

// The two halves of a head, N elements of each.
template <class T, int N>
struct Pair {
  Pack<T, N> low, high;
};

template <class T, int N, class C = compute_t<T>>
KG_DEVICE Pair<T, N> rotate(const Pair<T, N>& x, const Wide<C, N>& cosines, const Wide<C, N>& sines) {
  const Wide<C, N> a = widen(x.low), b = widen(x.high);
  Wide<C, N> low, high;
  KG_UNROLL for (int i = 0; i < N; i++) {
    low.v[i] = std::fma(a.v[i], cosines.v[i], -(b.v[i] * sines.v[i]));
    high.v[i] = std::fma(b.v[i], cosines.v[i], a.v[i] * sines.v[i]);
  }
  return {narrow<T>(low), narrow<T>(high)};
}

// Unit `unit` of a token: pack unit % packs of kHeads heads.
template <class T, int N>
KG_DEVICE void rotateUnit(const Rotation<T>& r, int64_t token, int64_t position, int unit) {
  using C = compute_t<T>;
  const int at = unit % r.packs * N, firstHead = unit / r.packs * kHeads, width = 2 * r.half;
  const C* angles = r.table + position * width + at;
  const Wide<C, N> cosines = loadAngles<N>(angles);
  Wide<C, N> sines = loadAngles<N>(angles + r.half);
  KG_UNROLL for (int i = 0; i < N; i++) sines.v[i] *= r.direction;
  const T* x = r.x + token * r.tokenStride + at;
  T* y = r.y + token * r.heads * width + at;
  Pair<T, N> held[kHeads];  // all loads before the first store
  KG_UNROLL for (int i = 0; i < kHeads; i++) {
    const T* from = x + (firstHead + i) * r.headStride;
    if (firstHead + i < r.heads) held[i] = {loadPack<T, N>(from), loadPack<T, N>(from + r.half)};
  }
  KG_UNROLL for (int i = 0; i < kHeads; i++) {
    if (firstHead + i >= r.heads) continue;
    const Pair<T, N> turned = rotate(held[i], cosines, sines);
    T* to = y + static_cast<int64_t>(firstHead + i) * width;
    storePack<T, N>(to, turned.low);
    storePack<T, N>(to + r.half, turned.high);
  }
}

template <class T, int N>
KG_GLOBAL void KG_LAUNCH_BOUNDS(kThreads) rotaryKernel(Rotation<T> r, int tokensPerBlock) {
  const int slot = static_cast<int>(threadIdx.x) / r.units;  // 0 where a token takes the whole block
  const int64_t token = static_cast<int64_t>(blockIdx.x) * tokensPerBlock + slot;
  if (slot >= tokensPerBlock || token >= r.tokens) return;
  const int64_t position = r.positions[token];
  if (position < 0 || position >= r.tableRows)
    return reportFault(r.faults, FaultKind::IdOutOfRange, position, token, r.tableRows);
  const int step = tokensPerBlock == 1 ? kThreads : r.units;
  for (int unit = static_cast<int>(threadIdx.x) - slot * r.units; unit < r.units; unit += step)
    rotateUnit<T, N>(r, token, position, unit);
}

template <class T, int N>
void enqueue(const Call& call, Rotation<T>& r) {
  r.packs = r.half / N;
  r.units = r.packs * static_cast<int>(ceilDiv(r.heads, kHeads));
  if (r.units == 0) return;
  const int tokensPerBlock = r.units < kThreads ? kThreads / r.units : 1;
  launch(call, {gridOf(ceilDiv(r.tokens, tokensPerBlock)), kThreads}, rotaryKernel<T, N>, r, tokensPerBlock);
}

template <class T>
void rotary(const Call& call) {
  const TensorView &x = call[1], &table = call[3];
  Rotation<T> r{};
  r.y = call[0].ptr<T>();
  r.x = x.ptr<T>();
  r.positions = call[2].ptr<int32_t>();
  r.table = table.ptr<compute_t<T>>();
  r.tokens = x.size(0);
  r.tokenStride = x.stride(0);
  r.headStride = x.stride(1);
  r.tableRows = table.size(0);
  r.heads = static_cast<int>(x.size(1));
  r.half = static_cast<int>(x.size(2) / 2);
  r.direction = call.attr(0) != 0 ? -1 : 1;
  r.faults = context(call).faults;
  const bool aligned = onPacks(call[0], r.half) && onPacks(x, r.half) && onPacks(x, x.stride(0)) &&
                       onPacks(x, x.stride(1)) && onPacks(table, r.half);
  aligned ? enqueue<T, kPack<T>>(call, r) : enqueue<T, 1>(call, r);
}

}  // namespace

void kernel_rotary(const Call& call) {
  dispatchFloat(call[0].dtype, [&](auto tag) { rotary<typename decltype(tag)::type>(call); });
}

}  // namespace kg::cuda
