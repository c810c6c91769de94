// Packing: a strip of a strided matrix rewritten as a panel, [k][width] with the strip's width running fastest, so that
// the micro-kernel reads both operands in order. Converts bfloat16 on the way, or pairs it. Never reads outside the
// strip.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/gemm_kernel.h"

namespace kg::cpu::KG_ISA {

// A strip: element (w, k) at p[w * wStride + k * kStride].
template <class In>
struct GemmStrip {
  const In* p;
  int64_t wStride, kStride;
};

template <class V, int Block, bool High, int... I>
KG_INLINE V gemmBlend(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  // Blocks of `Block` lanes: the lower (higher) one of each pair from a, then the same of b.
  return __builtin_shufflevector(a, b, ((I & Block) ? n + (High ? I : I - Block) : (High ? I + Block : I))...);
}

// Transposes v[i][lane] in place by a butterfly of log2(n) steps.
template <class V, int N, int Block = 1>
KG_INLINE void gemmTranspose(V* v) {
  if constexpr (Block < N) {
    using Lanes = std::make_integer_sequence<int, N>;
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) {
      if (i & Block) continue;
      V low = gemmBlend<V, Block, false>(v[i], v[i + Block], Lanes{});
      V high = gemmBlend<V, Block, true>(v[i], v[i + Block], Lanes{});
      v[i] = low;
      v[i + Block] = high;
    }
    gemmTranspose<V, N, Block * 2>(v);
  }
}

// One packed element, and n of them that lie side by side along k or along w.
template <class P>
struct GemmPacker {
  using In = typename P::In;
  using Packed = typename P::Packed;
  static constexpr int lanes = KG_GEMM_BYTES / sizeof(Packed);
  static constexpr bool widen = !std::is_same_v<In, Packed> && P::kPair == 1;

  template <int N>
  struct Types {
    typedef Packed Out __attribute__((vector_size(N * sizeof(Packed))));
    typedef uint16_t Half __attribute__((vector_size(N * 2)));
    typedef uint32_t Word __attribute__((vector_size(N * 4)));
  };

  template <int N>
  static KG_INLINE typename Types<N>::Word words(const void* p) {
    typename Types<N>::Half h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, typename Types<N>::Word);
  }

  // N packed elements k, k + 1, ... of one w (kStride 1).
  template <int N>
  static KG_INLINE typename Types<N>::Out alongK(const In* p) {
    using V = typename Types<N>::Out;
    if constexpr (widen)
      return (V)(words<N>(p) << 16);
    else
      return gemmLoad<V>(p);
  }

  // N packed elements of consecutive w (wStride 1) at one packed k; `next` is the distance to the pair's second half.
  template <int N>
  static KG_INLINE void alongW(const In* p, int64_t next, bool pair, Packed* to) {
    typename Types<N>::Out v;
    if constexpr (P::kPair == 2) {
      v = words<N>(p);
      if (pair) v |= words<N>(p + next) << 16;
    } else if constexpr (widen) {
      v = (typename Types<N>::Out)(words<N>(p) << 16);
    } else {
      memcpy(&v, p, sizeof v);
    }
    memcpy(to, &v, sizeof v);
  }

  static KG_INLINE Packed one(const In* p, int64_t next, bool pair) {
    if constexpr (P::kPair == 2)
      return p->bits | (pair ? static_cast<uint32_t>(p[next].bits) << 16 : 0u);
    else
      return *p;
  }
};

// `width` elements of consecutive w, by vectors of N and a last one that overlaps its predecessor.
template <class P, int N>
KG_INLINE void gemmCopyRow(const typename P::In* p, int64_t next, bool pair, int64_t width, typename P::Packed* to) {
  int64_t w = 0;
  for (; w + N <= width; w += N) GemmPacker<P>::template alongW<N>(p + w, next, pair, to + w);
  if (w < width) {
    if constexpr (N == 1)
      return;
    else if (width >= N)
      GemmPacker<P>::template alongW<N>(p + width - N, next, pair, to + width - N);
    else
      gemmCopyRow<P, N / 2>(p, next, pair, width, to);
  }
}

// wStride 1: rows are copied. Whole vectors may read past the width, though never past the strip's last element, and
// write past it, though never past the last row: what is too much, the next row replaces.
template <class P>
void gemmPackRows(const GemmStrip<typename P::In>& s, int64_t width, int64_t padded, int64_t depth,
                  typename P::Packed* to) {
  constexpr int lanes = GemmPacker<P>::lanes;
  const int64_t units = (depth + P::kPair - 1) / P::kPair;
  const int64_t whole = (width + lanes - 1) / lanes * lanes;
  const bool ascending = s.kStride > 0 && padded == width;
  const int64_t end = (depth - 1) * s.kStride + width;
  for (int64_t u = 0; u < units; u++, to += padded) {
    const int64_t k = u * P::kPair;
    const bool pair = k + 1 < depth;
    const typename P::In* row = s.p + k * s.kStride;
    if (ascending && u + 1 < units && (k + P::kPair - 1) * s.kStride + whole <= end) {
      for (int64_t w = 0; w < width; w += lanes)
        GemmPacker<P>::template alongW<lanes>(row + w, s.kStride, pair, to + w);
      continue;
    }
    gemmCopyRow<P, lanes>(row, s.kStride, pair, width, to);
    for (int64_t w = width; w < padded; w++) to[w] = 0;
  }
}

