// What becomes of a finished micro-tile besides C: its squares and products with another matrix, its shares in two
// accumulated ones. Takes the tile from the first-level cache; knows nothing of loops around it or of threads.
#pragma once

#include "cpu/fused.h"
#include "cpu/gemm.h"

namespace kg::cpu::KG_ISA {

// The first `count` numbers at p as float64, 0 beyond them; `count` may be negative or more than there are lanes.
template <class Acc>
KG_INLINE Vec<double> gemmLoadWide(const Acc* p, int64_t count) {
  constexpr int N = Vec<double>::N;
  Acc lanes[N] = {};
  if (count < N) {
    for (int i = 0; i < count; i++) lanes[i] = p[i];
    p = lanes;
  }
  if constexpr (sizeof(Acc) == sizeof(double))
    return Vec<double>::load(p);
  else
    return loadWide(p);
}

template <int Count>
KG_INLINE double gemmTotal(const Vec<double> (&sums)[Count]) {
  Vec<double> total = sums[0];
  for (int j = 1; j < Count; j++) total += sums[j];
  return hsum(total);
}

// A tile's place: rows of `Columns` in `tile`, rows at distance `row` in the matrices, the first one at `at`.
template <class Acc, int Columns>
struct GemmSharedTile {
  const Acc* tile;
  int64_t rows, columns;
  int64_t at, row;

  // sums[0] = the tile's square, sums[1] = its product with `other`; one order of summation for a shape of tile.
  void sum(const void* other, double* sums) const {
    sums[0] = dot(tile, Columns);
    sums[1] = other ? dot(static_cast<const Acc*>(other) + at, row) : 0;
  }

  double dot(const Acc* y, int64_t yRow) const {
    return columns == Columns ? dotRows<true>(y, yRow) : dotRows<false>(y, yRow);
  }

  template <bool Full>
  double dotRows(const Acc* y, int64_t yRow) const {
    constexpr int N = Vec<double>::N, count = Columns / N;
    Vec<double> sums[count] = {};
    const Acc* x = tile;
    for (int64_t i = 0; i < rows; i++, x += Columns, y += yRow) {
#pragma GCC unroll 8
      for (int j = 0; j < count; j++) {
        const int64_t left = Full ? N : columns - j * N;
        sums[j] = fma(gemmLoadWide(x + j * N, left), gemmLoadWide(y + j * N, left), sums[j]);
      }
    }
    return gemmTotal(sums);
  }

  void addTo(void* matrix, Acc scale) const {
    const Vec<Acc> factor(scale);
    Acc* out = static_cast<Acc*>(matrix) + at;
    const Acc* x = tile;
    for (int64_t i = 0; i < rows; i++, out += row, x += Columns)
      forVectors<Acc>(columns, [&](int64_t j, int count) KG_LAMBDA_INLINE {
        storeLanes(out + j, fma(factor, loadLanes<Acc>(x + j, count), loadLanes<Acc>(out + j, count)), count);
      });
  }
};

}  // namespace kg::cpu::KG_ISA
