// The micro-kernels of the matrix product: one tile of C from two packed panels, accumulators in registers.
// Knows nothing of loops over blocks, of threads or of memory beyond its tile.
//
// Every element of C is acc = fma(a, b, acc) over ascending k within a block of K, whatever the size of the tile it
// falls into: that is what makes a row independent of its neighbours. Keep it so.
#pragma once

#include <cstdint>
#include <cstring>

#include "runtime/dtype.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define KG_GEMM_BYTES 64
#define KG_GEMM_ROWS 14
#define KG_GEMM_VECTORS 2
#elif defined(__AVX2__)
#define KG_GEMM_BYTES 32
#define KG_GEMM_ROWS 6
#define KG_GEMM_VECTORS 2
#elif defined(__aarch64__)
#define KG_GEMM_BYTES 16
#define KG_GEMM_ROWS 7
#define KG_GEMM_VECTORS 3
#else
#define KG_GEMM_BYTES 16
#define KG_GEMM_ROWS 6
#define KG_GEMM_VECTORS 2
#endif

namespace kg::cpu::KG_ISA {

template <class T>
struct GemmVector {
  typedef T type __attribute__((vector_size(KG_GEMM_BYTES)));
};

// How a product is computed: In is what memory holds, Packed what a panel holds, Acc what is accumulated. A packed
// element covers kPair consecutive k.
template <class T>
struct GemmPlain {
  using In = T;
  using Packed = T;
  using Acc = T;
  using V = typename GemmVector<T>::type;
  static constexpr int kPair = 1;
  static KG_INLINE V madd(Packed a, V b, V acc) { return acc + a * b; }
};

// bfloat16 converted to float when packed.
struct GemmBf16 : GemmPlain<float> {
  using In = bf16;
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 for vdpbf16ps, which treats subnormal numbers as zero.
struct GemmBf16Dot {
  using In = bf16;
  using Packed = uint32_t;
  using Acc = float;
  using V = GemmVector<float>::type;
  static constexpr int kPair = 2;
  static KG_INLINE V madd(Packed a, V b, V acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
  }
};
#endif

// Memory that will be asked for once a tile is summed: to be brought into the cache meanwhile, a little at a time,
// since all at once holds up the loads of the sums.
struct GemmLines {
  static constexpr int kMost = 4 * 2 * KG_GEMM_ROWS;  // four matrices
  const void* at[kMost];
  int count = 0;

  template <class T>
  KG_INLINE void add(const T* p, int64_t rows, int64_t columns, int64_t row) {
    for (int64_t i = 0; i < rows; i++, p += row) {
      at[count++] = p;
      at[count++] = p + columns - 1;
    }
  }
};

// Where a tile goes. `direct`: a full tile of C in the type of the accumulators, to be written in place; otherwise the
// scaled sums are left in `buffer` (rows of tileColumns) for the caller.
template <class Acc>
struct GemmTile {
  Acc alpha;
  bool direct, accumulate;
  Acc* c;
  int64_t cRow;
  const Acc* bias;  // of the tile's columns, or null
  Acc* buffer;
  GemmLines lines;  // none and `direct`: C's, all at once
};

template <class P>
struct GemmShape {
  static constexpr int lanes = KG_GEMM_BYTES / sizeof(typename P::Acc);
  static constexpr int rows = KG_GEMM_ROWS;
  static constexpr int vectors = KG_GEMM_VECTORS;
  static constexpr int columns = lanes * vectors;
};

template <class V, class T>
KG_INLINE V gemmLoad(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
KG_INLINE void gemmStore(T* p, V v) {
  memcpy(p, &v, sizeof v);
}

// Keeps the compiler from fusing the scaling with the sum that follows in some tiles and not in others.
template <class V>
KG_INLINE V gemmRounded(V v) {
#if defined(__x86_64__) && defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// Rows x (vectors * lanes) of C over `depth` packed elements. a: [depth][Rows]; b: [depth] rows at distance bRow.
template <class P, int Rows, int Vectors>
void gemmKernel(int64_t depth, const typename P::Packed* a, const typename P::Packed* b, int64_t bRow,
                const GemmTile<typename P::Acc>& tile) {
  using V = typename P::V;
  constexpr int lanes = GemmShape<P>::lanes;
  V acc[Rows][Vectors] = {};
  if (tile.direct && tile.lines.count == 0) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; i++) {
      __builtin_prefetch(tile.c + i * tile.cRow, 1);
      __builtin_prefetch(tile.c + i * tile.cRow + lanes * Vectors - 1, 1);
    }
  }
  const int64_t step = tile.lines.count > 0 ? 4 : depth;
  // All lines by three quarters of the way; one loop where there are none.
  const int64_t atOnce = tile.lines.count * 16 / (3 * depth + 1) + 1;
  const void* const* line = tile.lines.at;
  const void* const* const lastLine = line + tile.lines.count;
  for (int64_t k = 0; k < depth; k += step) {
    for (int64_t n = 0; n < atOnce && line < lastLine; n++) __builtin_prefetch(*line++, 1);
    for (int64_t left = depth - k < step ? depth - k : step; left > 0; left--) {
      V bv[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; j++) bv[j] = gemmLoad<V>(b + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; j++) acc[i][j] = P::madd(a[i], bv[j], acc[i][j]);
      }
      a += Rows;
      b += bRow;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; i++) {
    auto* to = tile.direct ? tile.c + i * tile.cRow : tile.buffer + i * GemmShape<P>::columns;
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; j++) {
      V v = gemmRounded(acc[i][j] * tile.alpha);
      if (tile.direct && tile.bias) v += gemmLoad<V>(tile.bias + j * lanes);
      if (tile.direct && tile.accumulate) v += gemmLoad<V>(to + j * lanes);
      gemmStore(to + j * lanes, v);
    }
  }
}

template <class P>
using GemmKernelFn = void (*)(int64_t, const typename P::Packed*, const typename P::Packed*, int64_t,
                              const GemmTile<typename P::Acc>&);

// kernels()[(rows - 1) * vectors + (vectors - 1)].
template <class P>
struct GemmKernels {
  static constexpr int count = GemmShape<P>::rows * GemmShape<P>::vectors;
  GemmKernelFn<P> at[count];

  template <int I>
  constexpr void fill() {
    if constexpr (I < count) {
      at[I] = &gemmKernel<P, I / GemmShape<P>::vectors + 1, I % GemmShape<P>::vectors + 1>;
      fill<I + 1>();
    }
  }
  constexpr GemmKernels() : at{} { fill<0>(); }

  KG_INLINE GemmKernelFn<P> get(int64_t rows, int64_t vectors) const {
    return at[(rows - 1) * GemmShape<P>::vectors + vectors - 1];
  }
};

template <class P>
inline constexpr GemmKernels<P> gemmKernels{};

}  // namespace kg::cpu::KG_ISA