// Any strides, packed elements [from, depth) of k.
template <class P>
void gemmPackScalar(const GemmStrip<typename P::In>& s, int64_t width, int64_t padded, int64_t from, int64_t depth,
                    typename P::Packed* to) {
  for (int64_t k = from; k < depth; k += P::kPair) {
    typename P::Packed* row = to + k / P::kPair * padded;
    for (int64_t w = 0; w < padded; w++)
      row[w] = w < width ? GemmPacker<P>::one(s.p + w * s.wStride + k * s.kStride, s.kStride, k + 1 < depth)
                         : typename P::Packed(0);
  }
}

// One square of N x N packed elements, all of w from `width` on taken as zero.
template <class P, int N>
KG_INLINE void gemmPackSquare(const typename P::In* p, int64_t wStride, int64_t width, int64_t padded,
                              typename P::Packed* to) {
  using V = typename GemmPacker<P>::template Types<N>::Out;
  V v[N];
  if (width >= N) {
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) v[i] = GemmPacker<P>::template alongK<N>(p + i * wStride);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) v[i] = i < width ? GemmPacker<P>::template alongK<N>(p + i * wStride) : V{};
  }
  gemmTranspose<V, N>(v);
#pragma GCC unroll 16
  for (int i = 0; i < N; i++) gemmStore(to + i * padded, v[i]);
}

// kStride 1: squares of N x N are transposed, the last one along k overlapping its predecessor. A square may write up
// to N - 1 elements past its row, which later writes replace (so the squares of a row go from the last to the first),
// or past the panel, where the next panel follows or gemmPackSlack elements of slack.
template <class P, int N>
void gemmPackColumns(const GemmStrip<typename P::In>& s, int64_t width, int64_t padded, int64_t depth,
                     typename P::Packed* to) {
  const int64_t main = depth / P::kPair * P::kPair, step = N * P::kPair;
  if (main < step) {
    if constexpr (N > 4)
      return gemmPackColumns<P, N / 2>(s, width, padded, depth, to);
    else
      return gemmPackScalar<P>(s, width, padded, 0, depth, to);
  }
  for (int64_t k = 0; k < main; k += step) {
    const int64_t at = k + step <= main ? k : main - step;
    for (int64_t g = (padded - 1) / N * N; g >= 0; g -= N)
      gemmPackSquare<P, N>(s.p + g * s.wStride + at, s.wStride, width - g, padded, to + at / P::kPair * padded + g);
  }
  gemmPackScalar<P>(s, width, padded, main, depth, to);
}

template <class P>
constexpr int64_t gemmPackSlack = GemmPacker<P>::lanes;

// One w, kStride 1: nothing to rearrange.
template <class P>
void gemmPackLine(const GemmStrip<typename P::In>& s, int64_t depth, typename P::Packed* to) {
  constexpr int64_t step = GemmPacker<P>::lanes * P::kPair;
  int64_t k = 0;
  for (; k + step <= depth; k += step)
    gemmStore(to + k / P::kPair, GemmPacker<P>::template alongK<GemmPacker<P>::lanes>(s.p + k));
  gemmPackScalar<P>(s, 1, 1, k, depth, to);
}

// Packs w in [0, width) x k in [0, depth) of the strip into [ceil(depth / kPair)][padded], zeros beyond `width`.
template <class P>
void gemmPack(const GemmStrip<typename P::In>& s, int64_t width, int64_t padded, int64_t depth,
              typename P::Packed* to) {
  if (padded == 1 && s.kStride == 1)
    gemmPackLine<P>(s, depth, to);
  else if (s.wStride == 1)
    gemmPackRows<P>(s, width, padded, depth, to);
  else if (s.kStride == 1)
    gemmPackColumns<P, GemmPacker<P>::lanes>(s, width, padded, depth, to);
  else
    gemmPackScalar<P>(s, width, padded, 0, depth, to);
}

// Packs `width` w as panels of `panel` columns, one behind the other; the last one has what is left, rounded up to
// `lanes`. Where rows lie along w they are read a few at a time across all panels, not one panel's sliver after
// another.
template <class P>
void gemmPackPanels(const GemmStrip<typename P::In>& s, int64_t width, int64_t panel, int64_t lanes, int64_t depth,
                    typename P::Packed* to) {
  const int64_t units = (depth + P::kPair - 1) / P::kPair;
  const int64_t step = s.wStride == 1 && s.kStride != 1 ? 8 * P::kPair : depth;
  for (int64_t k = 0; k < depth; k += step) {
    const int64_t part = depth - k < step ? depth - k : step;
    for (int64_t w = 0; w < width; w += panel) {
      const int64_t columns = width - w < panel ? width - w : panel;
      const int64_t padded = (columns + lanes - 1) / lanes * lanes;
      gemmPack<P>({s.p + w * s.wStride + k * s.kStride, s.wStride, s.kStride}, columns, padded, part,
                  to + w * units + k / P::kPair * padded);
    }
  }
}

}  // namespace kg::cpu::KG_ISA
