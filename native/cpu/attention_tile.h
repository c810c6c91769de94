// The inner loops of attention: register-blocked products over packed tiles, and the packing itself.
//
// Query rows are LANES: tiles are kept transposed, [key or feature][lane], so that the softmax of a row never crosses a
// vector and every row sees one order of operations wherever in a tile it falls. A lane is (row, query head of the
// group). Knows no segments and no tensors.
#pragma once

#include "cpu/vec.h"
#include "runtime/dtype.h"

namespace kg::cpu::KG_ISA::attention {

constexpr int kKeyTile = 64;  // keys a tile, aligned on the logical key sequence: part of a row's order of summation
constexpr int kChunkLanes = 192;  // about so many lanes share one visit of a key tile

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8, kTileVecs = 3;  // 32 registers: 24 accumulators
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kTileVecs = 3;
#else
constexpr int kTileRows = 4, kTileVecs = 2;
#endif

template <class C>
constexpr int kLanes = kTileVecs * Vec<C>::N;  // lanes a block

KG_INLINE constexpr int64_t roundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class C>
KG_INLINE int64_t paddedDim(int64_t D) {
  return roundUp(D, Vec<C>::N > kTileRows ? Vec<C>::N : kTileRows);
}

enum class Start { Zero, Add, Scale };       // an accumulator starts from 0, from c, or from c * factor[lane]
enum class Order { RowMajor, ColumnMajor };  // a(i, k) = a[i * lda + k] or a[k * lda + i]

// c[i][j] = start + sum_k a(i, k) b[k][j] for MR rows and NV vectors, k ascending.
template <int MR, int NV, Order O, Start S, class C>
KG_INLINE void registerTile(int64_t K, const C* a, int64_t lda, const C* b, int64_t ldb, C* c, int64_t ldc,
                            const C* factor) {
  using V = Vec<C>;
  V acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      acc[i][j] = S == Start::Zero ? V(C(0)) : V::load(c + i * ldc + j * V::N);
      if (S == Start::Scale) acc[i][j] = acc[i][j] * V::load(factor + j * V::N);
    }
#pragma GCC unroll 1  // a short constant K, peeled, spills the accumulators
  for (int64_t k = 0; k < K; k++) {
    V row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) row[j] = V::load(b + k * ldb + j * V::N);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const V x(O == Order::RowMajor ? a[i * lda + k] : a[k * lda + i]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) acc[i][j] = fma(x, row[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[i][j].store(c + i * ldc + j * V::N);
}

// c[M][lanes] = start + a[M, K] b[K][lanes]; M a multiple of kTileRows. b and c are lane tiles.
template <Order O, Start S, class C>
static void laneProduct(int64_t M, int64_t K, const C* a, int64_t lda, const C* b, C* c, const C* factor = nullptr) {
  constexpr int W = kLanes<C>;
  for (int64_t i = 0; i < M; i += kTileRows)
    registerTile<kTileRows, kTileVecs, O, S>(K, a + i * (O == Order::RowMajor ? lda : 1), lda, b, W, c + i * W, W,
                                             factor);
}

// c[M][Dp] += a[M][lanes] b[lanes][Dp]; M a multiple of kTileRows.
template <class C>
static void rowProduct(int64_t M, const C* a, const C* b, C* c, int64_t Dp) {
  constexpr int W = kLanes<C>, N = Vec<C>::N;
  for (int64_t d = 0; d < Dp;) {
    const int64_t left = (Dp - d) / N;
    const int vecs = left >= kTileVecs && left != 4 ? kTileVecs : left >= 2 ? 2 : 1;  // 4 = 2 + 2, not 3 + 1
    for (int64_t i = 0; i < M; i += kTileRows) {
      if (vecs == kTileVecs)
        registerTile<kTileRows, kTileVecs, Order::RowMajor, Start::Add>(W, a + i * W, W, b + d, Dp, c + i * Dp + d, Dp,
                                                                        a);
      else if (vecs == 2)
        registerTile<kTileRows, 2, Order::RowMajor, Start::Add>(W, a + i * W, W, b + d, Dp, c + i * Dp + d, Dp, a);
      else
        registerTile<kTileRows, 1, Order::RowMajor, Start::Add>(W, a + i * W, W, b + d, Dp, c + i * Dp + d, Dp, a);
    }
    d += vecs * N;
  }
}

// dst[Dp] = factor * src[D], zeros behind.
template <class T, class C>
KG_INLINE void packRow(const T* src, int64_t D, C factor, C* dst, int64_t Dp) {
  using V = Vec<C>;
  int64_t d = 0;
  for (; d + V::N <= D; d += V::N) (V::load(src + d) * V(factor)).store(dst + d);
  if (d < D) {
    (V::loadPartial(src + d, static_cast<int>(D - d)) * V(factor)).store(dst + d);
    d += V::N;
  }
  for (; d < Dp; d += V::N) V(C(0)).store(dst + d);
}

// dst[D] = factor * src[D], rounded once to T.
template <class T, class C>
KG_INLINE void storeRow(const C* src, C factor, T* dst, int64_t D) {
  using V = Vec<C>;
  int64_t d = 0;
  for (; d + V::N <= D; d += V::N) (V::load(src + d) * V(factor)).store(dst + d);
  if (d < D) (V::load(src + d) * V(factor)).storePartial(dst + d, static_cast<int>(D - d));
}

// e^x for x that is 0 at most but for rounding: a probability. Subnormal results are 0; NaN stays. Half the work of
// vexp.
template <class C>
KG_INLINE Vec<C> expOfDifference(Vec<C> x) {
  using K = MathConstants<C>;
  const Vec<C> lowest(sizeof(C) == 4 ? C(-87.0) : C(-708.0));
  const Reduced<C> d = reduceByLn2(max(lowest, x));
  const Vec<C> y = fma(d.r * d.r, polynomial(d.r, K::expPoly), d.r) + Vec<C>(C(1));
  return select(x < lowest, Vec<C>(C(0)), y * powerOfTwo<C>(d.n));
}

typedef float Quad __attribute__((vector_size(16)));
typedef double Pair __attribute__((vector_size(16)));

KG_INLINE void transposeBlock(const float* src, int64_t lds, float* dst, int64_t ldd) {
  Quad r[4];
  for (int i = 0; i < 4; i++) memcpy(&r[i], src + i * lds, sizeof(Quad));
  const Quad a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  const Quad c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
  for (int i = 0; i < 4; i++) memcpy(dst + i * ldd, &r[i], sizeof(Quad));
}

KG_INLINE void transposeBlock(const double* src, int64_t lds, double* dst, int64_t ldd) {
  Pair r[2];
  for (int i = 0; i < 2; i++) memcpy(&r[i], src + i * lds, sizeof(Pair));
  const Pair low = __builtin_shufflevector(r[0], r[1], 0, 2), high = __builtin_shufflevector(r[0], r[1], 1, 3);
  memcpy(dst, &low, sizeof(Pair));
  memcpy(dst + ldd, &high, sizeof(Pair));
}

// dst[columns][rows] = src[rows][columns]^T; both lengths multiples of four.
template <class C>
static void transpose(const C* src, int64_t rows, int64_t columns, C* dst) {
  constexpr int B = 16 / sizeof(C);
  for (int64_t j = 0; j < columns; j += B)
    for (int64_t i = 0; i < rows; i += B) transposeBlock(src + i * columns + j, columns, dst + j * rows + i, rows);
}

}  // namespace kg::cpu::KG_ISA::attention
