// Walking several strided views of one shape together, as cpu/strided.h does: equal and mergeable axes are folded on
// the host, then a kernel turns the number of an item (a pack of neighbours along the innermost axis) into offsets by
// multiplications alone. Knows no arithmetic on elements: kernels supply it.
//
// Items are numbered in 32 bits and offsets computed in 64: what has more items than that is cut on the host.
#pragma once

#include <type_traits>

#include "cuda/block.h"

namespace kg::cuda {

constexpr int kMaxOperands = 4;
constexpr int kItemThreads = 256;  // threads a block of the kernels that go item by item

// ---- division by a number known on the host: one multiplication, exact for n < 2^31 ---------------------------------
struct Divisor {
  uint32_t by, factor, shift;
};
// q = (n + floor(n factor / 2^32)) >> shift, with 2^shift the power of two not below `by` (Granlund & Montgomery 1994).
inline Divisor makeDivisor(int64_t by) {
  const uint64_t d = static_cast<uint64_t>(by);
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < d) shift++;
  const uint64_t factor = (((uint64_t{1} << shift) - d) << 32) / d + 1;
  return {static_cast<uint32_t>(d), static_cast<uint32_t>(factor), shift};
}
KG_DEVICE uint32_t divide(uint32_t n, const Divisor& d, uint32_t* remainder) {
  const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * d.factor) >> 32);
  const uint32_t quotient = (n + high) >> d.shift;
  *remainder = n - quotient * d.by;
  return quotient;
}

// ---- host: the views after folding ----------------------------------------------------------------------------------
// Views of one shape, the output first: ndim >= 1 and no axis of length 1 unless it is the only one. data is null for a
// number.
struct Walk {
  int ndim;
  int operands;
  int64_t numel;
  int64_t shape[kMaxDims];
  int64_t strides[kMaxOperands][kMaxDims];
  char* data[kMaxOperands];
  int32_t elementSize[kMaxOperands];

  int64_t inner() const { return shape[ndim - 1]; }
  int64_t innerStride(int operand) const { return strides[operand][ndim - 1]; }
};

// Axes are ordered by falling stride of the output, so that it is written in memory order. Fails on unequal shapes.
Walk makeWalk(const TensorView* const* views, int count);
// A number as an operand: no data, stride 0 in every axis.
TensorView numberView(const TensorView& like, DType dtype);
// True where packs of `width` elements along the innermost axis can be moved in 16-byte pieces: the output's elements
// and an input's lie one after another (or an input's are all the same), packs begin on their size, and lines end with
// one.
bool packable(const Walk& walk, int width);
// The walk without one of its axes.
void dropAxis(Walk& walk, int axis);

// f(piece) for pieces of at most 2^30 elements that make up the walk.
template <class F>
void forPieces(const Walk& walk, F f) {
  constexpr int64_t kPiece = int64_t{1} << 30;
  if (walk.numel == 0) return;
  if (walk.numel <= kPiece) return f(walk);
  const int64_t plane = walk.numel / walk.shape[0], step = plane < kPiece ? kPiece / plane : 1;
  for (int64_t first = 0; first < walk.shape[0]; first += step) {
    Walk piece = walk;
    piece.shape[0] = walk.shape[0] - first < step ? walk.shape[0] - first : step;
    piece.numel = piece.shape[0] * plane;
    for (int o = 0; o < walk.operands; o++) piece.data[o] += first * walk.strides[o][0] * walk.elementSize[o];
    if (plane > kPiece) dropAxis(piece, 0);
    forPieces(piece, f);
  }
}

// What kernels are given by value has no padding beside arrays: gcc 12 clears it in the wrong place where it is told to
// initialize variables (-ftrivial-auto-var-init, as the SIMT layer is built).
template <class T>
constexpr bool kDense = std::has_unique_object_representations_v<T>;

// ---- what a kernel is given -----------------------------------------------------------------------------------------
template <int N>
struct Layout {
  uint32_t items;
  uint32_t innerLength;  // elements
  int32_t outerAxes;
  Divisor itemsPerLine;
  Divisor lengths[kMaxDims];     // of the outer axes, from the inside
  int64_t strides[N][kMaxDims];  // in elements: the innermost axis, then the outer ones from the inside
  char* data[N];

  KG_DEVICE bool splat(int operand) const { return strides[operand][0] == 0; }
};

template <int N>
Layout<N> makeLayout(const Walk& walk, int width) {
  static_assert(kDense<Layout<N>>);
  Layout<N> l{};
  const int64_t perLine = ceilDiv(walk.inner(), width);
  l.items = static_cast<uint32_t>(walk.numel / walk.inner() * perLine);
  l.innerLength = static_cast<uint32_t>(walk.inner());
  l.outerAxes = walk.ndim - 1;
  l.itemsPerLine = makeDivisor(perLine);
  for (int d = 0; d < l.outerAxes; d++) l.lengths[d] = makeDivisor(walk.shape[walk.ndim - 2 - d]);
  for (int o = 0; o < N; o++) {
    l.data[o] = walk.data[o];
    for (int d = 0; d < walk.ndim; d++) l.strides[o][d] = walk.strides[o][walk.ndim - 1 - d];
  }
  return l;
}

