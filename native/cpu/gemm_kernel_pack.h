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
  typedef Packed V __attribute__((vector_size(KG_GEMM_BYTES)));
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

  // Packed elements k, k + 1, ... of one w (kStride 1).
  static KG_INLINE V alongK(const In* p) {
    if constexpr (widen)
      return (V)(words<lanes>(p) << 16);
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

// wStride 1: rows are copied.
template <class P>
void gemmPackRows(const GemmStrip<typename P::In>& s, int64_t width, int64_t padded, int64_t depth,
                  typename P::Packed* to) {
  constexpr int lanes = GemmPacker<P>::lanes;
  const int64_t units = (depth + P::kPair - 1) / P::kPair;
  for (int64_t u = 0; u < units; u++, to += padded) {
    const int64_t k = u * P::kPair;
    gemmCopyRow<P, (lanes > 1 ? lanes : 1)>(s.p + k * s.kStride, s.kStride, k + 1 < depth, width, to);
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

// kStride 1: squares of lanes x lanes are transposed. A square may write up to lanes - 1 elements past its row, which
// later writes replace; the groups of a row go from the last to the first for that reason, and the rest of k, written
// last, leaves nothing beyond the panel but the slack of gemmPackSlack elements.
template <class P>
void gemmPackColumns(const GemmStrip<typename P::In>& s, int64_t width, int64_t padded, int64_t depth,
                     typename P::Packed* to) {
  using V = typename GemmPacker<P>::V;
  constexpr int lanes = GemmPacker<P>::lanes;
  constexpr int64_t step = lanes * P::kPair;
  int64_t k = 0;
  for (; k + step <= depth; k += step) {
    typename P::Packed* square = to + k / P::kPair * padded;
    for (int64_t g = (padded - 1) / lanes * lanes; g >= 0; g -= lanes) {
      V v[lanes];
      const typename P::In* p = s.p + g * s.wStride + k;
      if (g + lanes <= width) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; i++) v[i] = GemmPacker<P>::alongK(p + i * s.wStride);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; i++) v[i] = g + i < width ? GemmPacker<P>::alongK(p + i * s.wStride) : V{};
      }
      gemmTranspose<V, lanes>(v);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i++) gemmStore(square + i * padded + g, v[i]);
    }
  }
  gemmPackScalar<P>(s, width, padded, k, depth, to);
}

template <class P>
constexpr int64_t gemmPackSlack = GemmPacker<P>::lanes;

// One w, kStride 1: nothing to rearrange.
template <class P>
void gemmPackLine(const GemmStrip<typename P::In>& s, int64_t depth, typename P::Packed* to) {
  constexpr int64_t step = GemmPacker<P>::lanes * P::kPair;
  int64_t k = 0;
  for (; k + step <= depth; k += step) gemmStore(to + k / P::kPair, GemmPacker<P>::alongK(s.p + k));
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
    gemmPackColumns<P>(s, width, padded, depth, to);
  else
    gemmPackScalar<P>(s, width, padded, 0, depth, to);
}

}  // namespace kg::cpu::KG_ISA