// Where item `index` of packs of V begins in each operand, in elements; returns how many elements it has.
template <int V, int N>
KG_DEVICE int locate(const Layout<N>& l, uint32_t index, int64_t (&offset)[N]) {
  uint32_t within = index, line = 0;
  if (l.outerAxes > 0) line = divide(index, l.itemsPerLine, &within);
  within *= V;
  KG_UNROLL for (int o = 0; o < N; o++) offset[o] = within * l.strides[o][0];
  KG_UNROLL_BY(1) for (int d = 0; d < l.outerAxes; d++) {
    uint32_t coordinate = line;
    if (d + 1 < l.outerAxes) line = divide(line, l.lengths[d], &coordinate);
    KG_UNROLL for (int o = 0; o < N; o++) offset[o] += coordinate * l.strides[o][d + 1];
  }
  const uint32_t left = l.innerLength - within;
  return V == 1 || left >= V ? V : static_cast<int>(left);
}

// f(offsets, count) for this thread's items of the grid.
template <int V, int N, class F>
KG_DEVICE void forItems(const Layout<N>& l, F f) {
  const uint32_t step = gridDim.x * blockDim.x;
  KG_UNROLL_BY(1) for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < l.items; i += step) {
    int64_t offset[N];
    const int count = locate<V>(l, i, offset);
    f(offset, count);
  }
}

// ---- packs of V elements in registers; `count` of them are in memory ------------------------------------------------
template <class T, int V>
constexpr int kPieceOf = sizeof(T) * V <= 16 ? V : 16 / static_cast<int>(sizeof(T));

template <int V, class T>
KG_DEVICE void loadItem(const T* at, bool splat, int count, T (&v)[V]) {
  if constexpr (V == 1) {
    v[0] = *at;
  } else if (splat) {
    const T one = *at;
    KG_UNROLL for (int i = 0; i < V; i++) v[i] = one;
  } else if (count == V) {
    constexpr int kPiece = kPieceOf<T, V>;
    KG_UNROLL for (int i = 0; i < V; i += kPiece) {
      const Pack<T, kPiece> p = loadPack<T, kPiece>(at + i);
      KG_UNROLL for (int j = 0; j < kPiece; j++) v[i + j] = p.v[j];
    }
  } else {
    KG_UNROLL for (int i = 0; i < V; i++) v[i] = i < count ? at[i] : T();
  }
}

template <int V, class T>
KG_DEVICE void storeItem(T* at, int count, const T (&v)[V]) {
  if constexpr (V == 1) {
    *at = v[0];
  } else if (count == V) {
    constexpr int kPiece = kPieceOf<T, V>;
    KG_UNROLL for (int i = 0; i < V; i += kPiece) {
      Pack<T, kPiece> p;
      KG_UNROLL for (int j = 0; j < kPiece; j++) p.v[j] = v[i + j];
      storePack<T, kPiece>(at + i, p);
    }
  } else {
    KG_UNROLL for (int i = 0; i < V; i++) {
      if (i < count) at[i] = v[i];
    }
  }
}

// From the type of arithmetic to the one in memory, to nearest even.
template <int V, class T, class C>
KG_DEVICE void roundItem(const C (&from)[V], T (&to)[V]) {
  if constexpr (V % 2 == 0 && sizeof(T) == 2 && sizeof(C) == 4) {
    KG_UNROLL for (int i = 0; i < V; i += 2) {
      const uint32_t both = packBf16(from[i], from[i + 1]);
      to[i].bits = static_cast<uint16_t>(both);
      to[i + 1].bits = static_cast<uint16_t>(both >> 16);
    }
  } else {
    KG_UNROLL for (int i = 0; i < V; i++) to[i] = static_cast<T>(from[i]);
  }
}

// Blocks for `items` items, one a thread until the device is well filled: enough blocks that the last wave is short.
inline dim3 gridFor(const Context& on, int64_t items, int threads = kItemThreads) {
  const int64_t wanted = ceilDiv(items, threads), most = int64_t{on.processors} * 64;
  return gridOf(wanted < most ? wanted : most);
}

template <int N, class... P, class... A>
void launchItems(const Call& call, const Layout<N>& layout, void (*kernel)(Layout<N>, P...), A... arguments) {
  launch(call, {gridFor(context(call), layout.items), kItemThreads}, kernel, layout, arguments...);
}

}  // namespace kg::cuda
